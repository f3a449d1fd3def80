"""What a cell asks of a node, from what Ray says of its nodes: numbers, without a cluster."""

from __future__ import annotations

import re
from typing import Any

import pytest

from metier.errors import RunError
from metier.evaluation.comparison.on_ray.needs import Needs, Node, share_of_node, usable_nodes

GIB = 1 << 30


def told(name: str, *, is_alive: bool = True, **resources: float) -> dict[str, Any]:
    """A node as `ray.nodes()` tells of it."""
    has = {"memory": 16.0 * GIB, "object_store_memory": 1.0, **resources}
    return {
        "NodeID": name,
        "Alive": is_alive,
        "NodeManagerHostname": name,
        "NodeManagerAddress": "10.0.0.1",
        "Resources": has,
    }


def test_nodes_that_are_gone_or_have_no_cpus_are_left_out() -> None:
    found = usable_nodes([told("head", CPU=0), told("gone", is_alive=False, CPU=8), told("one", CPU=8), told("none")])
    assert found == [Node("one", "one, 10.0.0.1", 8, 0, 16 * GIB)]


def test_where_there_are_accelerators_cells_run_on_them_alone() -> None:
    nodes = usable_nodes([told("cpu", CPU=64), told("gpu", CPU=32, GPU=4.0)])
    assert [node.name for node in nodes] == ["gpu, 10.0.0.1"]
    # one cell on each, each with its share of the cores
    assert share_of_node(nodes, 1) == Needs(8, 1, 4 * GIB)


@pytest.mark.parametrize(("num_jobs", "num_cpus", "memory_gib"), [(1, 8, 16), (3, 2, 16 / 3), (100, 1, 0.16)])
def test_a_cell_has_the_share_of_the_smallest_node(num_jobs: int, num_cpus: int, memory_gib: float) -> None:
    nodes = usable_nodes([told("large", CPU=32, memory=64.0 * GIB), told("small", CPU=8)])
    assert share_of_node(nodes, num_jobs) == Needs(num_cpus, 0, int(memory_gib * GIB))


def test_a_cluster_without_a_node_is_refused() -> None:
    with pytest.raises(RunError, match=r"the Ray cluster has no node with a CPU to give"):
        share_of_node(usable_nodes([told("head", CPU=0)]), 1)


def test_what_fits_on_no_node_is_said_with_the_largest() -> None:
    nodes = usable_nodes([told("small", CPU=8), told("large", CPU=4, memory=64.0 * GIB)])
    assert Needs(8, 0, 16 * GIB).why_nowhere(nodes) == ""
    assert Needs(4, 0, 64 * GIB).why_nowhere(nodes) == ""
    # a node has the one and another node the other
    assert re.match(
        r"it needs 8 CPUs, 17 GiB of memory, and no node of the cluster has that: the largest is large, 10\.0\.0\.1 "
        r"\(4 CPUs, 64 GiB of memory\)\. Add a larger node or make the run smaller, then --retry$",
        Needs(8, 0, 17 * GIB).why_nowhere(nodes),
    )
    assert Needs(1, 1, GIB).why_nowhere(nodes).startswith("it needs 1 CPU, 1 GPU, 1 GiB of memory, and no node")
    assert Needs(1, 0, GIB).why_nowhere([]) == "the cluster has no node left"
