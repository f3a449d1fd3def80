"""A step that was traced without numbers, from one layer of each kind, takes what the trainer's own step takes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensor

from measured_step import measured
from metier.config import RunConfig
from metier.errors import UnsupportedModelError
from metier.memory.frozen_model import load_frozen
from metier.planning.from_config import run_skeleton
from metier.planning.segments import Segment, StepTrace
from metier.planning.step import Batch, trace_step
from metier.planning.trace import Memory, Operations
from planning.known_configs import KNOWN_CONFIGS
from tiny_models import tiny_model, tiny_tokenizer

BATCH = Batch(3, 128, 0.05)
NUM_LAYERS = 8
ROUNDING = 2e-4
"""Masks of a few hundred bytes that the trainer makes outside of the step, and the metrics' own numbers."""
FIRED = 0.01
"""Which rows of a sparse adapter fire is drawn at random, and by numbers in the trainer."""
CAST_AGAIN = 0.015
"""With bf16 and checkpointing: weights that autocast casts for the second forward pass of a layer live a little longer."""
CAST_AGAIN_IN_LAYERS = 0.06
"""The same where the peak is in a layer and not in the loss, in a model whose weights are as large as its activations."""


def _config(method: str, folder: Path, *, checkpointing: bool, bf16: bool = False) -> RunConfig:
    return RunConfig(
        model="m",
        dataset="d",
        output_dir=str(folder),
        method=method,
        **({"lora_r": 4} if "lora" in method else {}),
        **({"meft_r": 256} if method == "meft" else {}),
        dtype="float32",
        gradient_checkpointing=checkpointing,
        bf16=bf16,
        select_top_k=2 if method in ("esft", "expert_lora") else None,
        per_device_train_batch_size=BATCH.num_rows,
    )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "method"), [("llama", "meft"), ("olmoe", "meft")])
def test_the_peak_of_a_sparse_adapter_is_the_trainers_up_to_which_rows_fire(family, method, checkpointing, tmp_path):
    """Where its layers have the peak, and not the room that TRL makes for logits."""
    config = _config(method, tmp_path, checkpointing=checkpointing)
    base = tiny_model(family, num_hidden_layers=NUM_LAYERS)
    skeleton = run_skeleton(config, base.config)
    trace = trace_step(config, skeleton, BATCH)
    peak, _ = measured(base, config, skeleton.selection, BATCH)
    assert trace.peak_bytes == pytest.approx(peak, rel=FIRED)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("deepseek_v2", "esft"),
        ("deepseek_v2", "expert_lora"),
        ("deepseek_v2", "lora"),
        ("olmoe", "esft"),
        ("olmoe", "full"),
        ("gpt_oss", "expert_lora"),
        ("gpt_oss", "full"),
        ("llama", "lora"),
        ("llama", "full"),
        ("llama", "meft"),
        ("olmoe", "meft"),
    ],
)
def test_peak_and_operations_are_the_trainers(family, method, checkpointing, tmp_path):
    config = _config(method, tmp_path, checkpointing=checkpointing)
    skeleton = run_skeleton(config, tiny_model(family, num_hidden_layers=NUM_LAYERS).config)
    is_reserved = method == "meft"
    trace = trace_step(config, skeleton, BATCH, is_reserved=is_reserved)
    assert len(set(trace.stands_for)) < NUM_LAYERS
    trained = tiny_model(family, num_hidden_layers=NUM_LAYERS)
    peak, operations = measured(trained, config, skeleton.selection, BATCH, is_reserved=is_reserved)
    assert trace.peak_bytes == pytest.approx(peak, rel=ROUNDING)
    flops = trace.flops("forward") + trace.flops("backward")
    # one layer's random routes stand for the others', which have as many pairs but not the same of trained experts
    assert flops == pytest.approx(operations.flops, rel=0 if method in ("lora", "full") else 0.01)
    moved = trace.bytes_moved("forward") + trace.bytes_moved("backward")
    assert moved == pytest.approx(operations.bytes_moved, rel=5e-3)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("checkpointing", "is_reserved", "tolerance"),
    [(False, False, ROUNDING), (True, True, CAST_AGAIN), (True, False, CAST_AGAIN_IN_LAYERS)],
)
@pytest.mark.parametrize(("family", "method"), [("deepseek_v2", "esft"), ("llama", "full")])
def test_in_mixed_precision_too(family, method, checkpointing, is_reserved, tolerance, tmp_path):
    sizes = {"num_hidden_layers": 5, "hidden_size": 64} | ({} if family == "llama" else {"moe_intermediate_size": 32})
    config = _config(method, tmp_path, checkpointing=checkpointing, bf16=True)
    base = tiny_model(family, **sizes)
    skeleton = run_skeleton(config, base.config)
    trace = trace_step(config, skeleton, BATCH, is_reserved=is_reserved)
    peak, _ = measured(base, config, skeleton.selection, BATCH, is_reserved=is_reserved)
    assert trace.peak_bytes == pytest.approx(peak, rel=tolerance)
    plain = _config(method, tmp_path, checkpointing=checkpointing)
    in_float32 = trace_step(plain, run_skeleton(plain, base.config), BATCH, is_reserved=is_reserved)
    assert trace.peak_bytes < (0.95 if is_reserved else 0.97) * in_float32.peak_bytes


