"""Serving many deltas in one batch against the base alone, and against one delta after the other, merged in between.

    python benchmarks/serving.py            every part, one process each: about 25 minutes on two cores
    python benchmarks/serving.py PART       one of them; its figures take the place of its last ones
    python benchmarks/serving.py report     writes benchmarks/results/serving.md from the figures in serving.jsonl

64 requests over 32 ESFT deltas and the base, each model's share in turn, greedy, 48 tokens each. Three ways in one
process, in turn: all in one batch by their deltas; the same prompts all to the base; and delta by delta, where a
delta's rows are written over the base's before its two requests run and put back after (from memory: reading them is
not counted). All ways use the same engine, with all cores. First every answer of the mixed batch is compared with that
of its merged model by transformers' own `generate`, alone.

Then what a resident delta takes, and how long a delta of 100 MB takes from the disk (in the page cache) into service
while others are answered, and how long those wait meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

NUM_DELTAS, NUM_REQUESTS, NUM_TOKENS = 32, 64, 48
REPEATS = 3
PARTS = ("embedded", "olmoe-float32", "memory", "loading")
REPORT = Path(__file__).parent / "results" / "serving.md"
FIGURES = REPORT.with_suffix(".jsonl")


def start(model: str, folder: Path, names: list[str], **settings):
    from metier.serving.start import EngineSettings, start_engine

    deltas = {name: folder / name for name in names}
    dtype = "float32" if model == "embedded" else "auto"
    started = start_engine(model, deltas, dtype=dtype, settings=EngineSettings(max_requests=NUM_REQUESTS, **settings))
    started.engine._eos_token_ids = []  # every answer has the same length, whichever model gives it
    return started


def prompts(started) -> list[list[int]]:
    """Of the embedded tasks' test items; the OLMoE-shaped model has fewer words, so some stand for others there."""
    tokenizer, num_words = started.tokenizer, started.engine._batch._model.config.vocab_size
    from metier.data.records import load_records
    from metier.evaluation.tasks import load_task

    found = []
    for task in ("synopsis", "translate", "sections"):
        for record in load_records(load_task(task).splits["test"])[:30]:
            messages = [{"role": m.role, "content": m.content} for m in record.messages[:-1]]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            found.append(tokenizer(text, add_special_tokens=False).input_ids[:200])
    found = [[token % num_words for token in prompt] for prompt in found]
    return found[::-1][:NUM_REQUESTS]


async def answers(engine, asked: list[tuple[list[int], str | None]]) -> tuple[list[list[int]], float]:
    """Tokens of each request, and the seconds that all took."""
    from metier.serving.contract import SamplingSettings

    settings = SamplingSettings(max_tokens=NUM_TOKENS, temperature=0)

    async def tokens(prompt, name):
        return [token.token_id async for token in engine.submit(prompt, delta=name, settings=settings)]

    began = time.perf_counter()
    got = await asyncio.gather(*(tokens(prompt, name) for prompt, name in asked))
    return got, time.perf_counter() - began


class Merging:
    """Deltas' rows in memory, written over the base's and put back."""

    def __init__(self, model, folder: Path, names: list[str]) -> None:
        from metier.deltas.changes import merged_rows
        from metier.deltas.read import read_delta
        from metier.models.moe import moe_layers

        self.rows = {}
        for name in names:
            delta = read_delta(folder / name)
            loaded = delta.load_rows()
            self.rows[name] = [
                (getattr(layer.experts, parameter), list(ids), merged_rows(delta, loaded, layer, parameter))
                for layer in moe_layers(model)
                if (ids := delta.config.experts.get(layer.index))
                for parameter in layer.parameter_names()
            ]

    @contextlib.contextmanager
    def merged(self, name: str | None):
        from metier.memory.openmp import end_workers

        saved = [(weight, ids, weight[ids].clone()) for weight, ids, _ in self.rows.get(name, ())]
        for weight, ids, rows in self.rows.get(name, ()):
            weight[ids] = rows
        end_workers()  # of this thread, which would slow down those of the engine's
        try:
            yield
        finally:
            for weight, ids, rows in saved:
                weight[ids] = rows
            end_workers()


