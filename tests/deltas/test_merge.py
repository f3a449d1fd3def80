"""A merged delta is an ordinary model: plain transformers loads it, and nothing but the delta's rows differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import metier
from deltas.made import FAMILIES, assert_untouched, logits, made_adapter, made_base, rows_of, state, tokens
from metier.deltas import merge as module
from metier.deltas.merge import merge
from metier.deltas.save import save_delta
from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, SelectionError
from metier.models.fingerprint import fingerprint

SCRIPT = """
import sys, torch, transformers
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(sys.argv[1])).logits, folder + ".pt")
assert not {"metier", "peft"} & set(sys.modules), "the model needs more than transformers"
"""


def test_plain_transformers_in_a_fresh_process_gives_the_adapters_logits(tmp_path: Path) -> None:
    want = {}
    for family in FAMILIES:
        dtype = torch.float32 if family == "mixtral" else torch.bfloat16
        base = made_base(tmp_path / family / "base", family, dtype=dtype)
        unchanged = logits(base.model)
        wrapped = made_adapter(base.model)
        want[family] = logits(wrapped)
        assert not torch.equal(want[family], unchanged)
        save_delta(wrapped, tmp_path / family / "adapter")
        folder = merge(tmp_path / family / "adapter", tmp_path / family / "base", tmp_path / family / "merged")
        assert folder == tmp_path / family / "merged"
    torch.save(tokens(), tmp_path / "tokens.pt")
    folders = [str(tmp_path / family / "merged") for family in FAMILIES]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "tokens.pt"), *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for family in FAMILIES:
        assert torch.equal(torch.load(tmp_path / family / "merged.pt"), want[family]), family


@pytest.mark.parametrize(
    ("family", "of_selected"),
    [
        ("deepseek_v2", r"model.layers.{layer}.mlp.experts.{expert}.{gate,up,down}_proj.weight"),
        ("mixtral", r"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{1,2,3}.weight"),
    ],
)
def test_the_checkpoints_own_layout_is_kept_and_only_selected_experts_differ(
    family: str, of_selected: str, tmp_path: Path
) -> None:
    base = made_base(tmp_path / "base", family)
    save_delta(made_adapter(base.model, experts={1: [0, 3], 2: [1]}), tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys()
    head, _, tail = of_selected.replace("{layer}", "%d").replace("{expert}", "%d").partition("{")
    options, _, end = tail.partition("}")
    selected = {f"{head % pair}{option}{end}" for pair in ((1, 0), (1, 3), (2, 1)) for option in options.split(",")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == selected


def test_the_tokenizer_the_generation_configuration_and_the_card_come_along(tmp_path: Path) -> None:
    base = made_base(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    save_delta(made_adapter(base.model), tmp_path / "adapter")
    merged = merge(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "merged"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": "hé"}]
    assert tokenizer.apply_chat_template(messages) == base.tokenizer.apply_chat_template(messages)
    assert transformers.GenerationConfig.from_pretrained(merged).max_new_tokens == 7
    card = (merged / "README.md").read_text()
    for expected in ("license: mit", "licence of the base: mit", "| 1 | 1, 3 |", str(tmp_path / "adapter")):
        assert expected in card
    facts = json.loads((merged / "metier_merge.json").read_text())
    assert facts["experts"] == {"1": [1, 3], "2": [1, 3]}
    assert facts["base_fingerprint"] == fingerprint(metier.load(tmp_path / "base").model)
    assert facts["licence_of_base"] == "mit"


def test_a_loaded_base_is_given_back_as_it_was(delta_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    base = metier.load(base_folder)
    before = state(base.model)
    merge(delta_folder, base, tmp_path / "merged")
    assert_untouched(base.model, before)
    merged = metier.load(tmp_path / "merged").model
    assert not torch.equal(logits(merged), logits(base.model))


def test_float32_rows_are_merged_in_full_into_a_bf16_base_loaded_in_float32(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base", dtype=torch.bfloat16).model)
    save_delta(wrapped, tmp_path / "adapter", dtype=torch.float32)
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", dtype=torch.float32)
    merged = metier.load(tmp_path / "merged").model
    assert merged.dtype == torch.float32
    rows = next(p for name, p in rows_of(wrapped).items() if name.endswith("layers.2.mlp.experts.esft_down_proj"))
    assert torch.equal(merged.model.layers[2].mlp.experts.down_proj[[1, 3]], rows)


def test_a_former_merge_is_replaced(delta_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    merge(delta_folder, base_folder, tmp_path / "merged")
    (tmp_path / "merged" / "model-00002-of-00002.safetensors").touch()
    merge(delta_folder, base_folder, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model-00002-of-00002.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_folder_that_is_no_former_merge_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ConfigError, match=r"got a folder with thesis\.tex, expected none, an empty one, or a former merge"
    ):
        merge("/no/delta", "/no/base", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_base_itself_is_no_output(delta_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    merged = merge(delta_folder, base_folder, tmp_path / "merged")
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    with pytest.raises(ConfigError, match="got the base's own folder as output, which would be lost"):
        merge(delta_folder, merged, merged)
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before


def test_a_merge_that_breaks_off_leaves_nothing(
    delta_folder: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = metier.load(base_folder)
    before = state(base.model)

    def broken(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_describe", broken)
    with pytest.raises(OSError, match="No space"):
        merge(delta_folder, base, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_untouched(base.model, before)


def test_another_base_is_refused_and_both_are_named(delta_folder: Path, tmp_path: Path) -> None:
    made_base(tmp_path / "other", seed=1)
    with pytest.raises(
        BaseMismatchError, match=r"was trained on '.*/base' with fingerprint \w{12}…, but base '.*/other' has \w{12}…"
    ):
        merge(delta_folder, tmp_path / "other", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_delta_that_was_never_on_a_model_is_refused(tmp_path: Path, base_folder: Path) -> None:
    made_adapter(metier.load(base_folder).model).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_fingerprint": None}))
    with pytest.raises(BaseMismatchError, match=r"the delta carries no base_fingerprint, expected \w{12}…"):
        merge(tmp_path / "adapter", base_folder, tmp_path / "merged")


def test_an_expert_that_the_base_does_not_have_is_refused(tmp_path: Path, base_folder: Path) -> None:
    made_adapter(metier.load(base_folder).model).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    changes = {"experts": {"1": [1, 8], "2": [1, 3]}, "num_experts": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    # the rows say it too, else the two files would not fit each other
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.experts.esft_expert_ids"] = torch.tensor([1, 8])
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SelectionError, match=r"layers\.1: the delta replaces expert 8, but base '.*' has num_experts=8"
    ):
        merge(tmp_path / "adapter", base_folder, tmp_path / "merged")


def test_values_that_are_not_finite_are_refused(tmp_path: Path, base_folder: Path) -> None:
    wrapped = made_adapter(metier.load(base_folder).model)
    with torch.no_grad():
        next(iter(rows_of(wrapped).values()))[0, 0, 0] = float("nan")
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CorruptDeltaError, match=r"layers\.1\.gate_up_proj holds values that are not finite; nothing"):
        merge(tmp_path / "adapter", base_folder, tmp_path / "merged")


def test_a_dtype_for_a_loaded_base_is_refused(delta_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype: got torch\.bfloat16 for a base that is loaded already"):
        merge(delta_folder, metier.load(base_folder), tmp_path / "merged", dtype=torch.bfloat16)
