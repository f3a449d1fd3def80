"""How much memory a process may use: the least of the machine's and its control groups'."""

from __future__ import annotations

import pytest

from metier.memory import memory_limit


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Put a process into control groups; `groups(lines, limits by file)`."""

    def put(lines: str, limits: dict[str, str]) -> int:
        (tmp_path / "self").write_text(lines)
        for name, limit in limits.items():
            file = tmp_path / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(limit)
        monkeypatch.setattr(memory_limit, "_GROUPS", tmp_path / "self")
        monkeypatch.setattr(memory_limit, "_ROOT", tmp_path / "root")
        monkeypatch.setattr(memory_limit, "_physical_bytes", lambda: 1000)
        return memory_limit.memory_limit_bytes()

    return put


@pytest.mark.parametrize(
    ("lines", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "300\n", "a/memory.max": "max\n"}, 300),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "200\n"}, 200),
        ("0::/a\n", {"a/memory.max": "5000\n"}, 1000),
        ("4:memory:/a\n1:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "400\n", "a/memory.max": "1\n"}, 400),
        ("0::/gone\n", {}, 1000),
    ],
    ids=["own", "a holding group's", "more than the machine has", "version 1", "none"],
)
def test_limits(groups, lines, limits, expected):
    assert groups(lines, limits) == expected


def test_a_host_without_control_groups_has_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_limit, "_GROUPS", tmp_path / "none")
    assert memory_limit.memory_limit_bytes() == memory_limit._physical_bytes() > 1 << 20
