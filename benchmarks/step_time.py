"""Step time and memory: ESFT against full fine-tuning and LoRA on all experts, on an OLMoE-shaped model.

    python benchmarks/step_time.py            about five minutes on two cores; writes benchmarks/results/step_time.md

Hidden size 1024, 64 experts of 512, top-8, two layers, bf16, 4 x 512 tokens, six experts a layer trained. The
vocabulary has 6,288 entries, so that the output layer weighs against two layers what OLMoE's 50,304 weigh against its
sixteen. Every side runs in processes of its own, in turn, so that a drifting machine hits all alike and peak memory is
its own. Every step has another batch. AdamW is torch's fused one everywhere. Full fine-tuning is measured with each
backend of transformers that fits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

SIDES = ("esft", "full grouped_mm", "full eager", "lora grouped_mm")
RESULTS = Path(__file__).parent / "results" / "step_time.md"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
BATCH, LENGTH, VOCAB, LAYERS, EXPERTS_TRAINED = 4, 512, 6288, 2, 6
WARMUP, STEPS = 3, 5


def olmoe(layers: int, backend: str):
    """A random OLMoE-shaped model in bf16, its router spread out as a trained one's is."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.1)
    model.set_experts_implementation(backend)
    return model


def build(side: str):
    """The side's model, wanting gradients where the method trains."""
    import peft

    from metier.methods.esft import EsftConfig

    method, _, backend = side.partition(" ")
    model = olmoe(LAYERS, backend or "grouped_mm")
    if method == "esft":
        model = peft.get_peft_model(model, EsftConfig(experts=busiest(model, EXPERTS_TRAINED)))
    elif method == "lora":
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=names)
        )
    return model.train()


def busiest(model, num_experts: int) -> dict[int, list[int]]:
    """The experts of each layer that get most tokens of the batch: what a selection would pick."""
    import torch

    from metier.models.moe import moe_layers

    chosen, handles = {}, []
    for layer in moe_layers(model):

        def record(module, inputs, *, index=layer.index, num=layer.num_experts):
            chosen[index] = torch.bincount(inputs[1].flatten(), minlength=num).topk(num_experts).indices.tolist()

        handles.append(layer.entry.register_forward_pre_hook(record))
    with torch.no_grad():
        model(input_ids=batch())
    for handle in handles:
        handle.remove()
    return chosen


def batch(step: int = 0):
    """Another batch every step, as in training: so every step has other numbers of rows for each expert."""
    import torch

    return torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def measure(side: str) -> dict[str, object]:
    """One process' part: seconds a step, and how far peak memory rose above the loaded model's."""
    import torch

    model = build(side)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)
    loaded = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    seconds = []
    for step in range(WARMUP + STEPS):
        ids = batch(step)
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds[WARMUP:],
        "growth_bytes": peak - loaded,
        "trained": sum(p.numel() for p in trained),
        "flops": count_flops(model, batch(WARMUP)),
    }


def count_flops(model, ids) -> int:
    """Floating point operations of a step's matrix products, AdamW aside; padding of experts' rows included."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def grouped(left, right, *args, out_val=None, **kwargs) -> int:
        # (P, I) x (G, I, O) in the forward pass and for inputs; (O, P) x (P, I) for weights
        return 2 * left.shape[0] * left.shape[1] * right.shape[-1]

    grouped._get_raw = True
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped}) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def parity() -> float:
    """Largest difference of a logit between ESFT with a zero delta and the base: 0, or nothing is worth timing."""
    import torch

    base, ids = build("full grouped_mm").eval(), batch()
    with torch.no_grad():
        want = base(input_ids=ids).logits
        got = build("esft").eval()(input_ids=ids).logits
    difference = (want - got).abs().max().item()
    assert difference == 0, f"a zero delta moved a logit by {difference}"
    return difference


def check_parity(script: str) -> None:
    """Check in a process of its own, without AMX, with which oneDNN rounds a row by how many others there are."""
    subprocess.run([sys.executable, script, "--parity"], check=True, env={**os.environ, **WITHOUT_AMX})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parity", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side)))
        return
    if args.parity:
        parity()
        return
    check_parity(__file__)
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **MALLOC})
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                side,
                [round(s, 3) for s in runs[side][-1]["seconds"]],
                runs[side][-1]["growth_bytes"] >> 20,
                "MiB",
                flush=True,
            )
    RESULTS.write_text(report(runs, args.rounds))
    print(RESULTS.read_text())


def report(runs: dict[str, list[dict]], rounds: int) -> str:
    seconds = {side: [s for run in parts for s in run["seconds"]] for side, parts in runs.items()}
    growth = {side: statistics.median(run["growth_bytes"] for run in parts) for side, parts in runs.items()}
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    flops = {side: parts[0]["flops"] for side, parts in runs.items()}
    fastest = min((side for side in SIDES if side.startswith("full")), key=middle.__getitem__)
    rows = [
        f"| {side} | {middle[side]:.3f} | {min(values):.3f} to {max(values):.3f} | {middle[side] / middle['esft']:.2f} "
        f"| {runs[side][0]['flops'] / 1e9:,.0f} | {runs[side][0]['flops'] / middle[side] / 1e9:,.0f} "
        f"| {growth[side] / 2**20:,.0f} | {growth['esft'] / growth[side]:.0%} | {runs[side][0]['trained']:,} |"
        for side, values in seconds.items()
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lora = "lora grouped_mm"
    wanted = [
        (
            "speed against full fine-tuning",
            middle[fastest] / middle["esft"],
            "at least 3",
            middle[fastest] >= 3 * middle["esft"],
        ),
        (
            "speed against LoRA on all experts",
            middle[lora] / middle["esft"],
            "at least 1.8",
            middle[lora] >= 1.8 * middle["esft"],
        ),
        (
            "memory growth of full fine-tuning's",
            growth["esft"] / growth[fastest],
            "at most 0.45",
            growth["esft"] <= 0.45 * growth[fastest],
        ),
    ]
    goals = [f"| {name} | {value:.2f} | {goal} | {'yes' if met else 'no'} |" for name, value, goal, met in wanted]
    return "\n".join(
        [
            "# Step time and memory",
            "",
            "    python benchmarks/step_time.py",
            "",
            (__doc__ or "").split("\n\n", 2)[2].strip(),
            "",
            f"{packages}; {os.cpu_count()} cores; glibc keeps its memory on every side ({', '.join(MALLOC)}).",
            f"{rounds} rounds of {STEPS} steps after {WARMUP} warm-up steps, sides in turn.",
            f"Fastest backend of full fine-tuning: {fastest.split()[1]}.",
            f"(`batched_mm` gathers {BATCH * LENGTH * 8 * 3 * 1024 * 512 * 2 / 2**30:.0f} GiB of weights a layer.)",
            "",
            "| side | median s a step | range | times ESFT's | GFLOP a step | GFLOP/s | peak growth, MiB "
            "| ESFT's share | trained parameters |",
            "|-|-|-|-|-|-|-|-|-|",
            *rows,
            "",
            "| goal | measured | wanted | met |",
            "|-|-|-|-|",
            *goals,
            "",
            f"By operations full fine-tuning takes {flops[fastest] / flops['esft']:.2f} times ESFT's step and LoRA on "
            f"all experts {flops[lora] / flops['esft']:.2f} times. What a ratio of seconds has above is overhead of "
            "the other side (AdamW over all weights, gradients' way through memory), not products that ESFT saves.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
