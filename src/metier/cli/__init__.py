"""The command line: one short function a verb. Heavy imports happen inside the verbs, to stay quick."""

from __future__ import annotations

from importlib import import_module

from metier.cli.app import app, main

# each puts its verbs into the application; in this order `metier --help` lists them
for _verbs in ("runs", "routing", "comparing", "deltas", "serving"):
    import_module(f"metier.cli.{_verbs}")

__all__ = ["app", "main"]
