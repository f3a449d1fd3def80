"""RunConfig: what one training run needs to know, from one YAML file and command-line overrides.

Nothing is ignored: an unknown key is refused with its nearest match, a value of the wrong type with the type
that was expected, and both with the place they came from. Torch-free, so that the command line stays quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from metier.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run. `None` always means: not set."""

    model: str
    """A local folder, a hub id, or `embedded` for the small model that ships with metier."""
    dataset: str
    """Training records: a .jsonl, .json, .parquet or .csv file, a folder of splits or a `datasets` name."""
    output_dir: str
    """The run's folder: configuration, profile, selection, checkpoints, adapter, metrics, report."""

    method: Literal["esft", "expert_lora", "meft", "full", "lora"] = "esft"
    """What is trained: selected experts, a LoRA on selected experts, a wide sparse adapter beside every feed-forward
    block, every parameter, or a LoRA on all experts."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format that the base's weights are loaded in; `auto` is the one they were saved in."""
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

    def __post_init__(self) -> None:
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
        if self.also_train and self.method not in ("esft", "expert_lora"):
            raise ConfigError(
                f"train_{self.also_train[0]} goes with the methods esft and expert_lora, got method {self.method}: "
                "full trains everything, and lora only its own changes. Leave it out."
            )
        for name in ("top_p", "select_top_fraction", "stability_threshold"):
            value = getattr(self, name)
            _require(value is None or 0 < value <= 1, name, "be in (0, 1]", value)
        policies = {name: value for name in _POLICIES if (value := getattr(self, name)) is not None}
        _require(len(policies) <= 1, ", ".join(_POLICIES), "have one value among them at most", policies)
        made_by = [*policies, *(n for n in ("minus_general", "profile_until_stable") if getattr(self, n))]
        if self.selection is not None and made_by:
            raise ConfigError(
                f"selection names the experts already, so {', '.join(made_by)} would be ignored. Leave one side out."
            )
        if self.minus_general and self.general_dataset is None:
            raise ConfigError("minus_general needs general_dataset, whose scores are subtracted. Name one.")
        _require(self.lora_dropout < 1, "lora_dropout", "be less than 1", self.lora_dropout)

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
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


_GROUPS = ("shared_experts", "router", "attention", "norms")
_POLICIES = ("top_p", "select_top_k", "select_top_fraction", "select_budget_bytes")
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
    "max_steps",
    "max_length",
    "logging_steps",
    "save_steps",
    "save_total_limit",
)
_AT_LEAST_ZERO = ("lora_dropout", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "meft_cache_bytes")
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NONE = ("none", "null", "~")
_COMMAND_LINE = "command line"


def load_run_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a YAML file of RunConfig's keys, or None.
        overrides: command-line tokens, which go before the file: `--key value`, `--key=value`, and for
            booleans `--key` and `--no-key`. Dashes within a key count as underscores.

    Raises:
        ConfigError: an unknown key (naming the nearest one), a wrong type, a missing key, a value out of
            range.
    """
    values = {} if path is None else _read_file(Path(path))
    values |= _read_overrides(overrides)
    missing = [field.name for field in dataclasses.fields(RunConfig) if _is_required(field, values)]
    if missing:
        where = "command line" if path is None else str(path)
        raise ConfigError(
            f"{where}: missing {_plural(missing, 'key')} {', '.join(missing)}. "
            f"Add {'them' if len(missing) > 1 else 'it'} to the YAML file or the command line, "
            f"e.g. --{missing[0]} VALUE."
        )
    return RunConfig(**values)


def describe_fields() -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key, for help texts; the meaning is the field's docstring."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(RunConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings = {
        statement.target.id: following.value.value
        for statement, following in zip(body.body, body.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
    hints = get_type_hints(RunConfig)
    return [
        (
            field.name,
            _type_name(hints[field.name]),
            "required" if field.default is dataclasses.MISSING else str(field.default),
            str(meanings[field.name]),
        )
        for field in dataclasses.fields(RunConfig)
    ]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give a YAML file of a run's keys.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level.")
    values: dict[str, Any] = {}
    constructor = yaml.SafeLoader("")
    for key_node, value_node in root.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = _known_key(str(key_node.value), where)
        if key in values:
            raise ConfigError(f"{where}: key '{key}' stands in the file twice; keep one of them.")
        value = constructor.construct_object(value_node, deep=True)
        values[key] = _convert(key, value, where)
    return values


def _read_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(
                f"{_COMMAND_LINE}: got '{token}' where a --key was expected. "
                f"A run's YAML file stands first: metier train run.yaml --key value."
            )
        name, has_value, text = token[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and _is_bool(name[3:]) and not has_value:
            values[name[3:]] = False
            continue
        key = _known_key(name, _COMMAND_LINE)
        if has_value:
            values[key] = _convert(key, text, _COMMAND_LINE)
        elif _is_bool(key):
            follows = bool(rest) and rest[0].lower() in (*_TRUE, *_FALSE)
            values[key] = _convert(key, rest.pop(0), _COMMAND_LINE) if follows else True
        elif not rest or rest[0].startswith("--"):
            raise ConfigError(f"{_COMMAND_LINE}: --{key} needs a value: {_type_name(_hint(key))}.")
        else:
            values[key] = _convert(key, rest.pop(0), _COMMAND_LINE)
    return values


def _known_key(key: str, where: str) -> str:
    names = [field.name for field in dataclasses.fields(RunConfig)]
    if key in names:
        return key
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{nearest[0]}'?" if nearest else f"The keys are: {', '.join(names)}."
    raise ConfigError(f"{where}: unknown key '{key}'. {hint}")


def _convert(key: str, value: object, where: str) -> Any:
    """The value in its field's type. Texts are parsed: YAML reads 1e-4 as a text, for one."""
    hint = _hint(key)
    is_none = value is None or (isinstance(value, str) and value.lower() in _NONE)
    if is_none and type(None) in get_args(hint):
        return None
    kind = _without_none(hint)
    result = None if value is None else _parse(kind, value)
    if result is None:
        raise ConfigError(f"{where}: {key} must be {_type_name(hint)}, got {value!r}.")
    return result


def _parse(kind: Any, value: object) -> Any:
    """The value as `kind`, or None where it is not one."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if kind is bool:
        word = str(value).lower()
        return True if word in _TRUE else False if word in _FALSE else None
    if isinstance(value, bool):
        return None
    if kind is str:
        return value if isinstance(value, str) else str(value) if isinstance(value, int | float) else None
    if not isinstance(value, str | int | float) or (kind is int and isinstance(value, float)):
        return None
    try:
        number = kind(value)
    except ValueError:
        return None
    return number if number == number and abs(number) != float("inf") else None


def _require(condition: bool, name: str, must: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must {must}, got {got!r}.")


def _is_required(field: dataclasses.Field[Any], values: dict[str, Any]) -> bool:
    return field.default is dataclasses.MISSING and field.name not in values


def _hint(key: str) -> Any:
    return get_type_hints(RunConfig)[key]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(kind for kind in get_args(hint) if kind is not type(None))


def _is_bool(key: str) -> bool:
    return key in RunConfig.__annotations__ and _hint(key) is bool


def _type_name(hint: Any) -> str:
    kind = _without_none(hint)
    if get_origin(kind) is Literal:
        name = " or ".join(get_args(kind))
    else:
        name = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    return name if kind is hint else f"{name} (or null)"


def _plural(items: Sequence[object], noun: str) -> str:
    return noun if len(items) == 1 else f"{noun}s"
