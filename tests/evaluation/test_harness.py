"""lm-evaluation-harness end to end and offline on the task that lies in `recipes/harness`: base, delta, merged model.

Skipped without the extra `harness`; `make test-all` installs it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metier.deltas.merge import merge
from metier.errors import ConfigError, DataError
from metier.evaluation.harness import evaluate_harness
from metier.evaluation.harness_tasks import load_harness_tasks
from metier.methods.esft.config import EsftConfig
from metier.models.load import LoadedModel, load
from metier.models.moe import moe_layers
from metier.reports.harness import harness_table

pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed; make test-all installs it")

TASKS = Path(__file__).parents[2] / "recipes" / "harness"


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    """Shared: no test may change it but by a delta that it takes off again."""
    return load("embedded", device="cpu")


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ESFT delta whose rows are far from the base's."""
    model, _ = load("embedded", device="cpu")
    experts = {layer.index: [0, 1, 2, 3] for layer in moe_layers(model)}
    tuned = get_peft_model(model, EsftConfig(experts=experts))
    torch.manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("delta")
    tuned.save_pretrained(folder)
    return folder


ITEMS = [
    {"begin": "development files for", "end": " the library"},
    {"begin": "This package contains the", "end": " documentation."},
    {"begin": "Python 3 module to", "end": " parse dates"},
]
CONTINUATIONS = """
task: continuations
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{begin}}"
doc_to_target: "{{end}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2.5}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a task of three continuations, and one that fixes its number of examples."""
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item) for item in ITEMS))
    (tmp_path / "continuations.yaml").write_text(CONTINUATIONS)
    fixed = "include: continuations.yaml\ntask: continuations_fixed\nnum_fewshot: 0\n"
    (tmp_path / "fixed.yaml").write_text(fixed)
    return tmp_path


