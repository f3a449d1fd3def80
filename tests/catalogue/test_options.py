"""A method's own options, as keys of a run: in a file, on a command line, checked by their types."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metier.config import RunConfig
from metier.config_reading import load_run_config
from metier.errors import ConfigError

REQUIRED = ["--model", "embedded", "--dataset", "a.jsonl", "--output_dir", "runs/a"]


def options(*tokens: str) -> dict:
    return dict(load_run_config(None, [*REQUIRED, *tokens]).method_options)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--method", "vera", "--r", "64", "--vera_dropout=1e-1"], {"r": 64, "vera_dropout": 0.1}),
        (["--method", "vera", "--target_modules", "q_proj,v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
        (["--method", "vera", "--target_modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--method", "vera", "--target_modules", "[q_proj]"], {"target_modules": ["q_proj"]}),
        (["--method", "lora", "--use_dora"], {"use_dora": True}),
        (["--method", "lora", "--no-use_dora"], {"use_dora": False}),
        (
            ["--use_dora", "--method", "lora", "--rank_pattern", "{q_proj: 4}"],
            {"use_dora": True, "rank_pattern": {"q_proj": 4}},
        ),
        (["--method", "mezo", "--mezo_epsilon", "1e-2"], {"mezo_epsilon": 0.01}),
    ],
)
def test_options_are_read_by_their_types(tokens: list[str], expected: dict) -> None:
    assert options(*tokens) == expected


def test_a_run_with_options_is_written_and_read_back(tmp_path: Path) -> None:
    config = load_run_config(None, [*REQUIRED, "--method", "vera", "--r", "64", "--target_modules", "q_proj,v_proj"])
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert load_run_config(tmp_path / "run.yaml") == config
    assert hash(load_run_config(tmp_path / "run.yaml")) == hash(config)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--method", "vera", "--vera_dropuot", "0.1"], "unknown key 'vera_dropuot'. Did you mean 'vera_dropout'?"),
        (["--method", "vera", "--r", "many"], "command line: r of method vera must be int, got 'many'"),
        (["--method", "esft", "--vera_dropout", "0.1"], "unknown key 'vera_dropout'."),
        (["--method", "vera", "--zzz", "1"], "Options of vera are: bias, d_initial,"),
        (["--method", "dora", "--use_dora"], "unknown key 'use_dora'."),
        (
            ["--method", "vera", "--targets", "routed"],
            "targets: got 'routed', but vera can go on attention, dense, shared.",
        ),
        (["--method", "vera", "--targets", "atention"], "targets must name some of attention, dense,"),
        (["--method", "prompt", "--targets", "attention"], "prompt can go on none, for it has a place of its own."),
        (["--method", "vera", "--targets", "dense", "--target_modules", "q"], "both say where the method goes"),
    ],
)
def test_what_is_no_option_is_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config(None, [*REQUIRED, *tokens])


def test_a_file_says_where(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: a\ndataset: b\noutput_dir: c\nmethod: vera\nvera_dropout: [1]\n")
    with pytest.raises(ConfigError, match=r"run.yaml:5: vera_dropout of method vera must be float"):
        load_run_config(tmp_path / "run.yaml")


def test_two_ranks_that_differ_are_refused() -> None:
    from metier.methods.from_catalogue import adapter_config
    from tiny_models import tiny_model

    config = RunConfig(model="a", dataset="b", output_dir="c", method="dora", lora_r=4, method_options={"r": 16})
    with pytest.raises(ConfigError, match="r: got 16, but lora_r is 4"):
        adapter_config(tiny_model("llama"), config)
