"""What every test needs: no network, quiet tokenizers, property tests without a deadline, short garbage collections."""

from __future__ import annotations

import gc
import os
import tempfile

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# what is measured while other tests run is nothing to keep
os.environ["METIER_CACHE"] = tempfile.mkdtemp(prefix="metier-cache-")
if "PYTEST_XDIST_WORKER" in os.environ:
    # one of several processes, which would be in each other's way; before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"

# a loaded machine is no failing test
settings.register_profile("metier", deadline=None)
settings.load_profile("metier")


def pytest_collection_finish() -> None:
    """All that tests import is there, and stays: a collection that visits it takes half a second, and a batch of
    transformers' asks for two as it ends."""
    gc.collect()
    gc.freeze()
