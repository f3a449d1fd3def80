"""What the soak is about: deltas of every kind in folders, damaged ones too, questions, and each delta's right answers.

The right answers are those of the models that PEFT merges, each alone, in float32.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from serving_soak_answers import Question, Right, right_answer

BASE = "embedded"
STEPS = {"esft": 0.12, "expert_lora": 0.2, "lora": 0.06}
"""By which a value moves on average: far enough for each delta to answer otherwise than all others."""
EXPERTS_PER_LAYER = {"esft": 5, "expert_lora": 6}
PERMANENT = ["esft-0", "thin-0", "lora-0"]
"""Put into service by --delta; no client unloads them."""
SHELF = ["esft-1", "esft-2", "thin-1", "lora-1"]
"""In the folder that --delta-dir names: served from the start, and loaded and unloaded meanwhile."""
SPARE = ["esft-3", "esft-4", "thin-2", "lora-2"]
"""Deeper in that folder: not served at the start, but may be loaded."""
_MOST_DRAWN = 24
"""Tokens of an answer that is drawn: the longer, the surer it hangs on a rounding somewhere."""


@dataclass
class World:
    folder: Path
    questions: list[Question] = field(default_factory=list)
    greedy: dict[tuple[str | None, int], Right] = field(default_factory=dict)
    """By a delta's folder name, None for the base, and a question's number."""
    drawn: dict[tuple[str | None, int], Right] = field(default_factory=dict)
    """With TEMPERATURE and TOP_P, and the question's number as the seed."""
    num_left_out: int = 0

    def path(self, name: str) -> Path:
        """The folder of a delta by its folder's name."""
        place = {**dict.fromkeys(PERMANENT, "permanent"), **dict.fromkeys(SHELF, "shelf")}.get(name, "shelf/spare")
        return self.folder / place / name

    def delta_bytes(self) -> dict[str, int]:
        names = [*PERMANENT, *SHELF, *SPARE]
        return {name: (self.path(name) / "adapter_model.safetensors").stat().st_size for name in names}

    def write(self, path: Path) -> None:
        tables = {
            table: [[*key, asdict(right)] for key, right in getattr(self, table).items()]
            for table in ("greedy", "drawn")
        }
        questions = [asdict(question) for question in self.questions]
        path.write_text(json.dumps({"questions": questions, "num_left_out": self.num_left_out, **tables}))

    def read(self, path: Path) -> None:
        values = json.loads(path.read_text())
        self.questions = [Question(**question) for question in values["questions"]]
        self.num_left_out = values["num_left_out"]
        for table in ("greedy", "drawn"):
            getattr(self, table).update({(name, number): Right(**right) for name, number, right in values[table]})


def make_world(folder: Path, *, num_questions: int) -> World:
    """Deltas in `folder`, and the right answers to `num_questions` questions; those that are there are taken."""
    import metier

    world = World(folder)
    kept = folder / "answers.json"
    if kept.exists():
        world.read(kept)
        assert len(world.questions) == num_questions, (
            f"{kept} has {len(world.questions)} questions; take another folder"
        )
        return world
    base = metier.load(BASE, dtype="float32")
    base.model.eval()
    for seed, name in enumerate([*PERMANENT, *SHELF, *SPARE]):
        _make_delta(base.model, name, world.path(name), seed)
    _make_damaged(world)
    world.questions = make_questions(base.tokenizer, num_questions)
    for name in (None, *PERMANENT, *SHELF, *SPARE):
        _answer_all(world, name, merged(base.model, name and world.path(name)), base.tokenizer)
    _check_that_answers_differ(world)
    world.write(kept)
    return world


def _make_delta(model, name: str, folder: Path, seed: int) -> None:
    import peft
    import torch

    from metier.deltas.save import save_delta
    from metier.methods.esft import EsftConfig
    from metier.methods.expert_lora import ExpertLoraConfig
    from metier.models.moe import moe_layers

    kind = {"esft": "esft", "thin": "expert_lora", "lora": "lora"}[name.partition("-")[0]]
    generator = torch.Generator().manual_seed(1000 + seed)
    if kind == "lora":
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "kv_b_proj", "o_proj"])
    else:
        num = EXPERTS_PER_LAYER[kind]
        experts = {
            layer.index: sorted(torch.randperm(layer.num_experts, generator=generator)[:num].tolist())
            for layer in moe_layers(model)
        }
        config = EsftConfig(experts=experts) if kind == "esft" else ExpertLoraConfig(experts=experts, r=4, lora_alpha=8)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(STEPS[kind] * torch.randn(parameter.shape, generator=generator))
    if kind == "lora":
        wrapped.save_pretrained(str(folder))
    else:
        # one as a run on an accelerator would leave it
        save_delta(wrapped, folder, dtype=torch.bfloat16 if name == "esft-2" else None)


