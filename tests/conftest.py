"""What every test needs: no network, and quiet tokenizers."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings

# a loaded machine is no failing test
settings.register_profile("metier", deadline=None)
settings.load_profile("metier")