async def one_by_one(engine, merging: Merging, prompts_by_name) -> float:
    began = time.perf_counter()
    for name, of_name in prompts_by_name.items():
        forget_prefixes(engine)
        with merging.merged(name):
            await answers(engine, [(prompt, None) for prompt in of_name])
    return time.perf_counter() - began


def check_answers(model, merging: Merging, asked, got) -> int:
    """How many answers of the mixed batch are not those of their merged models alone."""
    import torch

    wrong = 0
    for (prompt, name), tokens in zip(asked, got, strict=True):
        with merging.merged(name), torch.no_grad():
            ids = torch.tensor([prompt])
            # whole, though the embedded model's prompts begin with its padding token
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
            )
        wrong += out[0, len(prompt) :].tolist() != tokens
    return wrong


def throughput(kind: str) -> None:
    """One model's three ways; a line of JSON."""
    from serving_deltas import embedded_deltas, olmoe_deltas

    from metier.models.unwrap import bare_model

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        names: list[str] = [f"delta-{number:02d}" for number in range(NUM_DELTAS)]
        if kind == "embedded":
            embedded_deltas(folder, NUM_DELTAS)
            model = "embedded"
        else:
            olmoe_deltas(folder, NUM_DELTAS, layers=4, experts_per_layer=6, dtype=kind.split("-")[1])
            model = str(folder / "base")
        # what the requests take, and no more: deltas in float32 take some gigabytes themselves
        started = start(model, folder, names, cache_tokens=2 * NUM_REQUESTS * 256)
        engine = started.engine
        base = bare_model(engine._batch._model)
        merging = Merging(base, folder, names)
        choices: list[str | None] = [None, *names]
        texts = prompts(started)
        asked = [(prompt, choices[number % len(choices)]) for number, prompt in enumerate(texts)]
        by_name: dict[str | None, list[list[int]]] = {}
        for prompt, name in asked:
            by_name.setdefault(name, []).append(prompt)

        async def measure():
            seconds = {"mixed": [], "base": [], "one by one": []}
            got, _ = await answers(engine, asked)
            await answers(engine, [(prompt, None) for prompt, _ in asked])
            for _ in range(REPEATS):
                forget_prefixes(engine)
                seconds["base"].append((await answers(engine, [(prompt, None) for prompt, _ in asked]))[1])
                forget_prefixes(engine)
                again, taken = await answers(engine, asked)
                assert again == got, "the same requests are answered the same"
                seconds["mixed"].append(taken)
                forget_prefixes(engine)
                seconds["one by one"].append(await one_by_one(engine, merging, by_name))
            sizes = [status.num_bytes for status in engine.deltas()]
            await engine.close(grace_seconds=0)
            return got, seconds, sizes

        got, seconds, sizes = asyncio.run(measure())
        wrong = check_answers(base, merging, asked, got)
        total = NUM_TOKENS * len(asked)
        rates = {way: [total / each for each in taken] for way, taken in seconds.items()}
        line = {
            "kind": kind,
            "rates": rates,
            "mixed_of_base": [b / m for m, b in zip(seconds["mixed"], seconds["base"], strict=True)],
            "mixed_of_one_by_one": [o / m for m, o in zip(seconds["mixed"], seconds["one by one"], strict=True)],
            "wrong": wrong,
            "num_answers": len(asked),
            "delta_bytes": sizes,
            "prompt_tokens": sum(map(len, texts)),
        }
    keep(line)


