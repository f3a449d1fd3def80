"""What every test needs: no network, quiet tokenizers, and property tests without a deadline."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# a loaded machine is no failing test
settings.register_profile("metier", deadline=None)
settings.load_profile("metier")
