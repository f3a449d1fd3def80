"""The whole walk of one family: a tiny random base, through every step from the profile to the merged model.

Each step either passes or raises; `run_chain` tells how far a family came, and why not further.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import metier
from families.configs import tiny_config
from families.discovery import model_type
from families.fresh import FreshProcesses
from metier.data.message import Message, Record
from metier.deltas.save import save_delta
from metier.models.moe import MoELayer
from tiny_models import VOCAB_SIZE, tiny_tokenizer

STEPS = (
    "load",
    "profile",
    "select",
    "train",
    "only those rows",
    "save",
    "fresh process",
    "merge",
    "plain transformers",
)

TOLERANCE = 1e-5
"""Of the largest logit, float32: the same sums, in another order where the merged model runs transformers' own code."""
MIN_EFFECT = 100 * TOLERANCE
"""What training has to change at least, or equal logits would prove nothing."""

MAX_PARAMETERS = 5_000_000

_TEXTS = ("the quick brown fox jumps over", "a lazy dog, twice", "0123456789 and so on", "!?", "then it was all over")


_SKIPPING = ("zaya", "switch_transformers")
"""Families whose routers send some slots to no expert."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainResult:
    """How far one family came."""

    family: str
    class_name: str
    """Of the model; empty where none could be loaded."""
    layout: str
    """How the experts' parameters are laid out, in words; empty where there are none that metier sees."""
    num_passed: int
    """Of STEPS, in order."""
    reason: str
    """Why the next step did not pass, in one line; empty where all did."""
    error: Exception | None


def run_chain(family: str, folder: Path, processes: FreshProcesses) -> ChainResult:
    """Every step on a tiny model of `family`, in `folder`, until one does not pass."""
    chain, num_passed, error = _Chain(family, folder, processes), 0, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random text makes a random profile
        try:
            for step in STEPS:
                getattr(chain, step.replace(" ", "_"))()
                num_passed += 1
        except Exception as raised:
            error = raised
    return ChainResult(
        family=family,
        class_name=chain.class_name,
        layout=chain.layout,
        num_passed=num_passed,
        reason="" if error is None else _one_line(error).replace(str(chain.base), "the model"),
        error=error,
    )