def test_what_is_left_at_the_end_are_the_gradients(tmp_path):
    config = _config("full", tmp_path, checkpointing=False)
    skeleton = run_skeleton(config, tiny_model("llama", num_hidden_layers=NUM_LAYERS).config)
    gradient_bytes = skeleton.state(config).gradient_bytes
    trace = trace_step(config, skeleton, BATCH)
    inputs = 3 * BATCH.num_rows * BATCH.num_tokens * 8
    assert gradient_bytes <= trace.kept_bytes <= gradient_bytes + inputs


def test_more_rows_take_more_and_checkpointing_takes_less(tmp_path):
    base = tiny_model("deepseek_v2", num_hidden_layers=NUM_LAYERS).config
    peaks = {}
    for name, rows, checkpointing in (("plain", 3, False), ("more rows", 6, False), ("checkpointing", 3, True)):
        config = _config("esft", tmp_path, checkpointing=checkpointing)
        peaks[name] = trace_step(config, run_skeleton(config, base), Batch(rows, 128, 0.05)).peak_bytes
    assert 1.9 < peaks["more rows"] / peaks["plain"] < 2.1
    assert peaks["checkpointing"] < 0.6 * peaks["plain"]


def test_many_layers_are_traced_as_fast_as_few(tmp_path):
    """No layer but a few is called: a hundred more cost nothing and are counted all the same."""
    config = _config("lora", tmp_path, checkpointing=True)
    few, many = (
        trace_step(config, run_skeleton(config, tiny_model("llama", num_hidden_layers=n).config), BATCH)
        for n in (8, 108)
    )
    assert len(set(many.stands_for)) == len(set(few.stands_for)) == 4
    a_layer = few.segments[-3].operations.flops
    assert many.flops("backward") - few.flops("backward") == 100 * a_layer


def test_what_the_system_finds_pages_for_is_what_is_large_and_what_is_more_than_before(tmp_path):
    def segment(layer: int, fresh: int) -> Segment:
        return Segment("forward", layer, 0, 0, fresh_bytes=fresh, operations=Operations())

    assert StepTrace((segment(0, 3), segment(1, 4)), stands_for=(0, 1, 1)).fresh_bytes == 3 + 2 * 4
    # from a step of a real model: its activations at least, which no earlier step has left room for
    base = tiny_model("llama", num_hidden_layers=NUM_LAYERS).config
    config = _config("lora", tmp_path, checkpointing=False)
    trace = trace_step(config, run_skeleton(config, base), BATCH)
    assert 0.5 * trace.peak().kept_bytes < trace.fresh_bytes < 2 * trace.peak_bytes


def test_what_a_batch_has_in_common_cannot_be_traced(tmp_path):
    config = dataclasses.replace(_config("meft", tmp_path, checkpointing=False), meft_semantics="union")
    skeleton = run_skeleton(config, tiny_model("llama").config)
    with pytest.raises(UnsupportedModelError, match="a sparse adapter with meft_semantics: union cannot be traced"):
        trace_step(config, skeleton, BATCH)


