"""Logits of saved models in fresh processes, without paying for the imports each time.

Run as a program it imports transformers once, then forks a new process for every job that it reads; the fork has seen
no model before and, until it loads a delta, no metier. `FreshProcesses` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class FreshProcesses:
    """Start with `with`; each call of `logits` runs in a process of its own."""

    def __enter__(self) -> FreshProcesses:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._jobs, self._answers = self._server.stdin, self._server.stdout
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._jobs.close()
        self._server.wait()
        self._answers.close()

    def logits(self, model: Path, tokens: Path, *, adapter: Path | None = None) -> Tensor:
        """Of the base in `model` with the delta in `adapter`; without one, of what plain transformers loads."""
        out = tokens.with_suffix(".logits")
        job = {"model": str(model), "tokens": str(tokens), "adapter": adapter and str(adapter), "out": str(out)}
        print(json.dumps(job), file=self._jobs, flush=True)
        answer = json.loads(self._answers.readline() or '"the server died"')
        if answer is not None:
            raise RuntimeError(f"in a fresh process: {answer}")
        result: Tensor = torch.load(out)
        return result


def _serve() -> None:
    import peft  # noqa: F401  (imported once for all forks)
    import transformers

    assert "metier" not in sys.modules, "a fresh process must not know metier"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.dup2(2, 1)  # stdout is for answers
            os.write(writer, json.dumps(_error_of(job)).encode())
            os._exit(0)
        os.close(writer)
        os.wait()
        with os.fdopen(reader) as answer:
            print(answer.read() or '"the process died"', flush=True)


def _error_of(job: dict[str, Any]) -> str | None:
    try:
        _run(job)
    except Exception:
        return traceback.format_exc(limit=-3)[-3000:]
    return None


def _run(job: dict[str, Any]) -> None:
    import transformers

    if job["adapter"] is None:
        config = transformers.AutoConfig.from_pretrained(job["model"])
        network_class = getattr(transformers, config.architectures[0])
        model, info = network_class.from_pretrained(job["model"], output_loading_info=True)
        left = [*info["missing_keys"], *info["unexpected_keys"]]
        assert left == [], f"missing or unexpected: {left}"
        assert "metier" not in sys.modules, "plain transformers"
    else:
        from peft import PeftModel

        import metier

        model = PeftModel.from_pretrained(metier.load(job["model"]).model, job["adapter"])
    with torch.no_grad():
        torch.save(model.eval()(**torch.load(job["tokens"])).logits, job["out"])


if __name__ == "__main__":
    _serve()
