"""What a sparse delta is: which entries of the base's own parameters it trains, how they are chosen, on which base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from torch import Tensor

from metier.errors import ConfigError
from metier.methods.peft_types import MetierPeftType
from metier.models.base_parameters import KINDS

Mask = Literal[
    "magnitude_smallest", "magnitude_largest", "random", "fisher", "gradient", "change",
    "bias", "norm", "layer", "head", "given",
]  # fmt: skip
WHOLE: frozenset[str] = frozenset({"bias", "norm", "layer"})
"""Masks that take parameters whole."""
DEFAULT_DENSITY = 0.005
"""FishMask's and LT-SFT's tables lie between 0.1% and 10%, with most of the gain reached at 0.5%."""


@dataclass
class SparseDeltaConfig(PeftConfig):
    """Configuration of a sparse delta; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    Masks that look at data (`fisher`, `gradient`, `change`, and `head` without `heads`) need
    `prepare(model, config, batches)` before the adapter is made; the others choose when it is made.

    On MoE models the default targets are the linear layers of all decoder layers (shared experts included) and the
    stacked weights of routed experts. Routers, norms, biases and embeddings are trained where `target_kinds` or
    `target_modules` name them.

    Raises:
        ConfigError: a value out of range, or one that does not go with the mask.

    Papers: FishMask (arXiv:2111.09839), LT-SFT (arXiv:2110.07560), PaFi (arXiv:2305.16742), BitFit (arXiv:2106.10199).
    """

    mask: Mask = field(
        default="magnitude_smallest",
        metadata={
            "help": "How entries are chosen: magnitude_smallest (PaFi), magnitude_largest, random, fisher (FishMask), "
            "gradient, change (LT-SFT); whole parts: bias (BitFit), norm, layer, head; or given by `entries`."
        },
    )
    density: float | None = field(
        default=None,
        metadata={"help": "Share of the target parameters' entries to train, in (0, 1]; 0.005 where none is given."},
    )
    num_entries: int | None = field(default=None, metadata={"help": "Number of entries to train, instead of density."})
    scope: Literal["global", "per_parameter"] = field(
        default="global",
        metadata={"help": "Whether all target parameters compete for entries, or each has its share by size."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters to choose among: paths (or ends of paths) of modules or of parameters, or a regular "
            "expression for whole paths of modules. When the adapter is made: the paths of its parameters."
        },
    )
    target_kinds: list[str] | None = field(
        default=None,
        metadata={"help": f"Parameters to choose among by what they are: {', '.join(KINDS)}. Not with target_modules."},
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Decoder layers of mask layer."})
    last_layers: int | None = field(default=None, metadata={"help": "Mask layer: the last so many, instead of layers."})
    heads: dict[int, list[int]] | None = field(
        default=None, metadata={"help": "Attention heads of mask head, by decoder layer; else the best by head_score."}
    )
    head_score: Literal["fisher", "gradient"] = field(
        default="fisher",
        metadata={"help": "What heads are compared by: the sum of their Fisher information, or their gradient's norm."},
    )
    new_biases: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={
            "help": "Mask bias: whether linear layers without a bias get one that begins at 0; auto: where no target "
            "has a bias, as in LLaMA."
        },
    )
    fisher_per: Literal["sample", "batch"] = field(
        default="sample", metadata={"help": "Whether gradients are squared for each row of a batch, or for each batch."}
    )
    change_learning_rate: float = field(
        default=5e-5, metadata={"help": "AdamW's, in mask change's first pass of full fine-tuning."}
    )
    seed: int = field(default=0, metadata={"help": "Of mask random."})
    entries: dict[str, Tensor] | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "The chosen flat positions by parameter path; set by prepare, or given. Not saved here."},
    )
    num_entries_by_parameter: dict[str, int] | None = field(
        default=None, metadata={"help": "How many entries of which parameter; set when the adapter is made."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.SPARSE_DELTA
        for name, choices in (
            ("mask", get_args(Mask)),
            ("scope", ("global", "per_parameter")),
            ("head_score", ("fisher", "gradient")),
            ("new_biases", ("auto", "always", "never")),
            ("fisher_per", ("sample", "batch")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{_HERE}: {name} must be {' or '.join(choices)}, got {getattr(self, name)!r}.")
        if self.heads is not None:
            # JSON knows no numbers as keys
            self.heads = {int(layer): list(numbers) for layer, numbers in self.heads.items()}
        self._check_size()
        self._check_targets()
        self._check_structure()

    @property
    def needs_data(self) -> bool:
        """Whether entries can only be chosen with batches at hand."""
        return self.mask in ("fisher", "gradient", "change") or (self.mask == "head" and self.heads is None)

    def budget(self, num_candidates: int) -> int:
        """Entries to choose among so many."""
        if self.num_entries is not None:
            return self.num_entries
        assert self.density is not None, "set by __post_init__"
        return max(1, round(self.density * num_candidates))

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it: without the positions, which are tensors and lie in the adapter's file."""
        entries, self.entries = self.entries, None
        try:
            saved: dict[str, Any] = super().to_dict()
        finally:
            self.entries = entries
        return saved

    def _check_size(self) -> None:
        if self.mask in WHOLE or self.mask == "given" or self.heads is not None:
            if self.density is not None or self.num_entries is not None:
                what = "heads" if self.heads is not None else f"mask={self.mask!r}"
                raise ConfigError(f"{_HERE}: density and num_entries do not go with {what}, which says how many.")
            return
        if self.density is not None and self.num_entries is not None:
            raise ConfigError(f"{_HERE}: got density={self.density} and num_entries={self.num_entries}; give one.")
        if self.num_entries is None and self.density is None:
            self.density = DEFAULT_DENSITY
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"{_HERE}: density must be in (0, 1], got {self.density}.")
        if self.num_entries is not None and self.num_entries < 1:
            raise ConfigError(f"{_HERE}: num_entries must be at least 1, got {self.num_entries}.")

    def _check_targets(self) -> None:
        # a configuration of an adapter that is made already has both: its parameters' paths, and how they were found
        if self.target_modules and self.target_kinds and self.num_entries_by_parameter is None:
            raise ConfigError(f"{_HERE}: target_modules and target_kinds both say where to choose; give one.")
        if stray := [kind for kind in self.target_kinds or () if kind not in KINDS]:
            raise ConfigError(f"{_HERE}: target_kinds: got {stray[0]!r}, expected some of {', '.join(KINDS)}.")
        if not self.change_learning_rate > 0:
            raise ConfigError(f"{_HERE}: change_learning_rate must be greater than 0, got {self.change_learning_rate}.")
        if self.entries is not None and not (isinstance(self.entries, Mapping) and self.entries):
            raise ConfigError(f"{_HERE}: entries must map parameter paths to flat positions, got {self.entries!r}.")

    def _check_structure(self) -> None:
        if self.mask == "given" and self.entries is None and self.num_entries_by_parameter is None:
            raise ConfigError(f"{_HERE}: mask='given' needs entries, flat positions by parameter path.")
        if self.mask == "layer" and (self.layers is None) == (self.last_layers is None):
            raise ConfigError(f"{_HERE}: mask='layer' needs either layers or last_layers.")
        if self.mask != "layer" and (self.layers is not None or self.last_layers is not None):
            raise ConfigError(f"{_HERE}: layers and last_layers are mask='layer' alone's, got mask={self.mask!r}.")
        if self.last_layers is not None and self.last_layers < 1:
            raise ConfigError(f"{_HERE}: last_layers must be at least 1, got {self.last_layers}.")
        if self.mask != "head" and self.heads is not None:
            raise ConfigError(f"{_HERE}: heads is mask='head' alone's, got mask={self.mask!r}.")


_HERE = "SparseDeltaConfig"
