"""A MEFT adapter's sizes from its number of rows alone, each with the reason for it. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist

from metier.errors import ConfigError

NUM_ACTIVE_KEY_EXPERTS = 8
"""The published code's `n_probe`."""
TOP_K = 64
"""The paper's K."""
KEY_STD = 0.02
"""The published code's initial keys are N(0, 0.02)."""
_FURTHEST = 2.0
"""How far a number of Key-Experts may be from the best one, as a factor."""


@dataclass(frozen=True, slots=True)
class MeftSizes:
    """How the rows of one layer are parted and used."""

    r: int
    num_key_experts: int
    num_active_key_experts: int
    top_k: int

    @property
    def rows_per_key_expert(self) -> int:
        return self.r // self.num_key_experts

    @property
    def num_candidates(self) -> int:
        """Rows among which a token's `top_k` are chosen."""
        return self.num_active_key_experts * self.rows_per_key_expert

    def reasons(self, given: Collection[str] = ()) -> list[str]:
        """One line a size, for people; `given` are those that do not follow from `r`, but were said."""
        best = math.sqrt(self.num_active_key_experts * self.r)
        cheapest = f"routing costs least near √({self.num_active_key_experts}·{self.r}) = {best:.0f}"
        because = {
            "num_key_experts": f"{cheapest}, and they are to be of one size",
            "num_active_key_experts": "as in the published code"
            if self.num_active_key_experts == NUM_ACTIVE_KEY_EXPERTS
            else "all that there are",
            "top_k": "as in the paper" if self.top_k == TOP_K else "all that there are",
        }
        why = {name: "as configured" if name in given else reason for name, reason in because.items()}
        return [
            f"num_key_experts {self.num_key_experts}: {why['num_key_experts']}, {self.rows_per_key_expert} rows",
            f"num_active_key_experts {self.num_active_key_experts}: {why['num_active_key_experts']}; a token chooses "
            f"among {self.num_candidates} rows",
            f"top_k {self.top_k}: {why['top_k']}; rows that fire for a token, {self.top_k / self.r:.1%} of all",
            f"keys begin as N(0, {KEY_STD}²), as in the published code, values as 0, so that nothing changes yet, and "
            "a Key-Expert's row of the router as the mean of its keys",
        ]


def meft_sizes(
    r: int,
    *,
    num_key_experts: int | None = None,
    num_active_key_experts: int | None = None,
    top_k: int | None = None,
    where: str = "MeftConfig",
    prefix: str = "",
) -> MeftSizes:
    """The sizes that were given, and for the rest those that follow from `r`.

    Args:
        r, num_key_experts, num_active_key_experts, top_k: of one layer; None for what is to follow.
        where: that they were given, for messages.
        prefix: of their names there.

    Raises:
        ConfigError: a size is out of range, `r` cannot be split, or `top_k` is more than there are candidates.
    """
    sizes = {"num_key_experts": num_key_experts, "num_active_key_experts": num_active_key_experts, "top_k": top_k}
    for name, value in {"r": r, **sizes}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{where}: {prefix}{name} must be at least 1, got {value}.")
    num_active = num_active_key_experts or min(NUM_ACTIVE_KEY_EXPERTS, num_key_experts or r)
    count = num_key_experts or _best_count(r, num_active, where, prefix)
    if r % count:
        raise ConfigError(
            f"{where}: {prefix}r={r} cannot be split into {prefix}num_key_experts={count} Key-Experts of one size.\n"
            f"Take {_either(r - r % count, r + count - r % count, prefix)}, or leave {prefix}num_key_experts out."
        )
    if num_active > count:
        raise ConfigError(
            f"{where}: {prefix}num_active_key_experts={num_active} is more than {prefix}num_key_experts={count}; lower "
            "it."
        )
    candidates = num_active * (r // count)
    if top_k is not None and top_k > candidates:
        raise ConfigError(
            f"{where}: {prefix}top_k={top_k} is more than the {candidates} candidates of a token, which are "
            f"{prefix}num_active_key_experts={num_active} times {r // count} rows.\n"
            f"Lower {prefix}top_k, or raise {prefix}num_active_key_experts."
        )
    return MeftSizes(r, count, num_active, top_k or min(TOP_K, candidates))


def router_scale(sizes: MeftSizes, hidden_size: int) -> float:
    """What the mean of a Key-Expert's keys is multiplied by to be its row of the router.

    So that for inputs whose entries have variance 1, as a norm leaves them, the logits of the chosen Key-Experts are 1
    in the mean, and the adapter begins with the activations of a dense one. (The published code multiplies by 50.)
    """
    std = KEY_STD * math.sqrt(hidden_size / sizes.rows_per_key_expert)
    share = sizes.num_active_key_experts / sizes.num_key_experts
    if share == 1:
        return 1 / std
    normal = NormalDist()
    # the mean of the largest `share` of normally distributed numbers
    return 1 / (std * normal.pdf(normal.inv_cdf(1 - share)) / share)


def _either(lower: int, higher: int, prefix: str) -> str:
    return " or ".join(f"{prefix}r={rows}" for rows in (lower, higher) if rows)


def _best_count(r: int, num_active: int, where: str, prefix: str) -> int:
    best = math.sqrt(num_active * r)
    divisors = [d for d in range(num_active, r + 1) if r % d == 0]
    nearest = min(divisors, key=lambda d: abs(math.log(d / best)), default=0)
    if not nearest or max(nearest / best, best / nearest) > _FURTHEST:
        wanted = max(num_active, round(best))
        raise ConfigError(
            f"{where}: {prefix}r={r} cannot be split: routing is cheap near {best:.0f} Key-Experts, and no number near "
            f"it divides {r}.\nTake {prefix}r={max(1, round(r / wanted)) * wanted}, or give {prefix}num_key_experts."
        )
    return nearest
