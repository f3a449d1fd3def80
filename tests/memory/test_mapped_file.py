"""Tensors in files: what happens to a file that somebody else still has."""

from __future__ import annotations

from pathlib import Path

import torch

from metier.memory import RowStore
from metier.memory.mapped_file import create_mapped


def test_a_file_of_the_same_name_leaves_the_former_one_to_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    former = create_mapped(path, (4,), torch.float32)
    former.tensor.fill_(7.0)
    later = create_mapped(path, (8,), torch.float32)
    later.tensor.fill_(1.0)
    assert former.tensor.tolist() == [7.0] * 4
    assert later.tensor.tolist() == [1.0] * 8


def test_two_stores_in_one_folder_have_rows_of_their_own(tmp_path: Path) -> None:
    one, other = (RowStore(2, 2, 4, tier="disk", folder=tmp_path, name="layer") for _ in range(2))
    one.rows_NMWD.fill_(1.0)
    other.rows_NMWD.fill_(2.0)
    assert one.rows_NMWD.unique().tolist() == [1.0]
