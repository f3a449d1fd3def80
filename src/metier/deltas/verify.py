"""Check a delta against its base: the promises that metier makes about what a run leaves behind, one by one."""

# B sequences, S tokens of one, V vocabulary

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from metier.deltas.changes import changed_parameters, merged_rows
from metier.deltas.fresh_process import logits_in_a_fresh_process
from metier.deltas.on_base import check_experts, check_fingerprint, check_tensors, rows_not_finite, rows_not_moved
from metier.deltas.probe import TOLERANCES, largest_difference, logits_of, probe_tokens
from metier.deltas.read import Delta, read_delta
from metier.deltas.save import save_delta
from metier.deltas.verify_report import Check, VerifyReport
from metier.errors import ConfigError, MetierError
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from metier.models.load import LoadedModel, load
from metier.models.moe import moe_layers
from metier.models.unwrap import base_tensors

FILES = "files are intact"
FINGERPRINT = "the base is the one it was trained on"
EXPERTS = "every selected expert exists"
TENSORS = "nothing but selected rows"
FINITE = "every value is finite"
MOVED = "every selected row moved"
DIFFERS = "answers differ from the base's"
FRESH = "saved and loaded in a fresh process: same answers"
MERGED = "merged: same answers"
UNMERGED = "unmerged: the base's bits again"
ZERO = "a delta of zero changes no bit"

_ON_BASE = (FINGERPRINT, EXPERTS, TENSORS, FINITE)
_RUNNING = (DIFFERS, FRESH, MERGED, UNMERGED, ZERO)
_MAX_LISTED = 8

_Result = TypeVar("_Result")