def _make_damaged(world: World) -> None:
    """Folders that must be refused, by what is wrong with them, and one good delta outside of the allowed folder."""
    damaged, good = world.folder / "shelf" / "damaged", world.path("esft-3")
    damaged.mkdir(parents=True)
    for wrong in ("flipped", "truncated", "pickled", "foreign", "no-config", "no-tensors"):
        shutil.copytree(good, damaged / wrong)
    tensors = "adapter_model.safetensors"
    data = bytearray((damaged / "flipped" / tensors).read_bytes())
    data[-5] ^= 1
    (damaged / "flipped" / tensors).write_bytes(data)
    (damaged / "truncated" / tensors).write_bytes(data[: len(data) // 2])
    (damaged / "pickled" / "optimizer.pt").write_bytes(b"\x80\x02.")
    config = damaged / "foreign" / "adapter_config.json"
    config.write_text(_another_base(config.read_text()))
    (damaged / "no-config" / "adapter_config.json").unlink()
    (damaged / "no-tensors" / tensors).unlink()
    (damaged / "empty").mkdir()
    shutil.copytree(good, world.folder / "outside" / "esft-3")
    (damaged / "link").symlink_to(world.folder / "outside" / "esft-3")


def _another_base(config: str) -> str:
    """An adapter's configuration with the fingerprint of another base."""
    values = json.loads(config)
    found = [key for key, value in values.items() if "fingerprint" in key and isinstance(value, str)]
    assert found, f"no fingerprint among {sorted(values)}"
    for key in found:
        values[key] = values[key][:-4] + ("0000" if not values[key].endswith("0000") else "1111")
    return json.dumps(values)


def make_questions(tokenizer, num: int) -> list[Question]:
    """Of the embedded tasks' test items: conversations, and in turn with them texts, some over several blocks long."""
    from metier.data.records import load_records
    from metier.evaluation.tasks import load_task

    tasks = [load_records(load_task(task).splits["test"])[:20] for task in ("synopsis", "translate", "sections")]
    records = list(itertools.chain(*zip(*tasks, strict=True)))
    found = []
    for number, record in enumerate(records[:num]):
        messages = [{"role": m.role, "content": m.content} for m in record.messages[:-1]]
        is_chat = number % 2 == 0
        if is_chat:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            several = records[number : number + (8 if number % 6 == 3 else 1)]
            text = "\n\n".join(each.messages[-2].content.strip() for each in several)
            # cut off, so that there is something to go on with
            text = text[: -len(messages[-1]["content"]) // 3].rstrip()
        prompt_ids = tokenizer(text, add_special_tokens=not is_chat).input_ids
        # a few long answers, so that requests are under way when something happens to them
        max_tokens = [16, 8, 24, 12, 64, 10][number % 6]
        found.append(Question(number, is_chat, messages, text, prompt_ids, max_tokens))
    return found


def merged(model, folder: Path | None):
    from peft import PeftModel

    if folder is None:
        return model
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().eval()


def _answer_all(world: World, name: str | None, model, tokenizer) -> None:
    for question in world.questions:
        rights = {"greedy": right_answer(model, tokenizer, question)}
        if question.max_tokens <= _MOST_DRAWN:
            rights["drawn"] = right_answer(model, tokenizer, question, seed=question.number)
        for table, right in rights.items():
            if right is None:
                world.num_left_out += 1
            else:
                getattr(world, table)[name, question.number] = right


def _check_that_answers_differ(world: World) -> None:
    """An answer of a wrong delta must be seen: any two say the same to less than half of the questions."""
    for one, other in itertools.combinations([None, *PERMANENT, *SHELF, *SPARE], 2):
        both = [q.number for q in world.questions if {(one, q.number), (other, q.number)} <= world.greedy.keys()]
        same = sum(world.greedy[one, q].text == world.greedy[other, q].text for q in both)
        assert same < len(both) / 2, f"{one} and {other} say the same to {same} of {len(both)} questions"