def forget_prefixes(engine) -> None:
    """No way profits from what another left in the cache."""
    engine._batch._manager.batch_processor.cache.evict_cached_blocks()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory() -> None:
    """What the process grows by as deltas go into service one after the other; a line of JSON."""
    from serving_deltas import olmoe_deltas

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        olmoe_deltas(folder, 9, layers=4, experts_per_layer=6, dtype="bfloat16")
        started = start(str(folder / "base"), folder, ["delta-00"])

        async def measure():
            await asyncio.sleep(1)  # room for one delta more is made ready
            points = [(0, resident_bytes())]
            for number in range(1, 9):
                status = await started.engine.load_delta(f"new-{number}", folder / f"delta-{number:02d}")
                await asyncio.sleep(1)
                points.append((points[-1][0] + status.num_bytes, resident_bytes()))
            await started.engine.close(grace_seconds=0)
            return points

        points = asyncio.run(measure())
    rows, held = points[-1][0], points[-1][1] - points[0][1]
    keep({"kind": "memory", "num_deltas": 8, "rows_bytes": rows, "grown_bytes": held})


def loading() -> None:
    """A delta of 100 MB goes into service while eight answers run; a line of JSON."""
    from serving_deltas import olmoe_deltas

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        olmoe_deltas(folder, 2, layers=4, experts_per_layer=8, dtype="bfloat16")
        started = start(str(folder / "base"), folder, ["delta-00"])
        engine = started.engine
        texts = prompts(started)[:8]

        async def measure():
            from metier.serving.contract import SamplingSettings

            settings = SamplingSettings(max_tokens=500, temperature=0)
            times: list[list[float]] = [[] for _ in texts]

            async def run(number: int):
                async for _ in engine.submit(texts[number], delta="delta-00", settings=settings):
                    times[number].append(time.perf_counter())

            tasks = [asyncio.create_task(run(number)) for number in range(len(texts))]
            while min(map(len, times)) < 30:
                await asyncio.sleep(0.05)
            loads = []
            for number in range(8):  # beside each other: a delta in another's place finds its memory there
                began = time.perf_counter()
                status = await engine.load_delta(f"new-{number}", folder / "delta-01")
                loads.append((began, time.perf_counter()))
                assert status.tier == "accelerator"
                await asyncio.sleep(1)
            for task in tasks:
                task.cancel()
            await engine.close(grace_seconds=0)
            return times, loads, status.num_bytes

        times, loads, num_bytes = asyncio.run(measure())
    usual, during, during_first = [], [], []
    for stream in times:
        for before, after in itertools.pairwise(stream[5:]):
            touched = [number for number, (began, ended) in enumerate(loads) if began < after and before < ended]
            (usual if not touched else during if any(touched) else during_first).append(after - before)
    keep(
        {
            "kind": "loading",
            "delta_bytes": num_bytes,
            "load_seconds": [ended - began for began, ended in loads],
            "step_seconds": statistics.median(usual),
            "longest_usual_step_seconds": max(usual),
            "longest_step_seconds_while_loading": max(during),
            "longest_step_seconds_while_the_first_loads": max(during_first),
        }
    )


def keep(line: dict) -> None:
    """Put a part's figures into the place of those of the same part and number of threads."""
    import torch

    from metier.training.cell import hardware

    line |= {"threads": torch.get_num_threads(), "cpu": hardware().get("cpu", platform.machine())}
    line |= {name: version(name) for name in ("torch", "transformers")}
    print(json.dumps(line))
    kept = figures()
    kept[line["kind"], line["threads"]] = line
    FIGURES.write_text("".join(json.dumps(each) + "\n" for _, each in sorted(kept.items())), encoding="utf-8")


def figures() -> dict[tuple[str, int], dict]:
    """By part and number of threads."""
    text = FIGURES.read_text(encoding="utf-8") if FIGURES.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return {(line["kind"], line["threads"]): line for line in lines}


