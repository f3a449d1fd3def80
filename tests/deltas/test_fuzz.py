"""Thousands of damaged folders: each is refused with an error of ours, or what is read is what was written.

Every kind of folder that metier reads is damaged in every way at once that a disk, a network or a person damages files:
bits, pieces, whole files, and single values of their JSON texts. The numbers are fixed by a seed. Values of files that
have no sums (PEFT's own, and ESFT's checkpoints) may come through altered, and nothing else may.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import metier
from deltas.made import made_adapter, made_base
from metier.deltas.compress import compress
from metier.deltas.compressed_file import read_compressed
from metier.deltas.esft_checkpoint import read_esft_checkpoint, write_esft_checkpoint
from metier.deltas.read import read_delta
from metier.deltas.save import save_delta
from metier.errors import MetierError
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from metier.models.load import LoadedModel

NUM_MUTATIONS = 400
"""Of each of the six kinds of folder: 2,400 in all."""
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 1.5, float("nan"), "", "x", "\u0663", "1", [], [1, 1], [[]], {}, {"1": []}),
    *({"1": [0]}, {"-1": [0]}, {"1": ["0"]}, {"99": [0]}, "ESFT", "EXPERT_LORA", "F32", "F16", "I8", [2, 3], "0" * 64),
)

Meaning = dict[str, Any]


def same(got: Meaning, want: Meaning, *, with_values: bool) -> bool:
    if got.keys() != want.keys():
        return False
    return all(
        got[name].shape == value.shape and (not with_values or torch.equal(got[name], value))
        if isinstance(value, Tensor)
        else got[name] == value
        for name, value in want.items()
    )


def of_delta(folder: Path, base: LoadedModel, scratch: Path) -> Meaning:
    delta = read_delta(folder)
    rows = {f"{i}.{name}": t for i, named in delta.load_rows().items() for name, t in named.items()}
    whole = {f"{path}.{name}": t for path, named in delta.load_whole().items() for name, t in named.items()}
    config = delta.config
    return {
        **rows,
        **whole,
        "experts": config.experts,
        "paths": config.paths,
        "method": config.method,
        "fingerprint": config.base_fingerprint,
        "low_rank": config.low_rank,
        "num_experts": config.num_experts,
    }


def by_peft(folder: Path, base: LoadedModel, scratch: Path) -> Meaning:
    """Without what nothing but the configuration says, and loading compares with the base."""
    meaning = of_delta(folder, base, scratch)
    return {name: value for name, value in meaning.items() if name not in ("fingerprint", "num_experts")}


def of_compressed(folder: Path, base: LoadedModel, scratch: Path) -> Meaning:
    delta = read_compressed(folder)
    parts = {name: (part.dtype, part.shape) for name, part in delta.parts.items()}
    return {"parts": parts, "rows": delta.rows, "sums": delta.rows_sums, "experts": delta.config.experts}


def of_checkpoint(folder: Path, base: LoadedModel, scratch: Path) -> Meaning:
    read_esft_checkpoint(folder, base, scratch)
    return of_delta(scratch, base, scratch)


def lora(model: torch.nn.Module) -> peft.PeftModel:
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, ExpertLoraConfig(experts={1: [1, 3], 2: [0]}, r=3, ranks={1: {3: 2}}))
    return moved(wrapped)


def with_whole_modules(model: torch.nn.Module) -> peft.PeftModel:
    torch.manual_seed(2)
    return moved(peft.get_peft_model(model, EsftConfig(experts={1: [1, 3]}, also_train=["router", "norms"])))


def moved(wrapped: peft.PeftModel) -> peft.PeftModel:
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape))
    return wrapped


KINDS: dict[str, tuple[Callable[[Path, LoadedModel, Path], Meaning], bool]] = {
    "esft": (of_delta, True),
    "expert_lora": (of_delta, True),
    "whole_modules": (of_delta, True),
    "by_peft": (by_peft, False),
    "compressed": (of_compressed, True),
    "esft_checkpoint": (of_checkpoint, False),
}
"""What is read of a folder, and whether its values have sums."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and one folder of each kind."""
    root = tmp_path_factory.mktemp("fuzz")
    made_base(root / "base")

    def base() -> LoadedModel:
        return metier.load(root / "base")

    save_delta(made_adapter(base().model), root / "esft")
    save_delta(lora(base().model), root / "expert_lora")
    save_delta(with_whole_modules(base().model), root / "whole_modules")
    made_adapter(base().model).save_pretrained(root / "by_peft")
    compress(root / "esft", root / "base", root / "compressed", method="int8")
    write_esft_checkpoint(root / "esft", root / "base", root / "esft_checkpoint")
    return root


