"""A run for people to look at: one self-contained HTML page, and the table that the console prints."""
