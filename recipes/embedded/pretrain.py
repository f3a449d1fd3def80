"""Pretrain the embedded model; stops and resumes anywhere.

    torchrun --nproc-per-node 2 -- recipes/embedded/pretrain.py --cache CACHE --run RUN \
        [--decay-from STEP --decay-steps N]

One process a core, each with one thread and its share of the micro-batches: on small matrices that is much faster than
one process with two threads. Plain `python` runs on one core and makes the same steps.

Checkpoints go to RUN/checkpoint.pt (written beside and renamed, so that a kill loses at most --save-every steps), one
line a logged step to RUN/log.jsonl. The learning rate warms up, stays, and decays linearly to zero from --decay-from:
the stable part can be gone on with later, and any checkpoint of it decayed into a usable model.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from model import ChunkedCrossEntropy, RouterRecord, build
from optimizer import MuonWithAdamW
from torch import distributed
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SEQUENCE_LENGTH = 512
SEQUENCES_PER_STEP = 24
SEQUENCES_PER_MICRO_BATCH = 6
TOKENS_PER_STEP = SEQUENCE_LENGTH * SEQUENCES_PER_STEP
BALANCING = 0.03
WARMUP_STEPS = 60
SEED = 17


def lr_scale(step: int, first_step: int, decay_from: int | None, decay_steps: int) -> float:
    warm = min(1.0, (step - first_step + 1) / WARMUP_STEPS)
    if decay_from is None or step < decay_from:
        return warm
    return max(0.0, 1 - (step - decay_from + 0.5) / decay_steps)


def train_step(
    model: PreTrainedModel, record: RouterRecord, tokens_BS: torch.Tensor
) -> tuple[float, float, torch.Tensor]:
    """Gradients of one step in micro-batches, summed over all processes. Returns loss, balancing loss, counts_LE."""
    num_parts = SEQUENCES_PER_STEP // SEQUENCES_PER_MICRO_BATCH
    total = balance = 0.0
    counts_LE = torch.zeros(())
    for part_BS in tokens_BS.split(SEQUENCES_PER_MICRO_BATCH)[rank() :: world_size()]:
        hidden = model.model(input_ids=part_BS[:, :-1], use_cache=False).last_hidden_state
        loss = ChunkedCrossEntropy.apply(hidden.flatten(0, 1), model.lm_head.weight, part_BS[:, 1:].flatten())
        balancing, part_LE = record.pop()
        ((loss + BALANCING * balancing) / num_parts).backward()
        total, balance, counts_LE = (
            total + loss.item() / num_parts,
            balance + balancing.item() / num_parts,
            counts_LE + part_LE,
        )
    if world_size() == 1:
        return total, balance, counts_LE
    grads = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([grad.float().flatten() for grad in grads] + [torch.tensor([total, balance]), counts_LE.flatten()])
    distributed.all_reduce(flat)
    *summed, logged, counts = flat.split([grad.numel() for grad in grads] + [2, counts_LE.numel()])
    for grad, values in zip(grads, summed, strict=True):
        grad.copy_(values.view_as(grad))
    return logged[0].item(), logged[1].item(), counts.view_as(counts_LE)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def save(path: Path, optimizer: MuonWithAdamW, step: int, first_step: int) -> None:
    state = {"step": step, "first_step": first_step, "optimizer": optimizer.state_dict()}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def drop_lines_after(log: Path, step: int) -> None:
    """Take back the log's lines behind the checkpoint that is resumed, so that each step stands once."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        log.write_text("".join(lines))


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """The weights of an exported model, on disk one tensor an expert; every one must be there."""
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(exported.state_dict())


def export(model: PreTrainedModel, cache: Path, folder: Path) -> None:
    """The model as a plain transformers folder: bf16 safetensors, tokenizer with chat template, generation config."""
    model.generation_config.eos_token_id = [6, 0]
    model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(cache / "tokenizer").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a checkpoint to start from when RUN has none yet")
    parser.add_argument("--start-model", type=Path, help="an exported model to go on from, with a new warm-up")
    parser.add_argument("--start-step", type=int, default=0, help="how many steps that model has read")
    parser.add_argument("--decay-from", type=int)
    parser.add_argument("--decay-steps", type=int, default=300)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=3e-3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    if world_size() > 1:
        distributed.init_process_group("gloo")
    args.run.mkdir(parents=True, exist_ok=True)
    tokens = np.memmap(args.cache / "tokens.bin", dtype=np.uint16, mode="r")
    model = build(SEED)
    record = RouterRecord(model)
    first_step = args.start_step
    if args.start_model is not None:
        load_weights(model, args.start_model)
    optimizer = MuonWithAdamW(model, muon_lr=args.muon_lr, adamw_lr=args.adamw_lr, weight_decay=0.1)
    model.bfloat16()
    checkpoint, step = args.run / "checkpoint.pt", first_step
    start = checkpoint if checkpoint.exists() else args.start
    if start is not None:
        state = torch.load(start)
        optimizer.load_state_dict(state["optimizer"])
        step, first_step = state["step"], state["first_step"]
    if rank() == 0:
        drop_lines_after(args.run / "log.jsonl", step)
    last = args.max_steps or (len(tokens) - 1) // TOKENS_PER_STEP
    if args.decay_from is not None:
        last = min(last, args.decay_from + args.decay_steps)
    started, resumed_at = time.monotonic(), step
    with (args.run / "log.jsonl").open("a") as log:
        while step < last:
            # one token of overlap: the last of a sequence is the first label of the next
            flat = torch.from_numpy(tokens[step * TOKENS_PER_STEP : (step + 1) * TOKENS_PER_STEP + 1].astype(np.int64))
            tokens_BS = flat.unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)
            loss, balance, counts_LE = train_step(model, record, tokens_BS)
            optimizer.step(lr_scale(step, first_step, args.decay_from, args.decay_steps))
            step += 1
            share_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
            row = {
                "step": step,
                "tokens": step * TOKENS_PER_STEP,
                "loss": round(loss, 4),
                "balancing": round(balance, 4),
                "least_share": round(share_LE.min().item(), 5),
                "most_share": round(share_LE.max().item(), 5),
                "tokens_per_second": round((step - resumed_at) * TOKENS_PER_STEP / (time.monotonic() - started)),
            }
            if rank() > 0:
                continue
            log.write(json.dumps(row) + "\n")
            log.flush()
            if step % args.save_every == 0 or step == last:
                save(checkpoint, optimizer, step, first_step)
    if rank() == 0:
        export(model, args.cache, args.run / "model")


if __name__ == "__main__":
    main()
