"""What a run refuses before anything is loaded, asked by its plan and by the run itself."""

from __future__ import annotations

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.errors import ConfigError
from metier.methods.wrap import meft_config, selects_experts
from metier.routing.configured import selection_config

_LEAST: dict[str, float] = {
    "mezo_directions": 1, "lisa_layers": 1, "lisa_interval": 1, "rank": 1, "update_proj_gap": 1, "mask_records": 1,
}  # fmt: skip
_POSITIVE = ("mezo_epsilon", "scale", "loraplus_lr_ratio")


def check_run(config: RunConfig) -> None:
    """Raise a ConfigError for options that are out of range, or do not go together."""
    if selects_experts(config):
        selection_config(config)
    if config.method == "meft":
        meft_config(config)
    for name, value in config.procedure_options.items():
        if name in _LEAST and value < _LEAST[name]:
            raise ConfigError(f"{name}: must be at least {_LEAST[name]:g}, got {value}.")
        if name in _POSITIVE and not value > 0:
            raise ConfigError(f"{name}: must be greater than 0, got {value}.")
        if name == "density" and not 0 < value <= 1:
            raise ConfigError(f"density: must be in (0, 1], got {value}.")
    if config.padding_free and method_of(config.method).is_prompt:
        raise ConfigError(
            f"padding_free: records that share a row have one beginning, before which {config.method} would put its "
            "prompt. Set padding_free: false."
        )
