"""The page of large models on paper is what its script writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_page_is_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("scale_on_paper", ROOT / "benchmarks" / "scale_on_paper.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "scale-on-paper.md").read_text(encoding="utf-8")
    assert "nothing here was measured" in page
    assert script.page() == page
