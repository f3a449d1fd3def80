"""One run: load, select, wrap, train, save. Everything it leaves behind lies in its folder (`folder.py`)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import peft
from rich.console import Console
from torch.utils.serialization import config as serialization
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from metier.config import RunConfig
from metier.data.encode import EncodedSet, Item, encode_records
from metier.data.message import Record
from metier.data.pairs import encode_pairs
from metier.data.records import load_records, mix
from metier.deltas.save import save_delta
from metier.distributed.parting import for_ranks, is_sharded
from metier.distributed.ranks import Ranks, is_restart, join_ranks, largest, on_main, wait_for_all
from metier.memory.allocator import give_memory_back
from metier.memory.frozen_model import load_frozen
from metier.memory.scratch_folder import gone_after_error
from metier.methods.coverage import coverage
from metier.methods.wrap import meft_config, selects_experts, wrap
from metier.models.encoder_decoder import is_encoder_decoder, refuse_encoder_decoder
from metier.models.load import LoadedModel, ignore_renamed_options, load
from metier.models.skeleton import model_config
from metier.planning.fit import changed
from metier.planning.refused import check_run
from metier.planning.state import TrainingPlan, training_plan
from metier.routing.selection import ExpertSelection
from metier.training.apart import check_records_stay_apart
from metier.training.callbacks import (
    CountTokens,
    MetricsLog,
    ShowProgress,
    StepTimes,
)
from metier.training.checkpoints import MarkCheckpoints, find_checkpoint, step_of
from metier.training.cut_short import alone_in, full_disk_told, kept_after_error
from metier.training.distributed_checkpoints import keep_by_ranks
from metier.training.folder import RunFolder, open_folder
from metier.training.foresight import Foresight
from metier.training.masks import batches_to_look_at, pruned
from metier.training.processes import (
    check_world,
    describe,
    load_everywhere,
    lost_peers_told,
    note_world,
    shard_on_cpus,
)
from metier.training.replicas import keep_replicas
from metier.training.report import write_run_report
from metier.training.selecting import run_selection
from metier.training.shards import MeasureShards
from metier.training.store_metrics import CountFrozen, CountRows
from metier.training.telling import (
    peak_beside_foreseen,
    step_beside_foreseen,
    tell_of_padding,
    tell_of_repeats,
    tell_of_slow_bf16,
    tell_of_what_is_foreseen,
)
from metier.training.trainer import make_trainer, remembered
from metier.training.whole import make_whole


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves in memory; the rest is in its folder."""

    folder: Path
    model: PreTrainedModel | peft.PeftModel
    """The trained model, the adapter still on it."""
    tokenizer: PreTrainedTokenizerBase
    plan: TrainingPlan
    selection: ExpertSelection | None
    """None for the baselines, which select nothing."""
    train_seconds: float
    peak_memory_bytes: int