def test_a_model_whose_code_wants_numbers_is_said_to_be_untraceable(tmp_path, monkeypatch):
    def forward(self, hidden):
        return hidden * float(hidden.sum())

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    config = _config("full", tmp_path, checkpointing=False)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: its step cannot be traced \("):
        trace_step(config, run_skeleton(config, tiny_model("llama").config), BATCH)


def test_segments_are_put_together_in_the_order_of_a_step():
    def segment(phase: str, layer: int | None, kept: int, peak: int) -> Segment:
        return Segment(phase, layer, kept, peak, fresh_bytes=0, operations=Operations())

    trace = StepTrace(
        (
            segment("forward", None, 1, 1),
            segment("forward", 0, 10, 30),
            segment("forward", 1, 20, 25),
            segment("forward", None, 3, 50),
            segment("backward", 1, -18, 10),
            segment("backward", 0, -5, 2),
            segment("backward", None, -1, 0),
        ),
        stands_for=(0, 1, 1),
    )
    assert [(s.phase, s.layer) for s in trace.repeated()] == [
        ("forward", None), ("forward", 0), ("forward", 1), ("forward", None), ("forward", 1), ("forward", None),
        ("backward", 1), ("backward", 1), ("backward", 0), ("backward", None),
    ]  # fmt: skip
    # 1 + 10 + 20 + 3 + 20, then the head's 50 beside them
    assert trace.peak_bytes == 54 + 50
    assert trace.peak().kept_bytes == 54
    assert trace.kept_bytes == 57 - 18 - 18 - 6


def test_room_for_logits_that_are_not_written_counts_where_memory_is_reserved(tmp_path):
    base = tiny_model("llama").config
    config = _config("lora", tmp_path, checkpointing=False)
    peaks = [
        trace_step(config, run_skeleton(config, base), BATCH, is_reserved=is_reserved).peak_bytes
        for is_reserved in (False, True)
    ]
    num_labelled = BATCH.num_rows * round(BATCH.labelled_share * BATCH.num_tokens)
    unwritten = num_labelled * (32_768 - base.vocab_size) * 4
    # without them the peak is elsewhere
    assert 0.9 * unwritten < peaks[1] - peaks[0] <= unwritten


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", ["padded", "shared"])
@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("deepseek_v2", "esft"), ("olmoe", "lora")])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_what_a_mask_of_padding_or_of_other_records_takes_is_the_trainers(
    family, method, rows, checkpointing, tmp_path
):
    """With few heads of keys and values, which a mask has torch repeat for every head of queries."""
    batch = Batch(3, 128, 0.5, rows)
    config = _config(method, tmp_path, checkpointing=checkpointing)
    config = dataclasses.replace(config, padding_free=rows == "shared", max_length=128)
    sizes = {"num_hidden_layers": NUM_LAYERS} | ({} if family == "deepseek_v2" else {"num_key_value_heads": 1})
    skeleton = run_skeleton(config, tiny_model(family, **sizes).config)
    trace = trace_step(config, skeleton, batch)
    peak, operations = measured(tiny_model(family, **sizes), config, skeleton.selection, batch)
    # half of the records have a label less, for the token before is another one's
    assert trace.peak_bytes == pytest.approx(peak, rel=0.01)
    kinds = {work.kind for work in operations.works}
    assert {work.kind for work in trace.operations().works} >= {kind for kind in kinds if "attention" in kind}
    whole = trace_step(config, run_skeleton(config, tiny_model(family, **sizes).config), Batch(3, 128, 0.5))
    assert (trace.peak_bytes > 1.01 * whole.peak_bytes) or checkpointing


@pytest.mark.parametrize("base_format", ["int8", "nf4"])
@pytest.mark.parametrize(("family", "method", "rel"), [("llama", "lora", ROUNDING), ("olmoe", "lora", ROUNDING),
                                                       ("olmoe", "esft", 0.1)])  # fmt: skip
def test_frozen_weights_that_are_read_back_from_fewer_bits_count(family, method, rel, base_format, tmp_path):
    """Of experts those that have rows are read, which are not the same in the trace."""
    if base_format == "nf4":
        pytest.importorskip("bitsandbytes")
    base = tiny_model(family, num_hidden_layers=4, hidden_size=128, intermediate_size=256)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = dataclasses.replace(
        _config(method, tmp_path, checkpointing=False),
        base_format=base_format,
        targets="attention" if method == "lora" else None,
    )
    batch = Batch(1, 16, 0.5)
    skeleton = run_skeleton(config, base.config)
    trace = trace_step(config, skeleton, batch)
    stored = load_frozen(tmp_path / "base", store="device", weight_format=base_format, dtype="float32").model
    peak, _ = measured(stored, config, skeleton.selection, batch)
    assert trace.peak_bytes == pytest.approx(peak, rel=rel)
    plain = dataclasses.replace(config, base_format=None)
    assert trace.peak_bytes > 1.05 * trace_step(plain, run_skeleton(plain, base.config), batch).peak_bytes


@pytest.mark.slow
def test_a_step_of_671_billion_parameters_is_traced_in_seconds(tmp_path):
    """Ten or so on two cores alone; with others on them some times as long."""
    config = dataclasses.replace(_config("esft", tmp_path, checkpointing=False), dtype="bfloat16", max_length=4096)
    skeleton = run_skeleton(config, KNOWN_CONFIGS["DeepSeek-V3"]())
    started = time.process_time()
    trace = trace_step(config, skeleton, Batch(1, 4096, 0.5))
    assert time.process_time() - started < 40
    assert len(trace.stands_for) == 61


@pytest.mark.parametrize("rows", ["padded", "shared"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "olmoe"])
def test_masks_of_long_batches_have_no_numbers(family, rows, tmp_path, monkeypatch):
    """One of four rows of 16,384 tokens has a billion of them."""
    most, plain = [0], Memory.made

    def made(memory, tensor):
        if not isinstance(tensor, FakeTensor):
            most[0] = max(most[0], tensor.untyped_storage().nbytes())
        plain(memory, tensor)

    monkeypatch.setattr(Memory, "made", made)
    config = dataclasses.replace(_config("lora", tmp_path, checkpointing=False), padding_free=rows == "shared")
    batch = Batch(4, 16_384, 0.1, rows)
    trace = trace_step(config, run_skeleton(config, tiny_model(family, max_position_embeddings=16_384).config), batch)
    assert most[0] < 32 << 20
    # each layer keeps one in float32
    assert trace.peak_bytes > 2 * 4 * 4 * 16_384**2