def perplexity(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
    """The obvious way, an item at a time: what the harness's number has to be."""
    log_likelihoods = []
    for item in ITEMS:
        begin = tokenizer(item["begin"])["input_ids"]
        whole = tokenizer(item["begin"] + item["end"])["input_ids"]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        given = zip(range(len(begin) - 1, len(whole) - 1), whole[len(begin) :], strict=True)
        log_likelihoods.append(sum(float(log_probabilities[place, token]) for place, token in given))
    return float(np.exp(-np.mean(log_likelihoods)))


# the harness pads batches, and the embedded model is in bfloat16, whose sums then come out in another order
TOLERANCE = 0.02


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
    found = evaluate_harness(model, tokenizer, "continuations", include_path=folder)
    return next(line.value for line in found.scores if line.metric == "perplexity")


def test_a_delta_takes_part_and_a_merged_model_scores_the_same(base: LoadedModel, delta: Path, folder: Path) -> None:
    model, tokenizer = load("embedded", device="cpu")
    before = score(model, tokenizer, folder)
    tuned = PeftModel.from_pretrained(model, str(delta))
    after = score(tuned, tokenizer, folder)
    with tuned.disable_adapter():
        assert score(tuned, tokenizer, folder) == before
    assert before == pytest.approx(perplexity(base.model, tokenizer), rel=TOLERANCE)
    assert after == pytest.approx(perplexity(tuned, tokenizer), rel=TOLERANCE)
    assert after > 2 * before  # the rows are random ones
    merge(delta, "embedded", folder / "merged")
    assert score(load(folder / "merged", device="cpu").model, tokenizer, folder) == pytest.approx(after, rel=TOLERANCE)


def test_a_fresh_delta_changes_nothing(base: LoadedModel, folder: Path) -> None:
    model, tokenizer = load("embedded", device="cpu")
    tuned = get_peft_model(model, EsftConfig(experts={moe_layers(model)[0].index: [0]}))
    assert score(tuned, tokenizer, folder) == score(base.model, tokenizer, folder)


def test_a_result_says_what_it_was_measured_with(base: LoadedModel, delta: Path, folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load("embedded", device="cpu")
    tuned = PeftModel.from_pretrained(model, str(delta))
    result = evaluate_harness(tuned, tokenizer, "continuations", include_path=folder, limit=2, seed=3)
    assert [(line.metric, line.higher_is_better) for line in result.scores] == [("perplexity", False), ("acc", True)]
    line = result.scores[0]
    assert (line.task, line.filter, line.version, line.num_items, line.num_fewshot) == (
        "continuations",
        "none",
        "2.5",
        2,
        0,
    )
    assert line.stderr is not None
    assert result.versions["lm_eval"] == importlib.metadata.version("lm_eval")
    assert result.fingerprint == tuned.peft_config["default"].base_fingerprint
    assert result.adapters == {"default": "ESFT"}
    assert (result.settings["limit"], result.settings["seed"], result.settings["dtype"]) == (2, 3, "bfloat16")
    result.save(tmp_path / "new" / "harness.json")
    saved = json.loads((tmp_path / "new" / "harness.json").read_text())
    assert saved["scores"][0]["value"] == line.value
    assert saved["configs"]["continuations"]["metadata"]["version"] == 2.5
    table = harness_table(result)
    assert [next(iter(column.cells)).plain for column in table.columns][:2] == ["continuations", "perplexity"]
    assert "default (ESFT)" in table.caption.plain


def test_the_model_and_the_random_generators_are_as_before(base: LoadedModel, folder: Path) -> None:
    model, tokenizer = load("embedded", device="cpu")
    model.train()
    model.lm_head.eval()
    state = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    pad = tokenizer.pad_token
    score(model, tokenizer, folder)
    assert (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) == state
    assert model.training
    assert not model.lm_head.training
    assert tokenizer.pad_token == pad
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert logging.getLogger("lm_eval.models.huggingface").level == logging.NOTSET


def test_the_example_of_the_documentation_runs_from_any_folder(tmp_path: Path, delta: Path) -> None:
    options = ["--harness", str(TASKS), "--chat-template", "--limit", "4", "--batch-size", "4", "-o", "scores.json"]
    command = [sys.executable, "-m", "metier", "evaluate", "embedded", "--adapter", str(delta), *options]
    # a process of its own: what is imported first, the harness or our methods, is as a user has it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "metier_packages_json" in done.stdout
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert [(line["task"], line["num_items"]) for line in saved["scores"]] == [
        ("metier_packages_choice", 4),
        ("metier_packages_json", 4),
    ]
    assert saved["settings"]["apply_chat_template"] is True
    assert saved["adapters"] == {"default": "ESFT"}


def test_the_examples_items_are_whole() -> None:
    items = [json.loads(line) for line in (TASKS / "packages.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(items) == 32
    assert len({item["description"] for item in items}) == 32
    assert all(len(set(item["options"])) == 4 and item["answer"] in range(4) for item in items)
    assert all(set(json.loads(option)) == {"section", "role"} for item in items for option in item["options"])


def test_files_folders_and_names_stand_for_the_same_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("continuations", "continuations_fixed")
    assert load_harness_tasks(str(folder)).names == names
    assert load_harness_tasks(f"{folder}/continuations.yaml,continuations_fixed").names == names
    assert load_harness_tasks(["continuations_fixed"], include_path=[folder, folder]).names == names[1:]
    monkeypatch.chdir(folder.parent)
    assert load_harness_tasks(folder.name).names == names
    files = load_harness_tasks(folder.name).tasks["continuations"].get_config("dataset_kwargs")["data_files"]
    assert files == {"test": str(folder / "items.jsonl")}


def test_a_group_of_local_tasks_is_run_with_its_mean(base: LoadedModel, folder: Path) -> None:
    members = "".join(f"  - {name}\n" for name in ("continuations", "continuations_fixed"))
    (folder / "group.yaml").write_text(
        f"group: both\ntask:\n{members}aggregate_metric_list: [{{metric: acc, aggregation: mean}}]\n"
    )
    found = load_harness_tasks(f"{folder}/group.yaml")
    assert (found.names, len(found.built), sorted(found.tasks)) == (
        ("both",),
        1,
        ["continuations", "continuations_fixed"],
    )
    result = evaluate_harness(base.model, base.tokenizer, found)
    acc = {line.task: line.value for line in result.scores if line.metric == "acc"}
    assert acc["both"] == pytest.approx((acc["continuations"] + acc["continuations_fixed"]) / 2)


def test_code_of_a_task_is_loaded_only_if_the_task_is_meant(base: LoadedModel, folder: Path) -> None:
    (folder / "words.py").write_text("def begin(item):\n    return item['begin'].upper()\n")
    with_code = "include: continuations.yaml\ntask: {}\ndoc_to_text: !function {}.begin\n"
    (folder / "loud.yaml").write_text(with_code.format("loud", "words"))
    (folder / "none.yaml").write_text(with_code.format("lost", "no_such_file"))
    found = load_harness_tasks("loud,continuations", include_path=folder)
    quiet, loud = (found.tasks[name].doc_to_text(ITEMS[1]) for name in ("continuations", "loud"))
    assert (quiet, loud) == (ITEMS[1]["begin"], ITEMS[1]["begin"].upper())
    with pytest.raises(ConfigError, match=r"none\.yaml: its Python code could not be loaded: Cannot import module"):
        load_harness_tasks("lost", include_path=folder)
    with pytest.raises(ConfigError, match="got include_path for tasks that were found already"):
        evaluate_harness(base.model, base.tokenizer, found, include_path=folder)


def test_a_tag_is_all_tasks_that_have_it(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(f"include: continuations.yaml\ntask: {name}\ntag: some\n")
    found = load_harness_tasks("some", include_path=folder)
    assert (found.names, sorted(found.tasks)) == (("some",), ["one", "two"])
    files = found.tasks["two"].get_config("dataset_kwargs")["data_files"]
    assert files == {"test": str(folder / "items.jsonl")}


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match=r"harness: unknown task 'hellaswagg'\. Did you mean 'hellaswag'\? It is none of the 1\d,\d{3}",
    ):
        load_harness_tasks("hellaswagg")


@pytest.mark.slow
def test_a_task_whose_data_are_elsewhere_is_refused_offline() -> None:
    with pytest.raises(
        DataError,
        match=r"harness: task 'hellaswag' could not be loaded: .*\nIts data must be reachable, or in the cache",
    ):
        load_harness_tasks("hellaswag")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("", "harness: no task given"),
        ("./nowhere.yaml", r"harness: nowhere\.yaml: no such file or folder"),
        ("{folder}/broken.yaml", r"broken\.yaml: cannot be read as a task: "),
        ("{folder}", r"broken\.yaml: cannot be read as a task: "),
        ("{folder}/part/part.yaml", r"part: got no task, expected YAML files"),
        ("{folder}/ok/part.yaml", r"part\.yaml: got no task, expected a \.yaml file with the key 'task' or 'group'"),
        ("{folder}/twice", r"b\.yaml: task 'same' is in .*a\.yaml already"),
        ("{folder}/items.jsonl", r"broken\.yaml: cannot be read as a task"),
        ("{folder}/ok/lost.yaml", r"harness: task 'lost' could not be loaded: FileNotFoundError"),
    ],
)
def test_what_is_no_task_is_refused(asked: str, message: str, folder: Path) -> None:
    for name in ("part", "ok", "twice"):
        (folder / name).mkdir()
    (folder / "broken.yaml").write_text("task: [")
    (folder / "part" / "part.yaml").write_text("output_type: loglikelihood\n")
    (folder / "ok" / "part.yaml").write_text("output_type: loglikelihood\n")
    (folder / "ok" / "lost.yaml").write_text(CONTINUATIONS.replace("items", "none").replace("continuations", "lost"))
    for name in "ab":
        (folder / "twice" / f"{name}.yaml").write_text("task: same\n")
    with pytest.raises((ConfigError, DataError), match=message):
        load_harness_tasks(asked.format(folder=folder))


def test_a_missing_include_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="harness: nowhere: no such folder"):
        load_harness_tasks("x", include_path="nowhere")


def test_a_task_that_is_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="harness: task 'continuations' was named twice, the second time by 'continuations'"
    ):
        load_harness_tasks("continuations,continuations", include_path=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_fewshot": 2}, r"got num_fewshot=2, but task 'continuations_fixed' fixes it at 0"),
        ({"num_fewshot": -1}, r"num_fewshot must be at least 0, got -1"),
        ({"limit": 0}, r"limit must be at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"apply_chat_template": True}, r"has no chat template to apply"),
    ],
)
def test_what_the_harness_would_pass_over_is_refused(
    options: dict[str, int], message: str, base: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "apply_chat_template" in options:
        monkeypatch.setattr(base.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match=message):
        evaluate_harness(base.model, base.tokenizer, "continuations_fixed", include_path=folder, **options)


def test_code_and_images_are_refused(base: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "code.yaml").write_text("include: continuations.yaml\ntask: code\nunsafe_code: true\n")
    found = load_harness_tasks("code", include_path=folder)
    with pytest.raises(ConfigError, match="harness: task 'code' runs code that the model wrote, which is off unless"):
        evaluate_harness(base.model, base.tokenizer, found)
    assert evaluate_harness(base.model, base.tokenizer, found, allow_code_execution=True).scores
    monkeypatch.setattr(found.tasks["code"], "MULTIMODAL", True, raising=False)
    with pytest.raises(ConfigError, match="harness: task 'code' has images or sound"):
        evaluate_harness(base.model, base.tokenizer, found, allow_code_execution=True)


def test_worked_examples_are_put_into_the_prompt(base: LoadedModel, folder: Path) -> None:
    counted: list[int] = []
    forward: Callable = base.model.forward

    def count(input_ids: torch.Tensor, **options: object) -> object:
        counted.append(input_ids.shape[1])
        return forward(input_ids, **options)

    for num_fewshot in (0, 2):
        base.model.forward = count
        try:
            result = evaluate_harness(
                base.model, base.tokenizer, "continuations", include_path=folder, num_fewshot=num_fewshot
            )
        finally:
            del base.model.forward
        assert result.scores[0].num_fewshot == num_fewshot
    assert max(counted[len(counted) // 2 :]) > 2 * max(counted[: len(counted) // 2])
