"""RunConfig: what one training run needs to know. `config_reading.py` reads it from YAML and a command line.

Torch-free, so that the command line stays quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import yaml

from metier.catalogue.method import Method, Part
from metier.catalogue.tree import method_of
from metier.errors import ConfigError

DEFAULT_METHOD = "esft"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run. `None` always means: not set."""

    model: str
    """A local folder, a hub id, or `embedded` for the small model that ships with metier."""
    dataset: str
    """Training records: a .jsonl, .json, .parquet or .csv file, a folder of splits, a `datasets` name or
    embedded:NAME, a task that comes along."""
    output_dir: str
    """The run's folder: configuration, profile, selection, checkpoints, adapter, metrics, report."""

    method: str = DEFAULT_METHOD
    """What is trained, by one of the names that `metier methods` lists. Its own options are keys of a run too."""
    targets: str | None = None
    """Parts of the layers that the method goes on, with commas: attention, dense, shared, routed, router, norms."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format that the base's weights are loaded in; `auto` is the one they were saved in."""
    base_store: Literal["device", "host", "disk"] = "device"
    """Where the frozen weights of the base's linear layers and experts live."""
    base_format: Literal["int8", "nf4"] | None = None
    """How those weights are kept: in int8 with a scale for every row, in NF4 with one for every 64 numbers, or as they
    are loaded."""
    base_folder: str | None = None
    """Where a base on disk puts its files, which go with the process; the system's temporary folder if not set."""
    eval_dataset: str | None = None
    """Records for the evaluation loss during training, in the same formats as `dataset`."""
    general_dataset: str | None = None
    """General-purpose records that are mixed into the training data, against forgetting."""
    general_ratio: float = 1.0
    """General records for each task record; the paper mixes 1:1."""

    selection: str | None = None
    """A selection.json with the experts to train; without it the run profiles the data and selects."""
    score: Literal["gate", "token", "output_norm"] = "token"
    """How an expert's relevance is measured: by its share of gate mass, of routed tokens, or of the outputs' norms."""
    score_scale: Literal["normalised", "raw"] = "normalised"
    """Whether a layer's scores sum to 1, or are the mean a token, as the paper has its gate scores."""
    minus_general: bool = False
    """Rank experts by the task's scores minus those of `general_dataset`, which is profiled too."""
    top_p: float | None = None
    """Select experts until they cover this share of each layer's score, in (0, 1]; 0.2 where no policy is named."""
    select_top_k: int | None = None
    """Select so many experts in each layer instead."""
    select_top_fraction: float | None = None
    """Select this share of each layer's experts instead, in (0, 1], rounded up."""
    select_budget_bytes: int | None = None
    """Select the experts with most score a byte over all layers instead, as long as they fit into so many bytes."""
    profile_tokens: int = 131_072
    """Tokens of the training data that are profiled at most; the paper finds 2^17 enough."""
    profile_until_stable: bool = False
    """Stop profiling as soon as both halves of the data select the same experts."""
    stability_threshold: float = 0.9
    """Agreement of the halves, Jaccard, that the lower end of its 95% interval must reach to stop, in (0, 1]."""
    lora_r: int = 8
    """Rank of a LoRA's changes."""
    lora_alpha: float = 16.0
    """Scale of a LoRA; its change is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout of a LoRA's inputs; 0 where it is on all experts."""

    meft_r: int = 1024
    """Rows of the sparse adapter in each layer."""
    meft_num_key_experts: int | None = None
    """Groups that the rows are parted into; near the square root of 8 times `meft_r` where it is not set."""
    meft_num_active_key_experts: int | None = None
    """Groups that a token chooses rows among; 8 where it is not set."""
    meft_top_k: int | None = None
    """Rows that fire for a token; 64, or as many as there are to choose among, where it is not set."""
    meft_gate: Literal["logit", "none"] = "logit"
    """Whether the router's logit multiplies what a row sees, so that the router learns; `none` is the paper's."""
    meft_semantics: Literal["token", "union"] = "token"
    """Whether a token uses the rows that it chose, or those that any token of its batch chose, as in the paper."""
    meft_scaling: float = 1.0
    """Factor of the sparse adapter's output."""
    meft_store: Literal["device", "host", "disk"] = "host"
    """Where the rows and their optimizer state live."""
    meft_cache_bytes: int = 0
    """Device memory for the rows that most steps use, where the store is elsewhere; they are updated there."""
    meft_row_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the rows; bfloat16 is trained with stochastic rounding."""
    meft_state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of the rows' optimizer state."""
    meft_update: Literal["lazy", "exact"] = "lazy"
    """Whether rows that a step does not use rest, or catch up on what they missed, as dense AdamW would have it."""

    train_shared_experts: bool = False
    """Train the shared experts of every MoE layer too, whole."""
    train_router: bool = False
    """Train the router of every MoE layer too."""
    train_attention: bool = False
    """Train the attention of every layer too, whole."""
    train_norms: bool = False
    """Train the norms between the layers' parts too."""

    learning_rate: float = 1e-5
    """Peak learning rate. The paper's values: 1e-5 for esft, 3e-5 for full, 1e-4 for lora."""
    shared_experts_learning_rate: float | None = None
    """Peak learning rate of the shared experts; `learning_rate` where it is not set."""
    router_learning_rate: float | None = None
    """The same of the routers."""
    attention_learning_rate: float | None = None
    """The same of attention."""
    norms_learning_rate: float | None = None
    """The same of the norms."""
    per_device_train_batch_size: int = 4
    """Records that one device processes at once."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are summed before a step."""
    global_batch_size: int | None = None
    """Records of a step over all processes, in place of `gradient_accumulation_steps`: the same run on any number."""
    fsdp: bool = False
    """Shard the weights over the processes that torchrun or accelerate has started (FSDP2): no copy in each."""
    num_train_epochs: float = 1.0
    """Passes over the training data; `max_steps` goes before it."""
    max_steps: int | None = None
    """Optimizer steps, whatever the number of epochs."""
    max_length: int = 1024
    """Longest record in tokens. Longer ones are left out and reported, never cut."""
    bf16: bool = False
    """Compute in bfloat16 mixed precision."""
    padding_free: bool = False
    """Put short records of a batch behind one another instead of padding each: the same batch and loss, less time."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    lr_scheduler_type: str = "linear"
    """Course of the learning rate, by transformers' names: linear, cosine, constant_with_warmup …"""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """AdamW's weight decay. Parameters that are not trained do not decay."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    seed: int = 0
    """Seed of the data's order, the new parameters and dropout."""

    logging_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    report_to: str = "none"
    """Where transformers logs too: none, tensorboard, wandb, trackio …"""
    save_steps: int | None = None
    """Steps between two checkpoints; without it there is none until the end."""
    save_total_limit: int | None = None
    """Checkpoints that are kept; the oldest are removed."""
    resume_from_checkpoint: str | None = None
    """A checkpoint's folder, or `last` for the newest one in output_dir."""

    method_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The method's own options; in a file and on a command line they are keys like all others."""

    def __post_init__(self) -> None:
        method = method_of(self.method)
        if self.base_format is None and method.base_format is not None:
            object.__setattr__(self, "base_format", method.base_format)
        self._check_targets(method)
        for name in ("model", "dataset", "output_dir"):
            _require(bool(getattr(self, name)), name, "be a name or a path", getattr(self, name))
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "be at least 1", value)
        for name in _AT_LEAST_ZERO:
            _require(getattr(self, name) >= 0, name, "be at least 0", getattr(self, name))
        for name in ("learning_rate", "num_train_epochs", "lora_alpha", "general_ratio", "meft_scaling"):
            _require(getattr(self, name) > 0, name, "be greater than 0", getattr(self, name))
        for group in _GROUPS:
            rate = getattr(self, f"{group}_learning_rate")
            _require(rate is None or rate > 0, f"{group}_learning_rate", "be greater than 0", rate)
            if rate is not None and group not in self.also_train:
                raise ConfigError(
                    f"{group}_learning_rate is set, but {group} would not be trained. Set train_{group}: true, or "
                    "leave the rate out."
                )
        if self.also_train and not method.selects_experts:
            raise ConfigError(
                f"train_{self.also_train[0]} goes with the methods esft and expert_lora, got method {self.method}: "
                "full trains everything, and lora only its own changes. Leave it out."
            )
        for name in ("top_p", "select_top_fraction", "stability_threshold"):
            value = getattr(self, name)
            _require(value is None or 0 < value <= 1, name, "be in (0, 1]", value)
        policies = {name: value for name in POLICIES if (value := getattr(self, name)) is not None}
        _require(len(policies) <= 1, ", ".join(POLICIES), "have one value among them at most", policies)
        made_by = [*policies, *(n for n in ("minus_general", "profile_until_stable") if getattr(self, n))]
        if self.selection is not None and made_by:
            raise ConfigError(
                f"selection names the experts already, so {', '.join(made_by)} would be ignored. Leave one side out."
            )
        if self.minus_general and self.general_dataset is None:
            raise ConfigError("minus_general needs general_dataset, whose scores are subtracted. Name one.")
        if self.has_frozen_base and method.changes_base:
            raise ConfigError(
                "base_store and base_format keep the base's weights where they cannot be changed, and method "
                f"{self.method} changes them. Use a method that stands beside them, or leave these keys out."
            )
        if self.base_folder is not None and not self.has_frozen_base:
            raise ConfigError(
                f"base_folder: got {self.base_folder!r}, but the base's weights are in no store. Set base_store or "
                "base_format, or leave it out."
            )
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ConfigError(
                "global_batch_size says how many batches a step has, and so does gradient_accumulation_steps. Leave "
                "one of them out."
            )
        if self.fsdp and self.has_frozen_base:
            raise ConfigError(
                "fsdp shards the base's weights over processes, base_store and base_format keep them elsewhere. Leave "
                "one side out."
            )
        _require(self.lora_dropout < 1, "lora_dropout", "be less than 1", self.lora_dropout)
        if method.not_resumable and (self.save_steps is not None or self.resume_from_checkpoint is not None):
            raise ConfigError(
                f"save_steps and resume_from_checkpoint: a run of {method.name} cannot be taken up again, for "
                f"{method.not_resumable}. Leave them out."
            )
        if self.gradient_checkpointing and method.name in ("prefix", "cartridge"):
            raise ConfigError(
                f"gradient_checkpointing: {method.name} stands in the KV cache, which checkpointing turns off. Leave "
                "it out, or use method prefix_attention."
            )
        if method.config is None and method.name != "expert_lora" and (unused := self.lora_keys_set):
            raise ConfigError(f"{', '.join(unused)}: method {method.name} has no LoRA. Leave out what is of one.")
        if not method.selects_experts and (unused := self._keys_set(SELECTION_KEYS)):
            raise ConfigError(
                f"{', '.join(unused)}: method {method.name} selects no experts, so this would be passed over. Leave it "
                "out, or use esft or expert_lora, which train the experts that a task uses."
            )
        if method.name != "meft" and (unused := self._keys_set(MEFT_KEYS)):
            raise ConfigError(
                f"{', '.join(unused)}: is of method meft, and would be passed over by {method.name}. Leave it out."
            )

    def _check_targets(self, method: Method) -> None:
        for part in self.target_parts or ():
            _require(part in get_args(Part), "targets", f"name some of {', '.join(get_args(Part))}", part)
            if part not in method.can_target or not (method.targets or "routed" in method.can_target):
                parts = ", ".join(method.can_target) if method.targets else "none, for it has a place of its own"
                raise ConfigError(f"targets: got {part!r}, but {method.name} can go on {parts}. Leave it out.")
        if self.targets is not None and "target_modules" in self.method_options:
            raise ConfigError("targets and target_modules both say where the method goes. Leave one of them out.")

    @property
    def procedure_options(self) -> dict[str, Any]:
        """Options of the method's training procedure, those that the run sets in place of their defaults."""
        defaults = method_of(self.method).procedure_options
        return {name: self.method_options.get(name, default) for name, default in defaults.items()}

    @property
    def num_forward_passes(self) -> int:
        """Over each batch; MeZO takes two for every direction, and no backward pass."""
        directions: int | None = self.procedure_options.get("mezo_directions")
        return 1 if directions is None else 2 * directions

    @property
    def lora_keys_set(self) -> tuple[str, ...]:
        """Keys of LoRAs that are not at their defaults."""
        return self._keys_set(LORA_KEYS)

    def _keys_set(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of them that are not at their defaults."""
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        return tuple(name for name in names if getattr(self, name) != defaults[name])

    @property
    def target_parts(self) -> tuple[str, ...] | None:
        """The parts that the run names; None where it leaves them to the method."""
        return None if self.targets is None else tuple(part.strip() for part in self.targets.split(","))

    @property
    def has_frozen_base(self) -> bool:
        """Whether the base's large weights are in a store of their own instead of the model's memory."""
        return self.base_store != "device" or self.base_format is not None

    @property
    def also_train(self) -> tuple[str, ...]:
        """The groups of modules that are trained whole beside the experts."""
        return tuple(group for group in _GROUPS if getattr(self, f"train_{group}"))

    @property
    def own_learning_rates(self) -> dict[str, float]:
        """Peak learning rates of those groups that have their own."""
        rates = {group: getattr(self, f"{group}_learning_rate") for group in self.also_train}
        return {group: rate for group, rate in rates.items() if rate is not None}

    def to_yaml(self) -> str:
        """The configuration as YAML that `load_run_config` reads back to an equal one."""
        values = dataclasses.asdict(self)
        options = values.pop("method_options")
        return yaml.safe_dump({**values, **options}, sort_keys=False, allow_unicode=True)


def passed_over(method: str) -> set[str]:
    """Keys of a run for selected experts or a sparse adapter, where a method is about neither."""
    selects = method_of(method).selects_experts
    return {*(() if selects else SELECTION_KEYS), *(() if method == "meft" else MEFT_KEYS)}


LORA_KEYS = ("lora_r", "lora_alpha", "lora_dropout")
_GROUPS = ("shared_experts", "router", "attention", "norms")
POLICIES = ("top_p", "select_top_k", "select_top_fraction", "select_budget_bytes")
SELECTION_KEYS = (
    "selection", "score", "score_scale", "minus_general", "profile_until_stable", "stability_threshold", *POLICIES,
)  # fmt: skip
"""Of runs that train selected experts alone."""
MEFT_KEYS = tuple(one.name for one in dataclasses.fields(RunConfig) if one.name.startswith("meft_"))
_AT_LEAST_ONE = (
    "profile_tokens",
    "select_top_k",
    "select_budget_bytes",
    "lora_r",
    "meft_r",
    "meft_num_key_experts",
    "meft_num_active_key_experts",
    "meft_top_k",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "max_steps",
    "max_length",
    "logging_steps",
    "save_steps",
    "save_total_limit",
)
_AT_LEAST_ZERO = ("lora_dropout", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "meft_cache_bytes")


def _require(condition: bool, name: str, must: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must {must}, got {got!r}.")