def write_report() -> None:
    """`benchmarks/results/serving.md`, of what was measured last of each part."""
    kept = figures()
    load = max((line for line in kept.values() if line["kind"] == "loading"), key=lambda line: line["threads"])
    held = max((line for line in kept.values() if line["kind"] == "memory"), key=lambda line: line["threads"])
    ways = [line for line in kept.values() if line["kind"] not in ("loading", "memory")]
    rows = []
    for line in ways:
        rate = {way: statistics.median(rates) for way, rates in line["rates"].items()}
        found = [
            line["kind"],
            line["threads"],
            *(f"{rate[way]:.0f}" for way in ("base", "mixed", "one by one")),
            _spread(line["mixed_of_base"], "{:.0%}"),
            _spread(line["mixed_of_one_by_one"], "{:.1f}"),
            f"{rate['base'] / rate['one by one']:.1f}",
            f"{line['num_answers'] - line['wrong']} of {line['num_answers']}",
        ]
        rows.append(f"| {' | '.join(map(str, found))} |")
    machines = {f"{line['cpu']}, torch {line['torch']}, transformers {line['transformers']}" for line in kept.values()}
    ran_on = "; ".join(sorted(machines))
    sizes = {line["kind"]: [each / 1e6 for each in line["delta_bytes"]] for line in ways}
    memory = [f"| {kind} | {statistics.mean(of):.1f} MB | {sum(of):.0f} MB |" for kind, of in sizes.items()]
    text = f"""# Serving 32 deltas and their base in one batch

    python benchmarks/serving.py

{NUM_REQUESTS} requests in turn over the base and {NUM_DELTAS} ESFT deltas, greedy, {NUM_TOKENS} tokens each; median of
{REPEATS} rounds and, in brackets, the range. Run on: {ran_on}. Figures: `serving.jsonl`.

Tokens a second; then the mixed batch's as a share and as a multiple of the others'; then what the base alone, in one
batch, is of one delta after the other, which is as much as any mixed batch could reach; then how many answers are those
of the merged models alone.

| model | threads | base alone | mixed | one by one | of base alone | times one by one | at most | equal answers |
|-|-|-|-|-|-|-|-|-|
{chr(10).join(rows)}

The embedded model is in float32; its deltas replace the experts that its tasks' profiles select (top_p 0.2). The
OLMoE-shaped one has four layers of 64 experts of 512, top-8, hidden size 1024, random; each delta replaces six experts
a layer.

What a mixed batch takes longer than the base alone is the reading of weights. With two requests a delta almost every
expert of a delta that is used at all is used for one token. Of the OLMoE-shaped model a step of 64 tokens reads the 64
experts of a layer, and mixed about 45 more: of the 64 experts six are a delta's own, and each of its two tokens picks
eight. Of the embedded model it is 55 beside 32, smaller ones. One after the other the batch is two requests, which is
where a processor is least efficient; the column "at most" says what the base's own batch makes of that.

## Memory

| model | rows of a delta, on average | of all |
|-|-|-|
{chr(10).join(memory)}

A delta takes its rows, in slots of one expert each, and a row of each layer's index table. {held["num_deltas"]} deltas
of the OLMoE-shaped model, {held["rows_bytes"] / 1e6:.1f} MB of rows, made the process grow by
{held["grown_bytes"] / 1e6:.1f} MB: {held["grown_bytes"] / held["rows_bytes"] - 1:+.2%}.

## Loading while others are answered

A delta of {load["delta_bytes"] / 1e6:.0f} MB goes from the disk (in the page cache), checked against its sums, into
service in {_spread([1000 * each for each in load["load_seconds"]], "{:.0f}")} ms, while eight answers run. Their
usual step takes {1000 * load["step_seconds"]:.0f} ms ({1000 * load["longest_usual_step_seconds"]:.0f} the longest), the
longest one that a load touches {1000 * load["longest_step_seconds_while_loading"]:.0f} ms, and
{1000 * load["longest_step_seconds_while_the_first_loads"]:.0f} ms at the first load: steps leave a processor to what is
read, and oneDNN compiles its bfloat16 products once more for the threads that are left.
"""
    REPORT.write_text(text, encoding="utf-8")


def _spread(values: list[float], form: str) -> str:
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} – {form.format(max(values))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "report"))
    part = parser.parse_args().part
    if part == "report":
        write_report()
    elif part == "loading":
        loading()
    elif part == "memory":
        memory()
    elif part:
        throughput(part)
    else:
        import subprocess

        for each in (*PARTS, "report"):
            subprocess.run([sys.executable, __file__, each], check=True)


if __name__ == "__main__":
    main()
