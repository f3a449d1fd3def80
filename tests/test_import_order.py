"""Imports between rooms point down the order of the architecture and never back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "metier"

# Top to bottom, as docs/architecture draws it: a room imports from its own level or from below.
ORDER = (
    ("__main__", "cli"),
    ("serving", "training", "reports"),
    ("evaluation", "planning"),
    ("methods", "deltas"),
    ("routing", "memory"),
    ("data",),
    ("models",),
    ("embedded", "config", "config_reading", "distributed"),
    ("catalogue",),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
EMBEDDED_IS_FOR = {"__main__", "cli", "models", "data", "evaluation", "training"}
PUBLIC_API = "__init__"


def room_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported_rooms(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and room of each import from metier, inside functions and `TYPE_CHECKING` too.

    Args:
        source: the module's text.
        package: the package that relative imports start from, e.g. ("metier", "routing").
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            targets = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "metier":
                yield node.lineno, target[1] if len(target) > 1 else PUBLIC_API


def violations(root: Path) -> list[str]:
    found = []
    edges: dict[tuple[str, str], str] = {}
    for path in sorted(root.rglob("*.py")):
        room = room_of(path, root)
        if room == PUBLIC_API:
            continue
        package = ("metier", *path.relative_to(root).parent.parts)
        for line, target in imported_rooms(path.read_text(encoding="utf-8"), package):
            where = f"{path.relative_to(root)}:{line}: {room} imports {target}"
            if target in (room, "__version__"):
                continue
            if room not in LEVEL or target not in LEVEL:
                found.append(f"{where}, and one of them has no place in the order")
            elif LEVEL[target] < LEVEL[room] or (target == "embedded" and room not in EMBEDDED_IS_FOR):
                found.append(f"{where}, which stands above it")
            elif LEVEL[target] == LEVEL[room] and (target, room) in edges:
                found.append(f"{where}, and {edges[target, room]}")
            edges[room, target] = where
    return found


def test_imports_point_down_the_order() -> None:
    assert violations(SOURCE) == []


def test_every_room_is_a_package() -> None:
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("models/load.py", "from metier.training.run import train"),
        ("models/load.py", "def f():\n    import metier.routing.profile"),
        ("models/load.py", "from ..routing import profile"),
        ("models/load.py", "from metier import load"),
        ("routing/profile.py", "from metier.embedded import model_path"),
        ("config.py", "from metier.data import records"),
        ("attic/old.py", "from metier.errors import MetierError"),
    ],
)
def test_an_import_that_points_back_is_found(tmp_path: Path, file: str, line: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line)
    assert len(violations(tmp_path)) == 1


def test_two_rooms_of_one_level_may_not_import_each_other(tmp_path: Path) -> None:
    for room, other in (("methods", "deltas"), ("deltas", "methods")):
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text(f"import metier.{other}.a")
    assert len(violations(tmp_path)) == 1


def test_imports_downwards_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.py").write_text(
        "import torch\nfrom metier import __version__\nfrom metier.embedded import x\n"
        "from metier.reports.html import y\nfrom . import z\nfrom ..config import c\n"
    )
    assert violations(tmp_path) == []
