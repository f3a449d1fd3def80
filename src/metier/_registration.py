"""Register our methods with PEFT as soon as both are imported, in whichever order, without importing PEFT ourselves.

`import metier` has to stay light, and PEFT brings torch and transformers along. So metier leaves a finder on
`sys.meta_path` that waits for `peft`, lets the ordinary machinery import it, and then imports our methods. Where PEFT
is there already, they are registered at once.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_METHODS = (
    "metier.methods.esft",
    "metier.methods.expert_lora",
    "metier.methods.meft",
    "metier.methods.ladder",
    "metier.methods.mixlora",
    "metier.methods.bottleneck",
    "metier.methods.prefix",
    "metier.methods.hybrid",
    "metier.methods.sparse_delta",
)


def register_with_peft() -> None:
    """Register now if PEFT is imported, else when it is."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    for name in _METHODS:
        importlib.import_module(name)


class _PeftFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        # aside for the question to the others, not for good: accelerate only asks whether PEFT is there
        sys.meta_path.remove(self)
        try:
            spec = find_spec("peft")
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # PEFT imports bitsandbytes where it is installed, which then says in every process that it lacks a kernel for
        # generation
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PeftFinder)]
        # everything after the import of peft sees its ordinary loader again
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _register()
