"""Many deltas on one copy of their base: admission, engine, HTTP."""
