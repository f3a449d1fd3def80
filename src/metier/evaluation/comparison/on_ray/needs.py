"""What a cell asks of a node: CPUs, an accelerator where there are some, memory as the planner foresees it.

Free of Ray and of torch: numbers alone, so that they can be looked at without a cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metier.errors import RunError
from metier.planning.spelling import size


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, with what Ray may give away of it."""

    node_id: str
    name: str
    num_cpus: int
    num_gpus: int
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({_spelled(self.num_cpus, self.num_gpus, self.memory_bytes)})"


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one cell."""

    num_cpus: int
    num_gpus: int
    memory_bytes: int

    def fit(self, node: Node) -> bool:
        return (
            self.num_cpus <= node.num_cpus and self.num_gpus <= node.num_gpus and self.memory_bytes <= node.memory_bytes
        )

    def why_nowhere(self, nodes: Sequence[Node]) -> str:
        """Why no node can run the cell, now or later; "" where one can."""
        if any(self.fit(node) for node in nodes):
            return ""
        if not nodes:
            return "the cluster has no node left"
        largest = max(nodes, key=lambda node: (node.num_gpus, node.memory_bytes))
        return (
            f"it needs {self}, and no node of the cluster has that: the largest is {largest}. "
            "Add a larger node or make the run smaller, then --retry"
        )

    def __str__(self) -> str:
        return _spelled(self.num_cpus, self.num_gpus, self.memory_bytes)


def usable_nodes(found: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The nodes that can run a cell, of those that `ray.nodes()` tells of.

    Those that are gone or have no CPUs to give are left out; where one has an accelerator, those without are.
    """
    nodes = []
    for one in found:
        has = one["Resources"]
        if one["Alive"] and has.get("CPU", 0) >= 1:
            name = f"{one['NodeManagerHostname']}, {one['NodeManagerAddress']}"
            node = Node(one["NodeID"], name, int(has["CPU"]), int(has.get("GPU", 0)), int(has.get("memory", 0)))
            nodes.append(node)
    with_gpus = [node for node in nodes if node.num_gpus]
    return with_gpus or nodes


def share_of_node(nodes: Sequence[Node], num_jobs: int) -> Needs:
    """What a cell gets where so many run on a machine at once, and at least one on each accelerator.

    The least that any node has for one, so that a cell computes with the same number of threads on all of them. The
    memory is for cells of which the planner can say nothing.

    Raises:
        RunError: there is no node.
    """
    if not nodes:
        raise RunError(
            "compare: the Ray cluster has no node with a CPU to give, so nothing can run.\n"
            "Add one: ray start --address=HEAD:PORT."
        )
    at_once = [max(num_jobs, node.num_gpus) for node in nodes]
    return Needs(
        num_cpus=max(1, min(node.num_cpus // number for node, number in zip(nodes, at_once, strict=True))),
        num_gpus=int(any(node.num_gpus for node in nodes)),
        memory_bytes=min(node.memory_bytes // number for node, number in zip(nodes, at_once, strict=True)),
    )


def _spelled(num_cpus: int, num_gpus: int, memory_bytes: int) -> str:
    parts = [f"{num_cpus} CPU{'s' * (num_cpus != 1)}", f"{size(memory_bytes)} of memory"]
    if num_gpus:
        parts.insert(1, f"{num_gpus} GPU{'s' * (num_gpus != 1)}")
    return ", ".join(parts)
