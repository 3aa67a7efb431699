"""Parts B, D and F of quality.py: held-out losses of whole runs, by seed."""

import shutil
import statistics
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality_rivals import four_bit_model
from quality_systems import Job, Result, forget_earlier_runs, read_blocks, train, why_not_here
from rivals import TARGETS
from runs import random_checkpoint

COMPARED = ["toolkit", "plain", "trl", "trl, adapter in fp32", "unsloth"]  # by part B
REFERENCE = "NF4, rank 16"  # of part D
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "16 bits": {"quantization": None},
    "FP4": {"quantization": "fp4"},
    "NF4 without double quantization": {"double": False},
    "attention only": {"targets": tuple(TARGETS[:4])},
    **{f"rank {rank}": {"rank": rank} for rank in (4, 8, 32, 64)},
}
BASES = (REFERENCE, "16 bits", "FP4", "NF4 without double quantization")  # the variants whose base model differs
FULL_RATES = (1e-5, 3e-5, 1e-4)  # of full fine-tuning, each tried
OTHER_MODULES = (
    "argparse",
    "ast",
    "asyncio/base_events",
    "collections/__init__",
    "dataclasses",
    "datetime",
    "decimal",
    "inspect",
)
LARGE_STEPS = 6  # of 16 blocks, at 3B


def job_of(options: Any, part: str, system: str, name: str, seed: int, **changes: Any) -> Job:
    """Return a run of one epoch with the settings of config.yaml."""
    work = Path(options.work, part, f"{name}-{seed}".replace(", ", "-").replace(" ", "-"))
    rows = options.rows
    job = Job(
        system, str(options.model), str(options.train), str(work), seed=seed, length=options.length or 512,
        blocks=options.blocks, rows=rows, micro_batch=min(rows, 16), dtype=options.dtype,
    )  # fmt: skip
    return replace(job, **changes)


def compare_systems(options: Any, seed: int) -> dict[str, Any]:
    """Measure part B for a seed: each system from the same matrices on the same blocks, its own dropout."""
    test = read_blocks(job_of(options, "B", "toolkit", "toolkit", seed), str(options.test), options.eval_blocks)
    rows: list[dict[str, Any]] = []
    first: Result | None = None
    start = job_of(options, "B", "toolkit", "toolkit", seed).start
    missing = {}
    for system in COMPARED:
        if reason := why_not_here(system):
            missing[system] = reason
            continue
        job = job_of(options, "B", system, system, seed)
        try:
            result = run(job, first, start)
        except Exception as error:  # whatever another tool fails with
            if first is None:
                raise
            missing[system] = " ".join(str(error).split())[:160] or type(error).__name__
            continue
        first = first or result
        rows.append(
            summary(system, result) | {"losses": [round(loss, 6) for loss in result.losses], **measure(job, {"held_out": test})}
        )
        report(rows[-1])
    return {"seed": seed, "runs": rows, "missing": missing}


def compare_variants(options: Any, seed: int) -> dict[str, Any]:
    """Measure part D for a seed: the toolkit's runs on other bases, with other targets and ranks."""
    texts = both_texts(options)
    rows = []
    for name, changes in VARIANTS.items():
        job = job_of(options, "D", "toolkit", name, seed, compile=False, **changes)
        rows.append(summary(name, run(job)) | measure(job, texts))
        report(rows[-1])
        shutil.rmtree(job.work)
    return {"seed": seed, "runs": rows}


def measure_bases(options: Any) -> dict[str, Any]:
    """Measure the base models of part D, before any training."""
    texts = both_texts(options)
    jobs = {name: job_of(options, "D", "toolkit", name, 0, **VARIANTS[name]) for name in BASES}
    return {"runs": [{"name": name, **measure(job, texts, adapted=False)} for name, job in jobs.items()]}


def both_texts(options: Any) -> dict[str, list[list[int]]]:
    """Return blocks of the held-out text and of other text: options.other, or source code of Python's own library."""
    job = job_of(options, "D", "toolkit", REFERENCE, 0)
    other = options.other
    if other is None:
        other = Path(options.work, "python.txt")
        folder = Path(sysconfig.get_path("stdlib"))
        other.parent.mkdir(parents=True, exist_ok=True)
        texts = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in OTHER_MODULES]
        other.write_text("\n".join(texts), encoding="utf-8")
    count = options.eval_blocks
    return {"held_out": read_blocks(job, str(options.test), count), "other": read_blocks(job, str(other), count)}


