"""The licence that a base's own card names, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from metier.deltas.card import delta_card, licence_of, merged_card


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# M\n", "apache-2.0"),
        ("---\nlicense: mit\n---", "mit"),
        ("---\nlicense: [mit, bsd]\n---\n", "unknown"),
        ("---\ntags: [a]\n---\nlicense: mit\n", "unknown"),
        ("# M\nlicense: mit\n", "unknown"),
        ("---\n: : [\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_licence_is_read_from_the_front_matter_alone(text: str | None, licence: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence


def test_cards_have_front_matter_that_the_hub_reads() -> None:
    experts = {1: (8, 26), 2: (3,)}
    merged = merged_card(base="o/b: x", fingerprint="f", delta="d", experts=experts, licence="mit")
    values = yaml.safe_load(merged.split("---\n")[1])
    assert values["base_model"] == "o/b: x"
    assert values["license"] == "mit"
    assert values["library_name"] == "transformers"
    assert "rows of 3 routed experts" in merged
    values = yaml.safe_load(
        delta_card(base="o/b", fingerprint="f", experts=experts, is_low_rank=False, also_train=()).split("---\n")[1]
    )
    assert values == {"library_name": "peft", "base_model": "o/b", "tags": ["metier", "esft"]}
    unknown = merged_card(base="b", fingerprint="f", delta="d", experts=experts, licence="unknown")
    assert "licence of the base: unknown" in unknown
    assert "license" not in yaml.safe_load(unknown.split("---\n")[1])
