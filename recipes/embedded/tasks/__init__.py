"""Builders of the three tasks that ship with metier, a module each, and what they share in `build.py`."""