def verify(
    delta: str | Path,
    base: str | Path | LoadedModel,
    *,
    tolerance: float | None = None,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Run every check of a delta on its base. A delta that fails is reported, not raised: see `raise_if_failed`.

    Logits are compared on a fixed batch of 4 × 64 random tokens. "The same answers" allows a difference up to
    `tolerance`, and never more than half of what the delta changes.

    Args:
        delta: the adapter's folder.
        base: a folder, a hub id, "embedded", or a model from `metier.load`, which is given back as it was. A fresh
            process loads it again from its source.
        tolerance: largest difference of two logits, as a share of the base's largest logit; None takes that of the
            base's dtype from `metier.deltas.probe.TOLERANCES`.
        trust_remote_code: as `metier.load`.

    Raises:
        ConfigError: `tolerance` is negative.
        ModelError: the base cannot be loaded, or has no expert layers.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ConfigError(f"tolerance: got {tolerance}, expected a share of the largest logit, 0 or more.")
    folder, checks = Path(delta), list[Check]()
    files = _attempt(checks, FILES, lambda: read_delta(folder))
    if files is None:  # then there is no need to load a base, which may be large
        _skip(checks, (*_ON_BASE, MOVED, *_RUNNING), FILES)
        source = base.source if isinstance(base, LoadedModel) else str(base)
        return VerifyReport(delta=str(folder), base=source, checks=tuple(checks))
    loaded = base if isinstance(base, LoadedModel) else load(base, trust_remote_code=trust_remote_code)
    sums = "and fit their sums" if files.has_sums else "but carry no sums to check them by (PEFT wrote them)"
    checks[-1] = Check(name=FILES, status="passed", sentence=f"Both files are whole, fit each other, {sums}.")
    if _fits(checks, files, loaded):
        _check_moved(checks, files, loaded.model)
        limit = TOLERANCES.get(loaded.model.dtype, TOLERANCES[torch.bfloat16]) if tolerance is None else tolerance
        _Running(checks, files, loaded, limit, trust_remote_code).run()
    return VerifyReport(delta=str(folder), base=loaded.source, checks=tuple(checks))


def _fits(checks: list[Check], delta: Delta, base: LoadedModel) -> bool:
    num_selected = sum(len(ids) for ids in delta.config.experts.values())
    _attempt(checks, FINGERPRINT, lambda: check_fingerprint(delta, base.model, base.source), "The fingerprints agree.")
    found = f"{num_selected} experts in {len(delta.config.experts)} layers are all in the base."
    _attempt(checks, EXPERTS, lambda: check_experts(delta, base.model, base.source), found)
    kind = "rows of each stacked parameter" if delta.config.low_rank is None else "experts' factors"
    found = f"{len(delta.tensors)} tensors: the selected {kind}, in the base's shapes."
    _attempt(checks, TENSORS, lambda: check_tensors(delta, base.model), found)
    bad = rows_not_finite(delta)
    _note(checks, FINITE, not bad, f"Not so in {_listed(bad)}." if bad else "No value is infinite or not a number.")
    failed = [check.name for check in checks if check.status == "failed"]
    if failed:
        _skip(checks, (MOVED, *_RUNNING), failed[0])
    return not failed


def _check_moved(checks: list[Check], delta: Delta, model: nn.Module) -> None:
    still = list(rows_not_moved(delta, model))
    if still:
        sentence = f"{len(still)} rows are the base's to the bit: {_listed(still)}."
    else:
        sentence = "Each differs from the base's row in the base's dtype."
    _note(checks, MOVED, not still, sentence)


class _Running:
    """The checks that run the model. Each leaves the model as it found it."""

    def __init__(
        self, checks: list[Check], delta: Delta, base: LoadedModel, tolerance: float, trust_remote_code: bool
    ) -> None:
        self.checks, self.delta, self.base = checks, delta, base
        self.trust_remote_code = trust_remote_code
        self.tokens_BS = probe_tokens(base.model)
        self.base_sum = state_sum(base.model)
        self.base_BSV = logits_of(base.model, self.tokens_BS)
        self.limit = tolerance * float(self.base_BSV.abs().max())

    def run(self) -> None:
        training = self.base.model.training
        wanted_gradient = {name for name, p in self.base.model.named_parameters() if p.requires_grad}
        wrapped = PeftModel.from_pretrained(self.base.model, str(self.delta.folder))
        try:
            self.delta_BSV = logits_of(wrapped, self.tokens_BS)
            self._differs()
            self._fresh(wrapped)
            self._merged_and_unmerged(wrapped)
            self._zero(wrapped)
        finally:
            wrapped.unload()
            self.base.model.train(training)
            for name, parameter in self.base.model.named_parameters():
                parameter.requires_grad_(name in wanted_gradient)

    def _differs(self) -> None:
        self.effect = largest_difference(self.delta_BSV, self.base_BSV)
        found = f"The largest difference of a logit on {self.tokens_BS.numel()} tokens is {self.effect:.3g}."
        _note(self.checks, DIFFERS, self.effect > 0, found)

    def _fresh(self, wrapped: PeftModel) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "adapter"
            save_delta(wrapped, copy)
            try:
                got_BSV = logits_in_a_fresh_process(
                    self.base, copy, self.tokens_BS, trust_remote_code=self.trust_remote_code
                )
            except MetierError as error:
                _note(self.checks, FRESH, False, str(error))
                return
        _note(self.checks, FRESH, *self._same(got_BSV))

    def _merged_and_unmerged(self, wrapped: PeftModel) -> None:
        expected = self._expected_rows()
        wrapped.merge_adapter()
        got_BSV = logits_of(wrapped, self.tokens_BS)
        num_there = sum(
            torch.equal(got, row)
            for layer in moe_layers(wrapped)
            for name in changed_parameters(self.delta, layer)
            for expert, row in expected.get((layer.index, name), {}).items()
            for got in [getattr(layer.experts, name).detach()[expert]]
        )
        wrapped.unmerge_adapter()
        is_same, found = self._same(got_BSV)
        num_rows = sum(map(len, expected.values()))
        _note(
            self.checks, MERGED, is_same and num_there == num_rows, f"{num_there} of {num_rows} rows written. {found}"
        )
        with wrapped.disable_adapter():
            off_BSV = logits_of(wrapped, self.tokens_BS)
        is_base = state_sum(wrapped) == self.base_sum and torch.equal(off_BSV, self.base_BSV)
        found = "All tensors and the logits are" if is_base else "The tensors or the logits are not"
        _note(self.checks, UNMERGED, is_base, f"{found} the base's to the bit.")

    def _expected_rows(self) -> dict[tuple[int, str], dict[int, Tensor]]:
        """By layer and stacked parameter, then by expert: the row that a merge has to leave in the base."""
        rows, expected = self.delta.load_rows(), {}
        for layer in moe_layers(self.base.model):
            ids = self.delta.config.experts.get(layer.index, ())
            for name in changed_parameters(self.delta, layer) if ids else ():
                merged = merged_rows(self.delta, rows, layer, name)
                expected[layer.index, name] = dict(zip(ids, merged, strict=True))
        return expected

    def _zero(self, wrapped: PeftModel) -> None:
        name, own = "metier-zero", wrapped.active_adapter
        experts = {layer: list(ids) for layer, ids in self.delta.config.experts.items()}
        low_rank = self.delta.config.low_rank
        zero = EsftConfig(experts=experts) if low_rank is None else ExpertLoraConfig(experts=experts, r=low_rank.r)
        wrapped.add_adapter(name, zero)
        wrapped.set_adapter(name)
        zero_BSV = logits_of(wrapped, self.tokens_BS)
        wrapped.set_adapter(own)
        wrapped.delete_adapter(name)
        difference = largest_difference(zero_BSV, self.base_BSV)
        what = "The base's own rows as a delta" if low_rank is None else "Changes of zero"
        found = f"{what} change a logit by {difference:.3g} at most."
        _note(self.checks, ZERO, torch.equal(zero_BSV, self.base_BSV), found)

    def _same(self, got_BSV: Tensor) -> tuple[bool, str]:
        if torch.equal(got_BSV, self.delta_BSV):
            return True, "The logits are the same bits."
        difference = largest_difference(got_BSV, self.delta_BSV)
        # a tolerance wider than what the delta does would take the base's own logits for the delta's
        limit = min(self.limit, self.effect / 2)
        found = f"The largest difference of a logit is {difference:.3g}, allowed are {limit:.3g}."
        return difference <= limit, found


def state_sum(model: nn.Module) -> str:
    """sha256 over all parameters and saved buffers of the base in `model`, wrapped or not."""
    digest = hashlib.sha256()
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, tensor in base_tensors(root):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _attempt(checks: list[Check], name: str, action: Callable[[], _Result], sentence: str = "") -> _Result | None:
    try:
        result = action()
    except MetierError as error:
        _note(checks, name, False, str(error))
        return None
    _note(checks, name, True, sentence)
    return result


def _note(checks: list[Check], name: str, is_kept: bool, sentence: str) -> None:
    checks.append(Check(name=name, status="passed" if is_kept else "failed", sentence=sentence))


def _skip(checks: list[Check], names: tuple[str, ...], because: str) -> None:
    checks.extend(Check(name=name, status="skipped", sentence=f"Not run: not so that {because}.") for name in names)


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more
