"""A run's configuration: file and overrides, types, and every refusal with its place and the nearest match."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from metier.config import RunConfig, passed_over
from metier.config_reading import describe_fields, load_run_config
from metier.errors import ConfigError

REQUIRED = ["--model", "embedded", "--dataset", "a.jsonl", "--output_dir", "runs/a"]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def own_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(RunConfig) if field.name != "method_options"]


def test_overrides_go_before_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "model: a\ndataset: b\noutput_dir: c\nmax_steps: 5\nseed: 3\n")
    config = load_run_config(path, ["--max_steps", "7", "--learning-rate=3e-4"])
    assert (config.model, config.max_steps, config.learning_rate, config.seed) == ("a", 7, 3e-4, 3)


def test_values_of_the_command_line_are_parsed_by_the_fields_type() -> None:
    config = load_run_config(
        None, [*REQUIRED, "--bf16", "--method", "expert_lora", "--top_p", "1", "--model=7", "--save-steps", "5"]
    )
    assert (config.bf16, config.method, config.top_p, config.model, config.save_steps) == (
        True,
        "expert_lora",
        1.0,
        "7",
        5,
    )
    assert isinstance(config.top_p, float)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--bf16"], True),
        (["--bf16", "false"], False),
        (["--bf16=no"], False),
        (["--no-bf16"], False),
        (["--bf16", "--seed", "1"], True),
    ],
)
def test_a_boolean_is_a_flag_or_takes_a_word(tokens: list[str], expected: bool) -> None:
    assert load_run_config(None, [*REQUIRED, *tokens]).bf16 is expected


def test_yaml_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = written(tmp_path, "model: a\ndataset: b\noutput_dir: c\nlearning_rate: 1e-4\nmax_steps: null\n")
    config = load_run_config(path)
    assert (config.learning_rate, config.max_steps) == (1e-4, None)


def test_none_unsets_on_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "model: a\ndataset: b\noutput_dir: c\nmax_steps: 5\n")
    assert load_run_config(path, ["--max_steps", "none"]).max_steps is None


def test_yaml_of_a_configuration_reads_back_to_an_equal_one(tmp_path: Path) -> None:
    config = load_run_config(None, [*REQUIRED, "--learning_rate", "3e-5", "--bf16", "--selection", "häkchen: x.json"])
    assert load_run_config(written(tmp_path, config.to_yaml())) == config
    assert own_keys() == [line.split(":")[0] for line in config.to_yaml().splitlines()]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--learning_rat", "1"], "command line: unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        (
            ["--zzz", "1"],
            "command line: unknown key 'zzz'. The keys are: model, dataset, output_dir, method,",
        ),
        (["--no-seed"], "command line: unknown key 'no_seed'. Did you mean 'seed'?"),
        (["--seed", "many"], "command line: seed must be a whole number, got 'many'."),
        (["--seed", "1.5"], "command line: seed must be a whole number, got '1.5'."),
        (["--seed", "none"], "command line: seed must be a whole number, got 'none'."),
        (["--max_steps", "x"], "command line: max_steps must be a whole number (or null), got 'x'."),
        (["--learning_rate", "nan"], "command line: learning_rate must be a number, got 'nan'."),
        (["--learning_rate", "inf"], "command line: learning_rate must be a number, got 'inf'."),
        (["--bf16=maybe"], "command line: bf16 must be true or false, got 'maybe'."),
        (["--method", "ESFT"], "method: got 'ESFT', which is no method. Did you mean 'esft'?"),
        (["--seed"], "command line: --seed needs a value: a whole number."),
        (["--seed", "--bf16"], "command line: --seed needs a value: a whole number."),
        (
            ["stray.yaml"],
            "command line: got 'stray.yaml' where a --key was expected. A run's YAML file stands first",
        ),
        (["--top_p", "0"], "top_p must be in (0, 1], got 0.0."),
        (["--top_p", "1.1"], "top_p must be in (0, 1], got 1.1."),
        (["--max_steps", "-1"], "max_steps must be at least 1, got -1."),
        (["--max_length", "0"], "max_length must be at least 1, got 0."),
        (["--weight_decay", "-0.1"], "weight_decay must be at least 0, got -0.1."),
        (["--learning_rate", "0"], "learning_rate must be greater than 0, got 0.0."),
        (["--lora_dropout", "1"], "lora_dropout must be less than 1, got 1.0."),
        (["--model", ""], "model must be a name or a path, got ''."),
    ],
)
def test_a_bad_override_is_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config(None, [*REQUIRED, *tokens])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: a\n\nlearning_rat: 1\n",
            "run.yaml:3: unknown key 'learning_rat'. Did you mean 'learning_rate'?",
        ),
        ("model: a\nseed: 1.5\n", "run.yaml:2: seed must be a whole number, got 1.5."),
        ("seed: true\n", "run.yaml:1: seed must be a whole number, got True."),
        ("seed: null\n", "run.yaml:1: seed must be a whole number, got None."),
        ("bf16: 2\n", "run.yaml:1: bf16 must be true or false, got 2."),
        ("model: [a]\n", "run.yaml:1: model must be a text, got ['a']."),
        ("model: a\nseed: 1\nmodel: b\n", "run.yaml:3: key 'model' stands in the file twice"),
        ("- model\n", "run.yaml: expected `key: value` lines at the top level."),
        ("model: [\n", "run.yaml: is not YAML:"),
        (
            "model: a\n",
            "run.yaml: missing keys dataset, output_dir. Add them to the YAML file or the command line, e.g. --dataset VALUE.",
        ),
        ("", "run.yaml: missing keys model, dataset, output_dir."),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read \(No such file or directory\)"):
        load_run_config(tmp_path / "run.yaml")


def test_one_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"command line: missing key output_dir\. Add it to"):
        load_run_config(None, REQUIRED[:4])


def test_every_field_says_what_it_means() -> None:
    described = describe_fields()
    assert [name for name, *_ in described] == own_keys()
    assert all(meaning.endswith((".", "…")) and len(meaning) > 20 for *_, meaning in described)
    assert described[0][1:3] == ("a text", "required")


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("lora", {"top_p": 0.2}, "top_p: method lora selects no experts, so this would be passed over"),
        ("full", {"selection": "s.json"}, "selection: method full selects no experts"),
        ("vera", {"score": "gate", "select_top_k": 2}, "score, select_top_k: method vera selects no experts"),
        ("esft", {"meft_r": 64}, "meft_r: is of method meft, and would be passed over by esft"),
    ],
)
def test_keys_that_the_method_would_pass_over_are_refused(method: str, keys: dict, said: str) -> None:
    values = {"model": "m", "dataset": "d", "output_dir": "o"}
    with pytest.raises(ConfigError, match=said):
        RunConfig(**values, method=method, **keys)
    RunConfig(**values, method=method)
    assert set(keys) <= passed_over(method)