def train(config: RunConfig, *, console: Console | None = None, force: bool = False) -> RunResult:
    """Train as configured.

    Args:
        config: one run; `metier.config_reading.load_run_config` reads it from YAML and a command line.
        console: where the plan and the progress go; standard output by default.
        force: train even what cannot fit into memory.

    Raises:
        RunError: the folder holds another run, there is nothing to resume, or the run does not fit into memory.
        MetierError: any other error of the rooms that a run walks through.
    """
    ranks = join_ranks()
    console = (console or Console()) if ranks.is_main else Console(quiet=True)
    ignore_renamed_options()
    check_run(config)
    whole, config = config, for_ranks(config, ranks)
    base = model_config(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    foresight = Foresight(config, base, force=force, ranks=ranks, is_sharded=is_sharded(config))
    on_main(foresight.before_loading)
    folder, config, checkpoint = on_main(lambda: _opened(whole, config, ranks))
    with ExitStack() as until_end, full_disk_told(folder):
        on_main(lambda: until_end.enter_context(alone_in(folder)))
        return _trained(config, folder, checkpoint, foresight, ranks, console)


def _trained(
    config: RunConfig,
    folder: RunFolder,
    checkpoint: Path | None,
    foresight: Foresight,
    ranks: Ranks,
    console: Console,
) -> RunResult:
    """A run whose folder is open: from its base to its report."""
    if config.resume_from_checkpoint is not None:
        console.print(f"Resuming from {checkpoint or 'the beginning: there is no complete checkpoint yet'}")
    if ranks.are_several:
        console.print(describe(config, ranks), highlight=False)
        if told := load_everywhere(config):
            console.print(told, style="yellow")
    loaded = load_base(config)
    tell_of_slow_bf16(loaded.model, config, console)
    if config.padding_free:
        refuse_encoder_decoder(loaded.model, "padding_free", "Set padding_free: false; its batches are padded.")
    records = load_records(config.dataset)
    items = _encode(_with_general(records, config), loaded, config, console)
    eval_items = None
    if config.eval_dataset is not None:
        eval_items = _encode(load_records(config.eval_dataset), loaded, config, console)
    selection = None
    if selects_experts(config):
        selection = run_selection(loaded.model, loaded.tokenizer, records, config, folder)
    foreseen = on_main(
        lambda: foresight.before_training(
            items.items,
            None if selection is None else folder.selection,
            folder.routing_profile(),
            steps_done=0 if checkpoint is None else step_of(checkpoint),
        )
    )
    tell_of_what_is_foreseen(foreseen, console)
    if foresight.warning:
        console.print(foresight.warning, style="yellow")
    set_seed(config.seed)
    looked_at = batches_to_look_at(items.items, loaded.tokenizer, config)
    with gone_after_error(folder.rows):
        model = wrap(loaded.model, config, selection, looked_at, checkpoint)
        plan = training_plan(
            model,
            method=config.method,
            selection=selection,
            row_state_dtype=config.meft_state_dtype,
            options=config.method_options,
        )
        if ranks.is_main:
            plan.save(folder.plan, foreseen)
        if config.method == "meft":
            names = ("num_key_experts", "num_active_key_experts", "top_k")
            given = [name for name in names if getattr(config, f"meft_{name}") is not None]
            console.print("\n".join(meft_config(config).sizes.reasons(given)), highlight=False)
        console.print(plan)
        if isinstance(model, peft.PeftModel):
            console.print(f"Covered: {'; '.join(map(str, coverage(model)))}", highlight=False)
        if config.padding_free and checkpoint is None:
            # a run that goes on was looked at when it began, and has its numbers only when the trainer loads them
            check_records_stay_apart(model, items.items)
        if not config.padding_free and not is_encoder_decoder(model):
            tell_of_padding(items, config, console)
        tell_of_repeats(len(items.items), config, ranks.size, console)
        times, shards = StepTimes(), MeasureShards(console)
        put_back = remembered(model)
        trainer = make_trainer(
            model,
            loaded.tokenizer,
            items.items,
            config,
            folder.checkpoints,
            eval_items=None if eval_items is None else eval_items.items,
            callbacks=[
                CountTokens(num_passes=config.num_forward_passes),
                *([CountRows(folder.key_expert_tokens if ranks.is_main else None)] if config.method == "meft" else []),
                *([CountFrozen()] if config.has_frozen_base else []),
                *([shards] if is_sharded(config) else []),
                times,
                MetricsLog(folder.metrics, times, foreseen),
                ShowProgress(console, config.method),
                MarkCheckpoints(config.save_total_limit, lambda made: note_world(made, config, ranks)),
            ],
        )
        if is_sharded(config):
            shard_on_cpus(trainer)
        keep_replicas(trainer)
        keep_by_ranks(trainer, checkpoint)
        started = time.monotonic()
        # a checkpoint may be larger than memory where rows lie on disk: it is mapped, not read
        mapped = serialization.patch("load.mmap", True)  # type: ignore[attr-defined]
        with mapped, lost_peers_told(folder), kept_after_error(trainer, folder):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds, peak = time.monotonic() - started, int(largest(foresight.peak_memory_bytes()))
    make_whole(model)
    put_back()
    model = pruned(model, config)
    if ranks.is_main:
        _save(model, loaded.tokenizer, folder)
        # the adapter has them all
        shutil.rmtree(folder.rows, ignore_errors=True)
        measured = {"train_seconds": seconds, "step_seconds": times.usual, "peak_memory_bytes": peak}
        plan.save(folder.plan, foreseen, measured | (shards.measured if is_sharded(config) else {}))
        write_run_report(folder, config, selection, num_parameters=plan.num_trained + plan.num_frozen)
    wait_for_all()
    console.print(peak_beside_foreseen(peak, foreseen))
    console.print(step_beside_foreseen(times.usual, foreseen))
    console.print(f"Trained in {seconds:.0f} s; the delta is {folder.adapter}, the report {folder.report}")
    return RunResult(folder.root, model, loaded.tokenizer, plan, selection, seconds, peak)


def _opened(whole: RunConfig, config: RunConfig, ranks: Ranks) -> tuple[RunFolder, RunConfig, Path | None]:
    """The run's folder, and the checkpoint from which it goes on; a run that torchrun has started again goes on too."""
    if is_restart() and config.resume_from_checkpoint is None and RunFolder(Path(config.output_dir)).config.exists():
        again = {"resume_from_checkpoint": "last"}
        whole, config = changed(whole, again), changed(config, again)
    folder = open_folder(whole)
    if config.resume_from_checkpoint is None:
        return folder, config, None
    checkpoint = find_checkpoint(folder.checkpoints, config.resume_from_checkpoint)
    if checkpoint is not None:
        check_world(checkpoint, config, ranks)
    return folder, config, checkpoint


def load_base(config: RunConfig) -> LoadedModel:
    """The base and its tokenizer, its large weights in a store of their own if the run wants that.

    Raises:
        MetierError: as `metier.load` and `metier.load_frozen`.
    """
    if config.base_store == "disk":
        # memory is what is short
        give_memory_back()
    if not config.has_frozen_base:
        return load(
            config.model, dtype=config.dtype, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    return load_frozen(
        config.model,
        store=config.base_store,
        weight_format=config.base_format,
        folder=config.base_folder,
        dtype=config.dtype,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def _with_general(records: list[Record], config: RunConfig) -> list[Record]:
    if config.general_dataset is None:
        return records
    return mix(records, load_records(config.general_dataset), config.general_ratio, config.seed)


def encode_for(loaded: LoadedModel, records: Sequence[Record], config: RunConfig) -> EncodedSet[Item]:
    """Records as the model is trained on them: conversations, or an encoder-decoder's pairs."""
    if is_encoder_decoder(loaded.model):
        return encode_pairs(records, loaded.tokenizer, max_length=config.max_length)
    return encode_records(records, loaded.tokenizer, max_length=config.max_length)


def _encode(records: Sequence[Record], loaded: LoadedModel, config: RunConfig, console: Console) -> EncodedSet[Item]:
    encoded = encode_for(loaded, records, config)
    console.print(
        f"{len(encoded.items):,} records, {encoded.num_trained_tokens:,} of {encoded.num_tokens:,} tokens have a loss"
    )
    if report := encoded.report():
        console.print(report, style="yellow")
    return encoded


def _save(model: PreTrainedModel | peft.PeftModel, tokenizer: PreTrainedTokenizerBase, folder: RunFolder) -> None:
    """A delta in the base's dtype, another adapter as PEFT writes it, and full fine-tuning's whole model."""
    if isinstance(model, peft.PeftModel) and model.peft_config["default"].peft_type in ("ESFT", "EXPERT_LORA"):
        save_delta(model, folder.adapter)
        return
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(folder.adapter)
    else:
        # the class's: checkpoints are saved in another layout (trainer.py)
        type(model).save_pretrained(model, folder.adapter)
        tokenizer.save_pretrained(folder.adapter)
