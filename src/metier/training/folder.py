"""The run folder: where each thing lies, and what may be written into one that is there already."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from metier.config import RunConfig
from metier.config_reading import load_run_config
from metier.errors import RunError
from metier.methods.wrap import ROWS_FOLDER
from metier.routing.profile_files import TENSORS_FILE
from metier.routing.routing_profile import RoutingProfile

MAY_DIFFER_ON_RESUME = {
    "resume_from_checkpoint", "report_to", "logging_steps", "save_steps", "save_total_limit", "output_dir",
    "base_store", "base_folder", "fsdp",
}  # fmt: skip
"""Keys that do not change what a step computes."""

_PACKAGES = ("metier", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run's folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "run.yaml"

    @property
    def selection(self) -> Path:
        return self.root / "selection.json"

    def routing_profile(self) -> RoutingProfile | None:
        """That by which the run selected its experts; None where it selected none by one."""
        return RoutingProfile.load(self.root) if (self.root / TENSORS_FILE).exists() else None

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def key_expert_tokens(self) -> Path:
        """How many tokens each Key-Expert of a sparse adapter had."""
        return self.root / "key_expert_tokens.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def rows(self) -> Path:
        """Rows of a sparse adapter on disk, while the run goes on."""
        return self.root / ROWS_FOLDER

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


def open_folder(config: RunConfig) -> RunFolder:
    """Make the folder of a new run, or open that of a run that is resumed.

    Raises:
        RunError: a new run would overwrite an earlier one, or a resumed one is configured otherwise than before.
    """
    folder = RunFolder(Path(config.output_dir))
    if config.resume_from_checkpoint is None:
        if folder.config.exists():
            raise RunError(
                f"{folder.root}: holds a run already. Choose another output_dir, remove the folder, or go on "
                "with it by --resume_from_checkpoint last."
            )
        folder.root.mkdir(parents=True, exist_ok=True)
        # whole or not at all: a run may be killed at any moment
        half = folder.root / ".run.yaml"
        half.write_text(_header() + config.to_yaml(), encoding="utf-8")
        half.replace(folder.config)
        return folder
    if not folder.config.exists():
        raise RunError(f"{folder.root}: there is no run.yaml, so no run to resume. Check output_dir.")
    before, now = asdict(load_run_config(folder.config)), asdict(config)
    # the records of a step stay the same, however many a process has at once
    free = MAY_DIFFER_ON_RESUME | ({"per_device_train_batch_size"} if config.global_batch_size is not None else set())
    different = [key for key in now if key not in free and before[key] != now[key]]
    if different:
        listed = "; ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in different)
        raise RunError(
            f"{folder.config}: the run to resume was configured otherwise: {listed}.\n"
            "Resume it as it was, or start a new run in another output_dir."
        )
    return folder


def package_versions() -> dict[str, str]:
    """What a run is made with; a package may run from its source without being installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "(not installed as a package)"
    return found


def _header() -> str:
    """The versions that a run was made with, as comments: the file itself is a configuration to run again."""
    packages = [f"# {package} {found}" for package, found in package_versions().items()]
    return "\n".join([f"# python {platform.python_version()}, {platform.platform()}", *packages]) + "\n"
