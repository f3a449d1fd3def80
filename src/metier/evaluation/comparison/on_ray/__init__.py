"""A Ray cluster as the place where cells run. Ray schedules, places and retries them; nothing here does."""
