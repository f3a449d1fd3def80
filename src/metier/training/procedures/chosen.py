"""What of a trainer a method changes: optimizer, arguments, callbacks, and how it computes a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainerCallback
from transformers.utils import is_galore_torch_available

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.errors import ConfigError
from metier.memory import RowAdamW
from metier.methods.added_terms import Term, added_term
from metier.training.procedures.adalora import AllocateRanks
from metier.training.procedures.lisa import Lisa
from metier.training.procedures.mezo import Mezo, measure_by_forward_passes
from metier.training.procedures.row_clipping import clip_rows_in_parts


@dataclass(slots=True)
class Procedure:
    """Changes of a trainer; a field that is empty leaves it as it is."""

    optimizer: Optimizer | None = None
    optimizer_class: tuple[type[Optimizer], dict[str, Any]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: list[TrainerCallback] = field(default_factory=list)
    after: Callable[[Trainer], None] | None = None
    """Called with the trainer when it is made."""
    has_own_loss: bool = False
    """Whether the model's own loss is what is trained on, and not that of the labelled positions alone."""


def procedure_of(config: RunConfig, model: nn.Module) -> Procedure:
    """How the run's method is trained.

    Raises:
        ConfigError: an option of the procedure that it cannot have, or a package that it needs and that is missing.
    """
    method = method_of(config.method)
    options = config.procedure_options
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    match method.optimizer:
        case None:
            if config.method == "meft":
                return Procedure(optimizer_class=_row_optimizer(config), after=clip_rows_in_parts)
            return Procedure()
        case "adalora":
            assert isinstance(model, PeftModel), "AdaLoRA is an adapter"
            return Procedure(callbacks=[AllocateRanks()], after=adding(method.name))
        case "lora_plus":
            assert isinstance(model, PeftModel), "LoRA+ is an adapter"
            return Procedure(
                optimizer=create_loraplus_optimizer(
                    model, AdamW, lr=config.learning_rate, loraplus_weight_decay=config.weight_decay, **options
                )
            )
        case "lora_fa":
            assert isinstance(model, PeftModel), "LoRA-FA is an adapter"
            adapter = model.peft_config["default"]
            scale = {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "use_rslora": adapter.use_rslora}
            return Procedure(optimizer=create_lorafa_optimizer(model, **scale, **rates))
        case "galore":
            decay = config.weight_decay
            return Procedure(arguments=_galore(options), after=lambda trainer: _decay_galore(trainer, decay))
        case "mezo":
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = Mezo(trained, **rates, epsilon=options["mezo_epsilon"], seed=config.seed)
            directions, decay = options["mezo_directions"], config.weight_decay

            def prepared(trainer: Trainer) -> None:
                if decay:
                    _decay_as_usual(trainer, optimizer, decay)
                measure_by_forward_passes(trainer, directions)

            return Procedure(optimizer=optimizer, after=prepared)
        case "lisa":
            lisa = Lisa(num_layers=options["lisa_layers"], interval=options["lisa_interval"], seed=config.seed)
            return Procedure(callbacks=[lisa])
        case "auxiliary_loss" | "diff_pruning":
            return Procedure(after=adding(method.name))
        case "own_loss":
            return Procedure(after=use_own_loss, has_own_loss=True)
    raise AssertionError(f"{method.name}: no procedure is called {method.optimizer!r}")


def use_own_loss(trainer: Trainer) -> None:
    """Train on the loss that the model computes from its labels."""

    def compute_loss(
        model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, use_cache=False)
        # the trainer divides by the number of batches only where it does not count items
        loss = outputs.loss / (trainer.current_gradient_accumulation_steps if model.training else 1)
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss


def adding(method: str) -> Callable[[Trainer], None]:
    """What has a trainer add the method's term to its loss."""
    term = added_term(method)
    assert term is not None, f"{method} has none"
    return partial(add_to_loss, term=term)


def add_to_loss(trainer: Trainer, *, term: Term) -> None:
    """Add a term of the adapter's tuner, such as that its routers share out their tokens.

    It is a mean over a batch, so that over several batches of a step it is their mean.
    """
    plain = trainer.compute_loss

    def compute_loss(
        model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = plain(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return found
        tuner: Any = trainer.accelerator.unwrap_model(model).base_model
        added = term(tuner) / trainer.current_gradient_accumulation_steps
        return (found[0] + added, found[1]) if return_outputs else found + added

    trainer.compute_loss = compute_loss


def _galore(options: dict[str, Any]) -> dict[str, Any]:
    if not is_galore_torch_available():
        raise ConfigError("galore: the package galore-torch is missing. Install it: pip install 'metier[galore]'.")
    return {
        "optim": "galore_adamw",
        # matrices of the decoder layers; the others have AdamW
        "optim_target_modules": [r".*layers\.\d+\..*(attn|mlp|feed_forward|experts).*"],
        "optim_args": ", ".join(f"{name}={value}" for name, value in options.items()),
    }


def _decay_galore(trainer: Trainer, weight_decay: float) -> None:
    """Have GaLore's optimizer decay weights as any other does; transformers makes its groups without."""
    create = trainer.create_optimizer

    def created(*args: Any, **options: Any) -> Optimizer:
        optimizer: Optimizer = create(*args, **options)
        _decay_as_usual(trainer, optimizer, weight_decay)
        return optimizer

    trainer.create_optimizer = created


def _decay_as_usual(trainer: Trainer, optimizer: Optimizer, weight_decay: float) -> None:
    """Have an optimizer decay what the trainer's own would: all but biases and norms."""
    names = set(trainer.get_decay_parameter_names(trainer.model))
    decayed = {id(parameter) for name, parameter in trainer.model.named_parameters() if name in names}
    parted = []
    for group in optimizer.param_groups:
        for is_decayed in (True, False):
            params = [parameter for parameter in group["params"] if (id(parameter) in decayed) is is_decayed]
            if params:
                parted.append({**group, "params": params, "weight_decay": weight_decay if is_decayed else 0.0})
    optimizer.param_groups[:] = parted


def _row_optimizer(config: RunConfig) -> tuple[type[Optimizer], dict[str, Any]]:
    """The optimizer of rows in stores, with the numbers that transformers gives AdamW; groups set the weight decay."""
    options = {
        "lr": config.learning_rate,
        "mode": config.meft_update,
        "state_dtype": config.meft_state_dtype,
        "seed": config.seed,
    }
    return RowAdamW, options
