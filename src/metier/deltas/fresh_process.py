"""Load a base and a delta in a process of their own and write the logits to a file: `python -m` this module.

What a model in memory answers says nothing about what its files hold; a process that knows only the files does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from metier.deltas.probe import logits_of
from metier.errors import DeltaError
from metier.models.load import LoadedModel, load


def logits_in_a_fresh_process(
    base: LoadedModel, delta: Path, tokens_BS: Tensor, *, trust_remote_code: bool = False
) -> Tensor:
    """Logits of `base` with `delta` on it, both loaded from their files by a new Python process.

    Args:
        base: its `source` is loaded again, in the same dtype and on the same device.
        delta: an adapter's folder.
        tokens_BS: int64.

    Returns:
        (B, S, V) in the base's dtype, on the CPU.

    Raises:
        DeltaError: the process failed; its error is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_file({"tokens": tokens_BS.contiguous()}, f"{folder}/tokens.safetensors")
        request = {
            "base": base.source,
            "delta": str(Path(delta).absolute()),
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "device": str(base.model.device),
            "trust_remote_code": trust_remote_code,
            # sums split among another number of threads round otherwise
            "num_threads": torch.get_num_threads(),
            "folder": folder,
        }
        command = [sys.executable, "-m", "metier.deltas.fresh_process", json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DeltaError(f"A fresh process could not load the delta on {base.source!r}: {_error(done.stderr)}")
        return load_file(f"{folder}/logits.safetensors")["logits"]


def _error(stderr: str) -> str:
    """The exception that a traceback ends with, without the traceback."""
    found = list(re.finditer(r"^[\w.]+(?:Error|Exception|Exit|Interrupt)\b.*", stderr, re.MULTILINE))
    return stderr[found[-1].start() :].strip() if found else stderr.strip()[-500:] or "it said nothing"


def _main(argument: str) -> None:
    request = json.loads(argument)
    torch.set_num_threads(request["num_threads"])
    base = load(
        request["base"],
        dtype=request["dtype"],
        device=request["device"],
        trust_remote_code=request["trust_remote_code"],
    )
    model = PeftModel.from_pretrained(base.model, request["delta"])
    tokens_BS = load_file(f"{request['folder']}/tokens.safetensors")["tokens"]
    logits_BSV = logits_of(model, tokens_BS).contiguous()
    save_file({"logits": logits_BSV}, f"{request['folder']}/logits.safetensors")


if __name__ == "__main__":
    _main(sys.argv[1])