def compare_with_full(options: Any, seed: int) -> dict[str, Any]:
    """Measure part F for a seed: the toolkit, and full fine-tuning at several learning rates."""
    test = read_blocks(job_of(options, "F", "toolkit", "toolkit", seed), str(options.test), options.eval_blocks)
    first = run(job := job_of(options, "F", "toolkit", "toolkit", seed))
    rows = [summary("toolkit", first) | measure(job, {"held_out": test})]
    report(rows[-1])
    for rate in FULL_RATES:
        job = job_of(options, "F", "full", f"full, {rate:g}", seed, dtype="float32", learning_rate=rate, clip=1.0)
        rows.append(summary(f"full, {rate:g}", run(job, first)) | measure(job, {"held_out": test}))
        report(rows[-1])
        shutil.rmtree(job.work)
    return {"seed": seed, "runs": rows}


def measure_large(options: Any) -> dict[str, Any]:
    """Measure speed and memory at Qwen2.5-3B's shape, each run in a process of its own."""
    with random_checkpoint("3B", options.tokenizer, options.work) as checkpoint:
        usual = job_of(options, "F", "toolkit", "large", 1, model=str(checkpoint), blocks=LARGE_STEPS * options.rows, keep=False)
        jobs = {
            "full, bfloat16 weights, fp32 Adam, 4 x 4, recomputing": replace(usual, system="full", micro_batch=4, clip=1.0),
            "toolkit": usual,
            "toolkit, 8 GiB": replace(usual, limit_gib=8.0),
        }
        rows = []
        for name, job in jobs.items():
            rows.append(summary(name, train(job, apart=True)))
            report(rows[-1])
            shutil.rmtree(job.work)
    return {"runs": rows}


def run(job: Job, like: Result | None = None, start: Path | None = None) -> Result:
    shutil.rmtree(job.work, ignore_errors=True)
    return train(job, like, start if like and job.system != "full" else None)


def summary(name: str, result: Result) -> dict[str, Any]:
    """Return what is kept of a run."""
    ends = {} if not result.losses else {"last_losses": round(statistics.fmean(result.losses[-5:]), 6)}
    cost = {key: getattr(result, key) for key in ("tokens_per_second", "peak_reserved_gib", "seconds")}
    return {"name": name, "steps": len(result.losses), **ends, **cost}


def measure(job: Job, texts: dict[str, list[list[int]]], adapted: bool = True) -> dict[str, Any]:
    """Return the mean loss on each text and its standard error over the blocks, by plain transformers and peft.

    Args:
        adapted: with the adapter of the job; full fine-tuning has left a whole model instead.
    """
    from peft import PeftModel

    model: Any
    if job.system == "full":
        model = four_bit_model(replace(job, model=str(job.adapter), quantization=None))
    else:
        model = four_bit_model(job)
        model = PeftModel.from_pretrained(model, str(job.adapter)) if adapted else model
    found = {}
    for name, blocks in texts.items():
        losses = block_losses(model.eval(), blocks, job)
        found[name] = round(statistics.fmean(losses), 6)
        found[f"{name}_error"] = round(statistics.stdev(losses) / len(losses) ** 0.5, 6)
    del model
    forget_earlier_runs()
    return found


def block_losses(model: Any, blocks: list[list[int]], job: Job) -> list[float]:
    """Return the mean loss of each block in nats a token, from the library's logits in fp32."""
    import torch
    import torch.nn.functional as F

    size, losses = max(1, min(8, job.rows)), []
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=job.dtype == "bfloat16")
    for at in range(0, len(blocks), size):
        ids = torch.tensor(blocks[at : at + size], device=model.device)  # (B, T)
        with torch.no_grad(), autocast:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        losses += each.mean(1).tolist()
    return losses


def report(row: dict[str, Any]) -> None:
    parts = [
        f"{key} {row[key]}" for key in ("held_out", "other", "tokens_per_second", "peak_reserved_gib", "seconds") if key in row
    ]
    print(f"  {row['name']}: {', '.join(parts)}", flush=True)