class _Chain:
    """One method a step, in the order of STEPS; each raises if its step does not pass."""

    def __init__(self, family: str, folder: Path, processes: FreshProcesses) -> None:
        self.family, self.processes = family, processes
        self.base, self.adapter, self.merged = folder / "base", folder / "adapter", folder / "merged"
        self.tokens_file = folder / "tokens.pt"
        self.class_name = self.layout = ""
        self.inputs = {"input_ids": random_tokens(seed=7)}

    def load(self) -> None:
        """A tiny random base is saved as its publisher would, and loaded by metier."""
        kind = model_type(self.family)
        assert kind is not None, f"{self.family} has no model for language"
        made = made_model(tiny_config(kind))
        self.class_name = type(made).__name__
        made.save_pretrained(self.base)
        tiny_tokenizer().save_pretrained(self.base)
        if made.config.is_encoder_decoder:
            self.inputs["decoder_input_ids"] = random_tokens(seed=8)
        torch.save(self.inputs, self.tokens_file)
        self.loaded = metier.load(self.base)
        self.model = self.loaded.model
        self.layers = metier.moe_layers(self.model)
        self.layout = _layout(self.layers[0])
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        # where a checkpoint has a tensor an expert, the state dict has too
        self.stacks = {name: p.detach().clone() for name, p in self.model.named_parameters() if ".experts." in name}
        self.base_logits = self._logits(self.model)

    def profile(self) -> None:
        """Every token is counted in every layer; of an encoder-decoder, in every layer of the stack that reads it."""
        records = [_record(text) for text in _TEXTS]
        self.profiled = metier.profile(
            self.model, self.loaded.tokenizer, records * 4, num_tokens=256, max_length=32, batch_size=4
        )
        counts_L = self.profiled.token_counts_HLE.sum((0, 2))
        wanted = self.profiled.num_tokens * self.profiled.top_k
        if self.model.config.model_type in _SKIPPING:
            assert all(0 < count <= wanted for count in counts_L.tolist()), f"counted {counts_L.tolist()} of {wanted}"
            return
        if self.model.config.is_encoder_decoder:
            stacks = [
                [c for c, x in zip(counts_L.tolist(), self.layers, strict=True) if x.in_encoder == e]
                for e in (False, True)
            ]
            assert [len(set(stack)) for stack in stacks] == [1, 1], f"counted {counts_L.tolist()}"
            assert stacks[0][0] + stacks[1][0] == wanted, f"counted {counts_L.tolist()}, not {wanted} in both stacks"
            return
        assert counts_L.tolist() == [wanted] * len(self.layers), f"counted {counts_L.tolist()}, not {wanted} a layer"

    def select(self) -> None:
        """Some experts of every layer, and not all."""
        self.selection = metier.select(self.profiled, metier.SelectionConfig(score="token", top_p=0.5))
        self.selection.validate(self.model)
        for layer in self.layers:
            assert 0 < len(self.selection.experts[layer.index]) < layer.num_experts, f"{self.selection.experts}"

    def train(self) -> None:
        """Three AdamW steps with a heavy weight decay over whatever wants gradients."""
        self.wrapped = peft.get_peft_model(self.model, metier.EsftConfig.from_selection(self.selection))
        self.wrapped.train()
        trained = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
        for step in range(3):
            ids_BS = random_tokens(seed=step)
            self.wrapped(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), labels=ids_BS).loss.backward()
            for parameter in trained:
                assert parameter.grad is not None, "a trained row has no gradient"
                assert parameter.grad.isfinite().all(), "a gradient is not finite"
            optimizer.step()
            optimizer.zero_grad()
        self.trained_logits = self._logits(self.wrapped)
        effect = _difference(self.trained_logits, self.base_logits)
        assert effect > MIN_EFFECT, f"training moved the logits by {effect:.1e} of the largest, which proves nothing"

    def only_those_rows(self) -> None:
        """Each selected row of each parameter moved; every other tensor is the base's, to the bit."""
        for layer in metier.moe_layers(self.wrapped):
            ids = sorted(self.selection.experts[layer.index])
            for name in layer.parameter_names():
                rows = layer.entry.get_submodule(f"esft_{name}")["default"].detach()
                moved = (rows != self.stacks[f"{layer.path}.{name}"][ids]).flatten(1).any(1)
                assert moved.all(), f"{layer.path}.{name}: rows {ids} moved: {moved.tolist()}"
        after = self._base_state()
        assert after.keys() == self.before.keys(), f"{after.keys() ^ self.before.keys()}"
        changed = [name for name, tensor in after.items() if not torch.equal(tensor, self.before[name])]
        assert not changed, f"training changed {changed}"

    def save(self) -> None:
        """The delta, as metier and PEFT read it."""
        save_delta(self.wrapped, self.adapter)

    def fresh_process(self) -> None:
        """The base and the delta, loaded in a new process, give the trained logits."""
        self._same(self.processes.logits(self.base, self.tokens_file, adapter=self.adapter))

    def merge(self) -> None:
        """The delta's rows in the base's place, saved as an ordinary model."""
        metier.merge(self.adapter, self.base, self.merged)

    def plain_transformers(self) -> None:
        """A new process without metier loads the merged model and gives the trained logits."""
        self._same(self.processes.logits(self.merged, self.tokens_file))

    def _base_state(self) -> dict[str, Tensor]:
        state = self.wrapped.get_base_model().state_dict()
        return {name.replace(".base_layer.", "."): t for name, t in state.items() if ".esft_" not in name}

    def _logits(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            logits_BSV: Tensor = model(**self.inputs).logits
        return logits_BSV

    def _same(self, logits_BSV: Tensor) -> None:
        got = _difference(logits_BSV, self.trained_logits)
        assert got <= TOLERANCE, f"the logits differ by {got:.1e} of the largest, expected at most {TOLERANCE:.0e}"


def made_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model, if it is tiny: a size that `tiny_config` does not know may make it the real one."""
    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto_class = AutoModelForCausalLM
    else:
        is_seq2seq = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        auto_class = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForMultimodalLM
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in auto_class.from_config(config).named_parameters()}
    largest = max(sizes, key=sizes.__getitem__)
    assert sum(sizes.values()) < MAX_PARAMETERS, f"not tiny: {largest} alone has {sizes[largest]} parameters"
    torch.manual_seed(0)
    made: PreTrainedModel = auto_class.from_config(config)
    return made


def _layout(layer: MoELayer) -> str:
    words = {
        "gate": layer.has_gate,
        "bias": layer.has_bias,
        "transposed": layer.is_transposed,
        "interleaved": layer.has_gate and not layer.is_concatenated,
        "norm after": layer.has_post_expert_norm,
    }
    return ", ".join(word for word, holds in words.items() if holds) or "no gate"


def _one_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _record(text: str) -> Record:
    messages = (Message(role="user", content=text), Message(role="assistant", content=text[::-1]))
    return Record(messages=messages, origin="families")


def random_tokens(seed: int) -> Tensor:
    return torch.randint(6, VOCAB_SIZE, (4, 33), generator=torch.Generator().manual_seed(seed))


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())
