"""What processes send over, by the figures of their makers. Nothing of this was measured."""

from __future__ import annotations

from dataclasses import dataclass

from metier.errors import ConfigError
from metier.planning.devices import REACHED_BANDWIDTH


@dataclass(frozen=True, slots=True)
class Link:
    """From one accelerator to the next."""

    name: str
    peak_bandwidth: float
    """Bytes a second in one direction, for one accelerator."""
    source: str

    @property
    def bandwidth(self) -> float:
        """That is reached: an assumption, as for memory."""
        return REACHED_BANDWIDTH * self.peak_bandwidth


LINKS = {
    name: Link(name, gigabytes * 1e9, source)
    for name, gigabytes, source in (
        ("nvlink3", 300, "NVIDIA A100 datasheet: 600 GB/s in both directions"),
        ("nvlink4", 450, "NVIDIA H100 datasheet: 900 GB/s in both directions"),
        ("nvlink5", 900, "NVIDIA Blackwell datasheet: 1.8 TB/s in both directions"),
        ("pcie3", 16, "PCI-SIG, 16 lanes of 8 GT/s"),
        ("pcie4", 32, "PCI-SIG, 16 lanes of 16 GT/s"),
        ("pcie5", 64, "PCI-SIG, 16 lanes of 32 GT/s"),
        ("infiniband-hdr", 25, "NVIDIA Quantum, 200 Gb/s, one port an accelerator"),
        ("infiniband-ndr", 50, "NVIDIA Quantum-2, 400 Gb/s, one port an accelerator"),
        ("ethernet-100g", 12.5, "IEEE 802.3, 100 Gb/s, one port an accelerator"),
        ("ethernet-10g", 1.25, "IEEE 802.3, 10 Gb/s, one port an accelerator"),
    )
}

DEVICES_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class World:
    """The processes that a run is planned for, each with an accelerator of its own, or a share of the machine."""

    size: int
    devices_per_node: int = DEVICES_PER_NODE
    links: tuple[Link, ...] = ()
    """Within a node, and between nodes; one stands for both. None where seconds are not asked for."""

    def __post_init__(self) -> None:
        for name, number in (("world_size", self.size), ("devices_per_node", self.devices_per_node)):
            if number < 1:
                raise ConfigError(f"{name}: got {number}, expected 1 or more.")

    @property
    def slowest_link(self) -> Link | None:
        """Of the ring that the processes send in."""
        if not self.links:
            return None
        used = self.links if self.size > self.devices_per_node else self.links[:1]
        return min(used, key=lambda link: link.bandwidth)

    def seconds(self, sent_bytes: int) -> float | None:
        """To send so much from each process, where nothing else is waited for; None without links."""
        link = self.slowest_link
        return None if link is None else sent_bytes / link.bandwidth


def links_of(names: str) -> tuple[Link, ...]:
    """Links by name, such as "nvlink4" or "nvlink4,infiniband-ndr": within a node, and between nodes.

    Raises:
        ConfigError: one of them is not known, or there are more than two.
    """
    found = [LINKS.get(name.strip().lower()) for name in names.split(",")]
    known = tuple(link for link in found if link is not None)
    if len(known) < len(found) or len(known) > 2:
        raise ConfigError(
            f"link: got {names!r}, expected one of {', '.join(LINKS)}, or two with a comma between: within a node, and "
            "between nodes."
        )
    return known
