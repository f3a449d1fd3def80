"""ESFT's own checkpoints to deltas and back, to the bit; and everything that is wrong with one is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import metier
from deltas.made import FAMILIES, assert_untouched, made_adapter, made_base, state
from metier.deltas.esft_checkpoint import read_esft_checkpoint, write_esft_checkpoint
from metier.deltas.merge import merge
from metier.deltas.read import read_delta
from metier.deltas.save import save_delta
from metier.deltas.verify import EXPERTS, FINGERPRINT, MOVED, TENSORS, verify
from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError, MetierError, SelectionError
from metier.models.load import LoadedModel

CONFIG = {"experts": {"2": [3], "1": [7, 0]}, "shared_experts": False, "non_expert_modules": False}
D, F = 32, 32


@pytest.fixture(scope="module")
def base(base_folder: Path) -> LoadedModel:
    """DeepSeek-V2 with 8 experts in layers 1 and 2; layer 0 is dense."""
    return metier.load(base_folder)


def expert_name(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"


def published(experts: dict[str, list[int]], *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Tensors as ESFT's code names and shapes them."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for layer, ids in experts.items():
        for expert in ids:
            for projection in ("gate", "up", "down"):
                shape = (D, F) if projection == "down" else (F, D)
                tensors[expert_name(int(layer), expert, projection)] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], config: object = CONFIG, file: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "expert_cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def refused(
    folder: Path, base: LoadedModel, match: str, error: type[MetierError] = CorruptDeltaError, next_step: bool = True
) -> None:
    output = folder.parent / "output-of-refused"
    with pytest.raises(error, match=match) as caught:
        read_esft_checkpoint(folder, base, output)
    assert not output.exists()
    assert not next_step or "\n" in str(caught.value), "the message has no next step"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_published_checkpoint_becomes_a_delta_in_its_own_dtype(
    dtype: torch.dtype, base: LoadedModel, tmp_path: Path
) -> None:
    tensors = published(CONFIG["experts"], dtype=dtype)
    before = state(base.model)
    delta = read_esft_checkpoint(write(tmp_path / "esft", tensors), base, tmp_path / "delta")
    assert delta.config.experts == {1: (0, 7), 2: (3,)}
    assert delta.has_sums
    rows = delta.load_rows()
    for layer, row, expert in ((1, 0, 0), (1, 1, 7), (2, 0, 3)):
        gate, up, down = (tensors[expert_name(layer, expert, name)] for name in ("gate", "up", "down"))
        assert rows[layer]["gate_up_proj"].dtype == dtype
        assert torch.equal(rows[layer]["gate_up_proj"][row], torch.cat([gate, up]))
        assert torch.equal(rows[layer]["down_proj"][row], down)
    assert_untouched(base.model, before)
    write_esft_checkpoint(tmp_path / "delta", base, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) and again[name].dtype == dtype for name, tensor in tensors.items())
    config = json.loads((tmp_path / "again" / "expert_cfg.json").read_text())
    assert config == {**CONFIG, "experts": {"1": [0, 7], "2": [3]}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_delta_written_and_read_again_is_the_same_file(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = made_base(tmp_path / "base", family, dtype=dtype)
    save_delta(made_adapter(base.model, experts={1: [3, 0], 2: [2]}), tmp_path / "delta")
    base = metier.load(tmp_path / "base")
    folder = write_esft_checkpoint(tmp_path / "delta", base, tmp_path / "esft")
    assert sorted(path.name for path in folder.iterdir()) == ["expert_cfg.json", "model.safetensors"]
    read_esft_checkpoint(folder, str(tmp_path / "base"), tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "delta" / name).read_bytes(), name


def test_what_is_written_is_what_transformers_publishes_of_the_merged_model(
    delta_folder: Path, base: LoadedModel, tmp_path: Path
) -> None:
    """transformers splits the merged model's experts by its own code into the family's published names."""
    write_esft_checkpoint(delta_folder, base, tmp_path / "esft")
    merge(delta_folder, base, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    written = load_file(tmp_path / "esft" / "model.safetensors")
    assert len(written) == 2 * 2 * 3
    assert [name for name, tensor in written.items() if not torch.equal(merged[name], tensor)] == []


def test_what_is_read_passes_verifys_checks_of_files_and_base(base: LoadedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "esft", published(CONFIG["experts"], dtype=torch.float32))
    read_esft_checkpoint(folder, base, tmp_path / "delta")
    status = {check.name: check.status for check in verify(tmp_path / "delta", base).checks}
    assert {name: status[name] for name in (FINGERPRINT, EXPERTS, TENSORS, MOVED)} == dict.fromkeys(
        (FINGERPRINT, EXPERTS, TENSORS, MOVED), "passed"
    )
    assert set(status.values()) == {"passed"}


def test_shards_with_an_index_are_read_as_one(base: LoadedModel, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "shards")
    whole = write(tmp_path / "whole", published(CONFIG["experts"]))
    for source in (folder, whole):
        read_esft_checkpoint(source, base, tmp_path / f"delta-{source.name}")
    assert (tmp_path / "delta-shards" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "delta-whole" / "adapter_model.safetensors"
    ).read_bytes()
    (folder / "model.safetensors.index.json").unlink()
    read_esft_checkpoint(folder, base, tmp_path / "delta-shards")


def sharded(folder: Path) -> Path:
    tensors = published(CONFIG["experts"])
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-{index:05}-of-00002.safetensors"
        write(folder, {name: tensors[name] for name in part}, file=file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_that_is_missing(with_index: bool, base: LoadedModel, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "esft")
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    refused(folder, base, r"got 1 files model-…-of-00002\.safetensors, expected 2; missing: 1\.\nCopy the whole folder")


def test_an_index_that_does_not_fit_the_files(base: LoadedModel, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "esft")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = min(weight_map)
    for changed, match in (
        (
            {**weight_map, name: "model-00002-of-00002.safetensors"},
            r"should be in model-00002-.*, but is in model-00001",
        ),
        ({n: f for n, f in weight_map.items() if n != name}, r"should be in no file, but is in model-00001-of-00002"),
        ({**weight_map, "x": "other.safetensors"}, r"x should be in other\.safetensors, but is in no file"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        refused(folder, base, match)
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        refused(folder, base, r"index\.json: got no readable index, expected JSON with a weight_map")


def test_a_tensor_in_two_files(base: LoadedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "esft", published(CONFIG["experts"]))
    write(folder, published({"2": [3]}), file="other.safetensors")
    refused(folder, base, r"layers\.2\.mlp\.experts\.3.*is both in model\.safetensors and in other\.safetensors")


def test_a_missing_expert_config_is_said_with_what_the_files_hold(base: LoadedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "esft", published(CONFIG["experts"]), config=None)
    with pytest.raises(CorruptDeltaError, match=r"published training code does not write it\.\nWrite it") as caught:
        read_esft_checkpoint(folder, base, tmp_path / "delta")
    *_, line = str(caught.value).splitlines()
    assert line == '{"experts": {"1": [0, 7], "2": [3]}, "shared_experts": false, "non_expert_modules": false}'
    (folder / "expert_cfg.json").write_text(line)
    read_esft_checkpoint(folder, base, tmp_path / "delta")


@pytest.mark.parametrize("flag", ["shared_experts", "non_expert_modules"])
def test_what_a_delta_cannot_hold_is_refused_by_name(flag: str, base: LoadedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "esft", published(CONFIG["experts"]), {**CONFIG, flag: True})
    refused(
        folder, base, rf"expert_cfg\.json: {flag}: got true, expected false: a delta of metier holds", SelectionError
    )


def test_an_expert_that_is_named_but_not_there(base: LoadedModel, tmp_path: Path) -> None:
    tensors = published(CONFIG["experts"])
    del tensors[expert_name(1, 7, "up")]
    folder = write(tmp_path / "esft", tensors)
    refused(
        folder,
        base,
        r"expert_cfg\.json names the expert, but no file holds its model\.layers\.1\.mlp\.experts\.7\.up_proj",
    )


def test_an_expert_that_is_there_but_not_named(base: LoadedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "esft", published({**CONFIG["experts"], "2": [3, 4]}))
    refused(
        folder,
        base,
        r"got a tensor of expert 4 of layer 2, which expert_cfg\.json does not name \(it names \[3\] there\)",
    )
    folder = write(tmp_path / "shifted", published({"0": [7, 0], "1": [3]}))
    refused(
        folder,
        base,
        r"got a tensor of expert 0 of layer 0, which expert_cfg\.json does not name \(it names \[\] there\)",
    )


@pytest.mark.parametrize(
    ("experts", "match"),
    [
        ({"0": [7, 0], "1": [3]}, r"layers\.0: base .* has no MoE layer there; its MoE layers are \[1, 2\]\.\nLayers count from 0, dense ones included"),
        ({"1": [7, 0], "3": [3]}, r"layers\.3: base .* has no MoE layer there"),
        ({"1": [7, 8], "2": [3]}, r"layers\.1: got expert 8, but base .* has num_experts=8"),
        ({"1": [7, -1], "2": [3]}, r"layers\.1: got expert -1, but base"),
    ],
)  # fmt: skip
def test_layers_and_experts_that_the_base_does_not_have(
    experts: dict[str, list[int]], match: str, base: LoadedModel, tmp_path: Path
) -> None:
    folder = write(tmp_path / "esft", published(experts), {**CONFIG, "experts": experts})
    refused(folder, base, match, SelectionError)


@pytest.mark.parametrize(
    ("experts", "match"),
    [
        ({"1": [7, 7], "2": [3]}, r"layers\.1: got expert 7 twice"),
        ({}, "experts: got none, expected at least one"),
        ({"1": "7"}, r"layers\.1: got '7', expected a list"),
    ],
)
def test_an_expert_config_that_makes_no_sense(experts: object, match: str, base: LoadedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "esft", published(CONFIG["experts"]), {**CONFIG, "experts": experts})
    refused(folder, base, match, SelectionError, next_step=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t[:-1], r"experts\.3\.gate_proj\.weight: got shape \[31, 32\], expected \[32, 32\] by the base's"),
        (lambda t: t[None], r"got shape \[1, 32, 32\], expected \[32, 32\]"),
        (lambda t: t.float(), r"got tensors of dtype BF16, F32, expected one of F64, F32, BF16, F16 for all"),
        (lambda t: t.to(torch.float8_e4m3fn), r"got dtype F8_E4M3, expected one of F64, F32, BF16, F16"),
        (lambda t: t.long(), r"got tensors of dtype BF16, I64"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype(
    change: Callable[[Tensor], Tensor], match: str, base: LoadedModel, tmp_path: Path
) -> None:
    tensors = published(CONFIG["experts"])
    name = expert_name(2, 3, "gate")
    tensors[name] = change(tensors[name]).contiguous()
    refused(write(tmp_path / "esft", tensors), base, match)


def test_integers_are_no_weights(base: LoadedModel, tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.int8) for name, tensor in published(CONFIG["experts"]).items()}
    refused(
        write(tmp_path / "esft", tensors), base, r"got tensors of dtype I8, expected one of F64, F32, BF16, F16 for all"
    )


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.layers.1.mlp.shared_experts.up_proj.weight", r"shared_experts\.up_proj\.weight is a shared expert's, expected only .*\nA delta of metier holds"),
        ("model.layers.1.self_attn.o_proj.weight", r"o_proj\.weight is no routed expert's"),
        ("model.embed_tokens.weight", r"\nThese are the files of a whole model: load it with `metier\.load`"),
        ("base_model.model.layers.1.mlp.experts.0.up_proj.weight", r"expected names such as model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight"),
        ("model.layers.1.mlp.experts.0.w1.weight", r"experts\.0\.w1\.weight: expected names such as"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_no_routed_experts(name: str, match: str, base: LoadedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "esft", {**published(CONFIG["experts"]), name: torch.zeros(2, 2)})
    refused(folder, base, match, next_step="expected names" not in match.replace("\\", ""))


def test_folders_of_single_ranks_are_refused_with_what_to_do(base: LoadedModel, tmp_path: Path) -> None:
    ranks = published({"1": [0]}), published({"1": [7], "2": [3]})
    run = tmp_path / "run"
    run.mkdir()
    for rank, tensors in enumerate(ranks):
        write(run / f"last_checkpoint_ep{rank}", tensors, config=None)
    what_to_do = (
        r"expert parallelism.*\nCopy the safetensors files of every last_checkpoint_ep… folder into a new folder"
    )
    refused(run, base, rf"got the folders last_checkpoint_ep0, last_checkpoint_ep1 of a run with {what_to_do}")
    refused(run / "last_checkpoint_ep1", base, rf"got the folder of one rank of a run with {what_to_do}")
    together = tmp_path / "together"
    for rank, tensors in enumerate(ranks):
        write(together, tensors, file=f"ep{rank}.safetensors")
    assert read_esft_checkpoint(together, base, tmp_path / "delta").config.experts == {1: (0, 7), 2: (3,)}


def test_a_folder_that_holds_no_checkpoint(base: LoadedModel, tmp_path: Path) -> None:
    refused(
        tmp_path / "none", base, r"got no such folder, expected an ESFT checkpoint: expert_cfg\.json and safetensors"
    )
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", base, "got a file, expected an ESFT checkpoint")
    run = tmp_path / "run"
    run.mkdir()
    refused(run, base, "got no safetensors file")
    (run / "last_checkpoint").mkdir()
    refused(run, base, rf"got a run's folder.*\nGive {re.escape(str(run / 'last_checkpoint'))}")
    (run / "pytorch_model.bin").write_text("x")
    refused(run, base, r"got pickled tensors \(\.bin\), which can run code")


def test_a_truncated_file(base: LoadedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "esft", published(CONFIG["experts"]))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, base, r"model\.safetensors: got no valid safetensors file")


def test_values_that_are_not_finite(base: LoadedModel, tmp_path: Path) -> None:
    tensors = published(CONFIG["experts"])
    tensors[expert_name(1, 7, "down")][0, 0] = float("inf")
    refused(
        write(tmp_path / "esft", tensors), base, r"esft_down_proj: the rows hold values that are not finite", DeltaError
    )


def test_a_checkpoint_that_metier_wrote_knows_its_base(delta_folder: Path, base: LoadedModel, tmp_path: Path) -> None:
    folder = write_esft_checkpoint(delta_folder, base, tmp_path / "esft")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["base_fingerprint"] == read_delta(delta_folder).config.base_fingerprint
    other = made_base(tmp_path / "other", seed=1)
    refused(
        folder, other, r"the checkpoint was trained on a base with fingerprint \w{12}…, but base", BaseMismatchError
    )
    with pytest.raises(BaseMismatchError, match="the delta was trained on"):
        write_esft_checkpoint(delta_folder, other, tmp_path / "esft")


def test_a_folder_with_other_files_is_not_written_to(delta_folder: Path, base: LoadedModel, tmp_path: Path) -> None:
    folder = write_esft_checkpoint(delta_folder, base, tmp_path / "esft")
    write_esft_checkpoint(delta_folder, base, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"got a folder with notes\.txt, expected none, an empty one, or a former checkp"
    ):
        write_esft_checkpoint(delta_folder, base, folder)
    with pytest.raises(ConfigError, match=r"esft: got a folder with .*or a former delta"):
        read_esft_checkpoint(folder, base, folder)
