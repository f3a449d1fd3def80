"""Methods for several tasks, trained on one: every record is of task 0, which PEFT would have each call say."""

from __future__ import annotations

from functools import wraps
from typing import Any

import peft
import torch

WITH_TASKS = ("MULTITASK_PROMPT_TUNING", "POLY")
"""By PEFT's names."""


def with_one_task(model: peft.PeftModel) -> peft.PeftModel:
    """The same model, whose `forward` and `generate` have a task for each row where they are not told any.

    Other models than those for several tasks are left as they are.
    """
    config = model.peft_config[model.active_adapter]
    if str(getattr(config.peft_type, "value", config.peft_type)) not in WITH_TASKS:
        return model
    for name in ("forward", "generate"):
        setattr(model, name, _with_task(getattr(model, name)))
    return model


def _with_task(call: Any) -> Any:
    @wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("task_ids") is None:
            rows = next(
                value
                for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
                if isinstance(value, torch.Tensor)
            )
            kwargs["task_ids"] = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        return call(*args, **kwargs)

    return called
