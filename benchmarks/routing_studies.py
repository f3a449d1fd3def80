"""The ESFT paper's three studies of routing, and drift: on DeepSeek-V2-Lite's published logs and on the embedded model.

    python benchmarks/routing_studies.py [--skip-training]     about fifteen minutes on two cores

Concentration (figure 2): what a layer's top experts hold. Shared experts (figure 3): how many top experts two tasks
have in common. Granularity (figure 7): experts that work together are grouped by 1, 2 and 4 and selected as one; what
share of the routed experts is then trained, and on the embedded model what ESFT scores with it (task synopsis, one
pass, seed 0, the settings of quality.py, learning rate 2e-3). Drift: routing before and after the training with single
experts, on the task's records and on general text.

Writes results/routing_studies.md, and a page and JSON for each model: results/routing_deepseek_v2_lite/,
results/routing_embedded/. The logs lie in ../shared/data beside the checkout; without them that half is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from io import StringIO
from pathlib import Path

import numpy as np
import peft
import torch
from quality import TOP_P, measure, run_config
from quality_report import forgetting as forgetting_of
from rich.console import Console
from torch import Tensor

import metier
from metier import embedded
from metier.data.records import load_records
from metier.models.moe import moe_layers
from metier.reports.analysis import write_analysis
from metier.routing.analysis import Analysis, analyse
from metier.routing.granularity import coactivation_EE, group_experts, pick_groups
from metier.routing.profile import RoutingProfile, profile_routing
from metier.routing.selection import ExpertSelection
from metier.training.run import train

RESULTS = Path(__file__).parent / "results"
LOGS = Path(__file__).parents[2] / "shared" / "data" / "deepseek_v2_lite_routing"
TASKS = ("synopsis", "translate", "sections")
GRAINS = (1, 2, 4)
LEARNING_RATE = 2e-3
PROFILE_TOKENS, DRIFT_TOKENS = 65_536, 32_768


def deepseek() -> tuple[dict[str, RoutingProfile], dict[str, Tensor]]:
    """Profiles and expert ids (layers, tokens, top_k) of the published logs."""
    profiles, ids = {}, {}
    for path in sorted(LOGS.glob("*.npz")):
        log = np.load(path)
        ids[path.stem] = torch.from_numpy(log["expert_ids_LTK"])
        profiles[path.stem] = profile_routing(
            ids[path.stem],
            torch.from_numpy(log["routing_weights_LTK"]),
            layer_ids=list(range(1, len(ids[path.stem]) + 1)),
            num_experts=64,
            sample_lengths=log["sample_lengths"].tolist(),
        )
    return profiles, ids


def profiled(loaded, records, num_tokens: int) -> tuple[RoutingProfile, Tensor]:
    """A profile, and the expert ids that went into it."""
    layers, found = moe_layers(loaded.model), {}
    handles = [
        layer.entry.register_forward_pre_hook(
            lambda _, args, i=layer.index: found.setdefault(i, []).append(args[1].to(torch.int16))
        )
        for layer in layers
    ]
    profile = metier.profile(loaded.model, loaded.tokenizer, records, num_tokens=num_tokens, max_length=512)
    for handle in handles:
        handle.remove()
    return profile, torch.stack([torch.cat(found[layer.index]) for layer in layers])


def grouped(profile: RoutingProfile, ids_LTK: Tensor, size: int, top_p: float) -> ExpertSelection:
    """The experts of the groups that cover `top_p` of each layer."""
    experts = {}
    for row, layer in enumerate(profile.layer_ids):
        groups = group_experts(coactivation_EE(ids_LTK[row], num_experts=profile.num_experts), group_size=size)
        experts[layer] = tuple(sorted(pick_groups(profile.scores_LE("token")[row].tolist(), groups, top_p=top_p)))
    return ExpertSelection(experts=experts, num_experts=profile.num_experts)


def trained_share(selection: ExpertSelection) -> float:
    return selection.num_selected / (len(selection.experts) * selection.num_experts)


def train_on(selection: ExpertSelection, folder: Path):
    """ESFT on those experts, as quality.py trains."""
    config = run_config(folder, "synopsis", learning_rate=LEARNING_RATE, selection=selection)
    return train(config, console=Console(file=StringIO()))


def share_table(title: str, rows: dict[str, list[float]], head: list[str]) -> list[str]:
    lines = [f"| {title} | {' | '.join(head)} |", "|-" * (len(head) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(f'{value:.0%}' for value in row)} |" for name, row in rows.items()] + [""]


def described(analysis: Analysis) -> list[str]:
    """Concentration and shared experts of one model as tables."""
    ranks = sorted(next(iter(analysis.profiles.values())).top_share)
    rows = {n: [statistics.mean(f.top_share[r]) for r in ranks] for n, f in analysis.profiles.items()}
    rows["if uniform"] = [rank / analysis.num_experts for rank in ranks]
    head = [f"top {rank} of {analysis.num_experts}" for rank in ranks]
    lines = ["Share of routed tokens, mean of layers:", "", *share_table("profile", rows, head)]
    chance = analysis.shared[0].chance
    lines += [f"Shared of the top {analysis.top}, mean of layers (chance {chance:.2f}):", ""]
    lines += ["| profiles | shared | least, most of a layer |", "|-|-|-|"]
    lines += [
        f"| {p.first}, {p.second} | {p.mean:.2f} | {min(p.by_layer)}, {max(p.by_layer)} |" for p in analysis.shared
    ]
    return [*lines, ""]


def deepseek_part() -> list[str]:
    profiles, ids = deepseek()
    if not profiles:
        return ["The published logs are not at hand, so this half was not measured.", ""]
    analysis = analyse(profiles)
    write_analysis(RESULTS / "routing_deepseek_v2_lite", analysis, profiles)
    shares = {n: [trained_share(grouped(p, ids[n], size, 0.2)) for size in GRAINS] for n, p in profiles.items()}
    head = [f"groups of {size}" for size in GRAINS]
    return [
        *described(analysis),
        "Trained share of the routed experts at top_p 0.2, by grain:",
        "",
        *share_table("task", shares, head),
    ]


def embedded_part(skip_training: bool) -> list[str]:
    base = metier.load("embedded", dtype="float32")
    profiles, ids = {}, {}
    for task in TASKS:
        records = load_records(embedded.task_path(task, "train"))
        profiles[task], ids[task] = profiled(base, records, PROFILE_TOKENS)
    general = load_records(embedded.mix_path())
    profiles["general"], _ = profiled(base, general, PROFILE_TOKENS)
    selections = {size: grouped(profiles["synopsis"], ids["synopsis"], size, TOP_P) for size in GRAINS}
    shares = {n: [trained_share(grouped(profiles[n], ids[n], size, TOP_P)) for size in GRAINS] for n in TASKS}
    head = [f"groups of {size}" for size in GRAINS]
    lines = [f"Trained share of the routed experts at top_p {TOP_P}, by grain:", ""]
    lines += share_table("task", shares, head)
    drifts: list[tuple[str, str]] = []
    if not skip_training:
        before = measure(base.model, base.tokenizer, "synopsis")
        lines += ["ESFT at each grain, task synopsis, seed 0:", ""]
        lines += ["| grain | trained experts | ROUGE-L | gain | forgetting, bits a byte |", "|-|-|-|-|-|"]
        for size, selection in selections.items():
            with tempfile.TemporaryDirectory() as name:
                result = train_on(selection, Path(name))
                after = measure(result.model, result.tokenizer, "synopsis")
                score, start = after["test"]["rouge_l"], before["test"]["rouge_l"]
                lines.append(
                    f"| {size} | {selection.num_selected} ({trained_share(selection):.0%}) | {score:.2f} "
                    f"| {score - start:+.2f} | {forgetting_of(after, before):+.4f} |"
                )
                print(lines[-1], flush=True)
                if size == 1:
                    fresh = metier.load("embedded", dtype="float32")
                    tuned = peft.PeftModel.from_pretrained(fresh.model, str(Path(name) / "run" / "adapter")).eval()
                    for task, records in (
                        ("synopsis", load_records(embedded.task_path("synopsis", "train"))),
                        ("general", general),
                    ):
                        options = {"num_tokens": DRIFT_TOKENS, "max_length": 512}
                        profiles[f"{task} before"] = metier.profile(base.model, base.tokenizer, records, **options)
                        profiles[f"{task} after"] = metier.profile(tuned, fresh.tokenizer, records, **options)
                        drifts.append((f"{task} before", f"{task} after"))
        lines += ["", f"The base has {before['test']['rouge_l']:.2f}.", ""]
    shown = {name: profile for name, profile in profiles.items() if " " not in name}
    analysis = analyse(profiles, drifts=drifts)
    write_analysis(RESULTS / "routing_embedded", analysis, profiles)
    for name, drift in analysis.drifts.items():
        moved = statistics.mean(layer.moved_share for layer in drift.layers)
        kept = statistics.mean(layer.num_shared_top for layer in drift.layers)
        most = drift.moves[0]
        lines += [
            f"Drift, {name}: {moved:.1%} of routing went to other experts, {kept:.1f} of the top {drift.top} stayed; "
            f"most moved expert {most.expert} of layer {most.layer}, from {most.before:.1%} to {most.after:.1%}.",
            "",
        ]
    return [*described(analyse(shown)), *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-training", action="store_true", help="leave out scores by grain, and drift")
    args = parser.parse_args()
    lines = ["# Routing studies", "", "    python benchmarks/routing_studies.py", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += ["## DeepSeek-V2-Lite, published logs", "", *deepseek_part()]
    lines += ["## The embedded model", "", *embedded_part(args.skip_training)]
    if args.skip_training:
        lines += ["Scores by grain, and drift, are not in yet: this was run with --skip-training.", ""]
    (RESULTS / "routing_studies.md").write_text("\n".join(lines))
    print(json.dumps({"written": str(RESULTS / "routing_studies.md")}))


if __name__ == "__main__":
    main()
