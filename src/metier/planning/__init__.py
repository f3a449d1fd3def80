"""Bytes, operations and seconds of a run before it starts."""
