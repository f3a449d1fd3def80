# ruff: noqa: E501  (a card is one text)
"""Measure the finished model and write its card: loss by domain, routing by domain and task, limits.

    python recipes/embedded/model_card.py --run RUN        writes src/metier/embedded/model/README.md

RUN is the folder of `pretrain.py`, for the course of the loss and the balance of the experts.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

import metier
from metier import embedded
from metier.data.message import Record
from metier.data.records import load_records
from metier.evaluation.evaluate import evaluate
from metier.evaluation.general import domain_files, read_documents
from metier.routing.profile import RoutingProfile
from metier.routing.statistics import shared_top_k, top_share

NUM_TOP = 6
PAPER_TOP_6 = {"intent": 0.33, "law": 0.28, "summary": 0.28, "translation": 0.51}
"""Normalised gate mass of the top 6 of DeepSeek-V2-Lite's 64 experts, mean over layers, from the published routing logs."""

PAPER_SHARED = "0.38 to 1.46"
"""Experts that two of those tasks' top 6 share, mean over layers; chance is 0.56 of 6."""


def profiles(model, tokenizer) -> dict[str, RoutingProfile]:
    """Routing on the held-out text of every domain, and on the training records of every task."""
    measured = {}
    for domain, path in domain_files(embedded.general_path()).items():
        records = [Record(messages=(), tools=None, origin=domain, text=text) for text in read_documents(path)]
        measured[domain] = metier.profile(model, tokenizer, records, max_length=512)
    for task in embedded.task_names():
        records = load_records(embedded.task_path(task, "train"))
        measured[f"task {task}"] = metier.profile(model, tokenizer, records, num_tokens=65_536, max_length=512)
    return measured


def routing_table(measured: dict[str, RoutingProfile]) -> list[str]:
    rows = ["| text | top-6 share of gate mass, mean | by layer | tokens |", "|-|-|-|-|"]
    for name, profile in measured.items():
        share_L = top_share(profile.scores_LE("gate"), NUM_TOP)
        layers = " ".join(f"{value:.2f}" for value in share_L.tolist())
        rows.append(f"| {name} | {share_L.mean():.2f} | {layers} | {profile.num_tokens:,} |")
    return rows


def overlap_lines(measured: dict[str, RoutingProfile], names: list[str]) -> list[str]:
    pairs = {
        (a, b): shared_top_k(measured[a].scores_LE("gate"), measured[b].scores_LE("gate"), NUM_TOP)
        .float()
        .mean()
        .item()
        for a, b in combinations(names, 2)
    }
    least, most = min(pairs, key=pairs.__getitem__), max(pairs, key=pairs.__getitem__)
    mean = sum(pairs.values()) / len(pairs)
    return [
        f"mean {mean:.2f} of 6 (chance {NUM_TOP * NUM_TOP / 32:.2f}); least {pairs[least]:.2f} ({least[0]} and {least[1]}), "
        f"most {pairs[most]:.2f} ({most[0]} and {most[1]})"
    ]


def least_share(measured: dict[str, RoutingProfile]) -> float:
    """The smallest share of routing slots that any expert has over all domains, each domain counting once."""
    ratio_LE: Tensor = torch.stack([p.scores_LE("token") for p in measured.values()]).mean(0)
    return ratio_LE.min().item()


def num_dead(measured: dict[str, RoutingProfile]) -> int:
    """Experts that no token of any domain was sent to."""
    counts_LE = torch.stack([p.token_counts_HLE.sum(0) for p in measured.values()]).sum(0)
    return int((counts_LE == 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args()
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    last = log[-1]
    model, tokenizer = metier.load("embedded", dtype="float32")
    scores = evaluate(model, tokenizer, task=None, general=True)
    measured = profiles(model, tokenizer)
    domains = [name for name in measured if not name.startswith("task ")]
    tasks = [name for name in measured if name.startswith("task ")]
    num_parameters = sum(p.numel() for p in model.parameters())
    loss_rows = [
        f"| {name} | {loss.bits_per_byte:.3f} | {loss.low:.3f} to {loss.high:.3f} |"
        for name, loss in scores.domains.items()
    ]
    card = f"""---
library_name: transformers
license: other
tags: [mixture-of-experts, deepseek_v2]
---

# metier's embedded model

A small Mixture-of-Experts language model for demonstrating, testing and measuring metier offline. It is not made to be
used for anything else.

- **Architecture**: DeepSeek-V2 (`deepseek_v2`), {num_parameters / 1e6:.1f}M parameters: 6 decoder layers, hidden size 256, each with 32 routed
  experts of width 96 (top-4, gates not renormalised, scaled by 2) and 2 shared ones; latent attention; byte-level BPE with
  8,192 entries, tied embeddings; 1,024 positions, trained on sequences of 512.
- **Pretraining**: {last["tokens"]:,} tokens in steps of 12,288, Muon and AdamW, balancing loss 0.03, the learning rate
  decayed to zero twice: at 10.3 million tokens, and after a new warm-up from there at the end. Last training loss
  {sum(r["loss"] for r in log[-20:]) / 20:.3f} (mean of 20 steps).
- **Data**: package descriptions of Debian in six languages, Python source, manuals, WordNet, the King James Bible, and a
  little dialogue made from them. `docs/embedded.md` has sources, licences and shares; the recipe is `recipes/embedded/`.
- **Licence**: the data have many licences, most of them free software licences of Debian's `main`; whether and how they
  bind the weights is unsettled. Nothing but Debian's `main` went in.

## Held-out loss

| domain | bits a byte | 95% interval |
|-|-|-|
{chr(10).join(loss_rows)}

Mean {scores.bits_per_byte:.3f}. Cloze test (four options, chance 25): {scores.cloze.accuracy:.1f} ({scores.cloze.low:.1f} to {scores.cloze.high:.1f}).

## Routing

Share of a layer's gate mass that its 6 busiest of 32 experts hold (even routing: 0.19). DeepSeek-V2-Lite's top 6 of 64 hold
{", ".join(f"{v:.2f} ({k})" for k, v in PAPER_TOP_6.items())} on the tasks of the ESFT paper (even: 0.09).

{chr(10).join(routing_table(measured))}

Experts of the top 6 that two texts share, mean over layers: between domains {overlap_lines(measured, domains)[0]};
between tasks {overlap_lines(measured, tasks)[0]}. DeepSeek-V2-Lite's tasks share {PAPER_SHARED} of 6 (chance 0.56).

Over all domains the least used expert gets {least_share({n: measured[n] for n in domains}):.2%} of a layer's routing slots (even: 3.1%); {num_dead({n: measured[n] for n in domains})}
of 192 experts get none. In the last training step the busiest had {last["most_share"]:.1%} and the least busy {last["least_share"]:.2%}; the balancing loss was {last["balancing"]:.3f} (even: 1).

## Limits

It has read little and is small: it writes package descriptions, not answers. Of Slovak it saw only 1.2% of its tokens. It
knows the chat template from translations and definitions alone.
"""
    (embedded.model_path() / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
