"""Training procedures of methods that AdamW alone is not enough for, one file each."""
