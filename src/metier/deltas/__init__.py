"""What a run leaves behind: save a delta, read it with every check, look at it, verify it on its base, merge it."""
