"""One folder a method; every method is a PEFT tuner."""

# PEFT first: its import registers all of our tuners, which would else begin in the middle of the first of them
import peft as _peft  # noqa: F401
