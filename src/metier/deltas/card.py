"""The README.md beside a delta and in a merged model: what it is, on which base, which experts, whose licence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from metier import __version__

Experts = Mapping[int, Sequence[int]]
"""Expert ids by decoder layer."""
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---(?:\n|\Z)", re.DOTALL)


def licence_of(folder: Path) -> str:
    """The licence that the model card in a base's folder names in its front matter, else "unknown"."""
    try:
        found = _FRONT_MATTER.match((folder / "README.md").read_text(encoding="utf-8"))
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return "unknown"
    licence = values.get("license") if isinstance(values, dict) else None
    return licence if isinstance(licence, str) and licence else "unknown"


def delta_card(
    *,
    base: str,
    fingerprint: str | None,
    experts: Experts,
    is_low_rank: bool,
    also_train: Sequence[str],
) -> str:
    """The card of a delta's folder."""
    kind = "LoRA on experts" if is_low_rank else "ESFT delta"
    num_experts = sum(map(len, experts.values()))
    what = f"Rows of {num_experts} routed experts that replace the base's"
    if is_low_rank:
        what = f"Low-rank changes of {num_experts} routed experts, `W + scale * B A`"
    if also_train:
        what += f", and whole modules: {', '.join(also_train)}"
    return f"""{_front_matter(base=base, licence="unknown", library="peft")}
# {kind} of {base}

{what}; nothing else is changed.

- base: `{base}`, fingerprint `{fingerprint}`
- written by metier {__version__}

```python
import metier, peft

model, tokenizer = metier.load("{base}")
model = peft.PeftModel.from_pretrained(model, "this folder")
```

{_table(experts)}
"""


def merged_card(*, base: str, fingerprint: str, delta: str, experts: Experts, licence: str) -> str:
    """The card of a merged model's folder."""
    return f"""{_front_matter(base=base, licence=licence, library="transformers")}
# {base} with an ESFT delta merged in

The base, with the rows of {sum(map(len, experts.values()))} routed experts replaced by the delta's.
Everything else is the base's to the bit. Load it with transformers like any other model.

- base: `{base}`, fingerprint `{fingerprint}`
- delta: `{delta}`
- licence of the base: {licence}
- merged by metier {__version__}

{_table(experts)}
"""


def adapter_merged_card(*, base: str, adapter: str, method: str, licence: str) -> str:
    """The card of a model into which an adapter of another method was merged."""
    return f"""{_front_matter(base=base, licence=licence, library="transformers")}
# {base} with a {method} adapter merged in

Load it with transformers like any other model.

- base: `{base}`
- adapter: `{adapter}`, of PEFT's type {method}
- licence of the base: {licence}
- merged by metier {__version__}
"""


def lora_card(*, base: str, fingerprint: str, delta: str, layout: str, rank: int, changed: Experts) -> str:
    """The card of a delta's folder in the form of a PEFT LoRA."""
    return f"""{_front_matter(base=base, licence="unknown", library="peft")}
# LoRA on experts of {base}

Low-rank changes of {sum(map(len, changed.values()))} routed experts, of rank {rank}, in the layout `{layout}`. Experts
that are not listed are zeros.

- base: `{base}`, fingerprint `{fingerprint}`
- delta: `{delta}`
- exported by metier {__version__}

{_table(changed, "changed experts")}
"""


def _front_matter(*, base: str, licence: str, library: str) -> str:
    values: dict[str, object] = {"library_name": library, "base_model": base, "tags": ["metier", "esft"]}
    if licence != "unknown":
        values["license"] = licence
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _table(experts: Experts, heading: str = "replaced experts") -> str:
    lines = [f"| {layer} | {', '.join(map(str, ids))} |" for layer, ids in sorted(experts.items())]
    return "\n".join([f"| layer | {heading} |", "|---|---|", *lines])