def damage(folder: Path, others: Path, rng: random.Random) -> str:
    """Damage one file of a folder in one way; returns which."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    path = rng.choice(files)
    ways = [flip, truncate, cut, insert, blank, move, vanish, empty, from_elsewhere, garbage]
    ways += [edit_json] * 5 if path.suffix == ".json" else [edit_header] * 5
    way = rng.choice(ways)
    if way is from_elsewhere:
        foreign = sorted(p for p in others.glob(f"*/*{path.suffix}") if p.read_bytes() != path.read_bytes())
        path.write_bytes(rng.choice(foreign).read_bytes())
    else:
        way(path, rng)
    return way.__name__


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data))
    path.write_bytes(data[:at] + data[at + rng.randint(1, 64) :])


def insert(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data))
    path.write_bytes(data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:])


def blank(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    path.write_bytes(data)


def move(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data))
    path.write_bytes(data[at:] + data[:at])


def vanish(path: Path, rng: random.Random) -> None:
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randint(1, 4096)))


def from_elsewhere(path: Path, rng: random.Random) -> None:
    raise AssertionError("done by `damage`")


def edit_json(path: Path, rng: random.Random) -> None:
    values = json.loads(path.read_text())
    edit(values, rng)
    path.write_text(json.dumps(values))


def edit_header(path: Path, rng: random.Random) -> None:
    """A header that is valid JSON of the right length, but says something else."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def edit(values: Any, rng: random.Random) -> None:
    """Change one value somewhere in a JSON object: another one, gone, under another name, or twice."""
    while True:
        key = rng.choice(sorted(values)) if isinstance(values, dict) else rng.randrange(len(values))
        if isinstance(values[key], dict | list) and values[key] and rng.random() < 0.6:
            values = values[key]
            continue
        how = rng.randrange(4)
        if how == 0:
            values[key] = rng.choice(JUNK)
        elif how == 1:
            del values[key]
        elif isinstance(values, list):
            values.append(values[key])
        else:
            name = rng.choice([f"{key}x", key[:-1], "metier", "1", *sorted(values)])
            values[name] = values.pop(key) if how == 2 else values[key]
        return


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_refused_or_read_as_it_was(kind: str, folders: Path, tmp_path: Path) -> None:
    read, has_sums = KINDS[kind]
    base, rng, ends = metier.load(folders / "base"), random.Random(f"metier {kind}"), Counter[str]()
    want = read(folders / kind, base, tmp_path / "want")
    for number in range(NUM_MUTATIONS):
        folder, scratch = tmp_path / f"{number}", tmp_path / f"{number}-read"
        shutil.copytree(folders / kind, folder)
        way = damage(folder, folders, rng)
        try:
            got = read(folder, base, scratch)
        except MetierError:
            ends["refused"] += 1
        else:
            ends["read"] += 1
            assert same(got, want, with_values=has_sums), f"{kind}, mutation {number}: {way} came through"
        shutil.rmtree(folder)
        shutil.rmtree(scratch, ignore_errors=True)
    assert ends.total() == NUM_MUTATIONS
    # what comes through as it was are notes of the configuration and white space, or values without sums
    assert ends["refused"] > NUM_MUTATIONS * (0.6 if has_sums else 0.4), ends


def test_there_are_two_thousand_mutations() -> None:
    assert NUM_MUTATIONS * len(KINDS) >= 2000
