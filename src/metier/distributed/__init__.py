"""Processes that work on one run together: who there is, and what they tell each other, through torch's own engine."""
