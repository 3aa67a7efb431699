"""Parts A and C of quality.py: the same training step by step, and the adapters that came of it loaded by one another."""

import json
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality_rivals import EXACT, four_bit_model, packing
from quality_systems import Job, Result, forget_earlier_runs, logits_of, read_blocks, train, why_not_here

SYSTEMS = ["toolkit", "toolkit, library path", EXACT, "plain", "trl"]
LOSSES, NORMS, LOGITS = 1e-5, 1e-4, 1e-5  # largest relative differences
GROUPS = 10  # of steps, whose means test whether a difference is zero on average
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by degrees of freedom
LOADERS = ["toolkit", "peft", "transformers"]  # TRL takes a model that one of the last two has loaded


def job_of(system: str, options: Any, dtype: str) -> Job:
    """Return a run of part A: dropout 0, one block an optimizer step, a constant learning rate, no clipping."""
    work = Path(options.work, "A", dtype, system.replace(", ", "-").replace(" ", "-"))
    return Job(
        system, str(options.model), str(options.train), str(work),
        length=options.length or 256, blocks=options.steps or 50, rows=1, micro_batch=1, dtype=dtype,
        dropout=0.0, learning_rate=2e-4, scheduler="constant", warmup_ratio=0.0, clip=0.0, optimizer="adamw_torch",
    )  # fmt: skip


def step_by_step(options: Any, dtype: str) -> dict[str, Any]:
    """Train with each system from the same matrices on the same blocks; returns the runs and what could not run."""
    first = job_of(SYSTEMS[0], options, dtype)
    probe = read_blocks(first, str(options.test), 1)[0]
    runs: list[Result] = []
    missing = {}
    for system in SYSTEMS:
        if reason := why_not_here(system):
            missing[system] = reason
            continue
        job = job_of(system, options, dtype)
        shutil.rmtree(job.work, ignore_errors=True)
        result = train(job, runs[0] if runs else None, first.start, probe)
        probe_file(job).write_text(json.dumps(result.probe), encoding="utf-8")  # too long for the results
        runs.append(result)
        print(f"  {system}: {runs[-1].seconds:.0f} s, loss {runs[-1].losses[0]:.4f} -> {runs[-1].losses[-1]:.4f}", flush=True)
    assert all(run.order == runs[0].order for run in runs), "another order of blocks"
    kept = [{name: value for name, value in asdict(run).items() if name != "probe"} for run in runs]
    return {"runs": kept, "missing": missing, "length": first.length, "probe": probe}


def differences(run: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """Return the largest relative differences of losses and of gradient norms between two runs."""
    pairs = (zip(run[key], reference[key], strict=True) for key in ("losses", "gradient_norms"))
    losses, norms = ([abs(a - b) / abs(b) for a, b in both] for both in pairs)
    return max(losses), max(norms)


def mean_residual(run: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """Return the mean difference of the losses of two runs, nats, and half the width of its 95 % interval.

    Neighbouring steps depend on each other, so the interval is that of the means of ten groups of steps.
    """
    residuals = [a - b for a, b in zip(run["losses"], reference["losses"], strict=True)]
    size = max(1, len(residuals) // GROUPS)
    return interval([statistics.fmean(residuals[at : at + size]) for at in range(0, size * (len(residuals) // size), size)])


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t); infinite for a single value."""
    if len(values) < 2:
        return values[0], float("inf")
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), T_95.get(len(values) - 1, 2.0) * error


def exchange(options: Any, unit: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Load each system's adapter of part A with each loader, and compare its logits with those of the trained model.

    Args:
        unit: what step_by_step has returned, of which the adapters still lie in options.work.

    Returns:
        for each pair the largest difference, divided by the largest of those logits; loader None: without an adapter.
    """
    if unit is None:
        sys.exit(f"error: part C needs the adapters of part A in {dtype}: measure A first")
    base = logits_of(four_bit_model(job_of("plain", options, dtype)), unit["probe"])
    rows = []
    for run in unit["runs"]:
        job = job_of(run["system"], options, dtype)
        trained = json.loads(probe_file(job).read_text(encoding="utf-8"))
        rows.append({"adapter": run["system"], "loader": None, "difference": distance(base, trained)})
        for loader in LOADERS:
            logits = logits_of(load_with(loader, job), unit["probe"])
            rows.append({"adapter": run["system"], "loader": loader, "difference": distance(logits, trained)})
            forget_earlier_runs()
    return {"runs": rows}


def probe_file(job: Job) -> Path:
    """Return where part A leaves the logits of the trained model for part C."""
    return Path(job.work) / "probe.json"


def distance(logits: list[list[float]], reference: list[list[float]]) -> float:
    """Return the largest absolute difference, divided by the largest absolute value of the reference."""
    pairs = [pair for rows in zip(logits, reference, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)


def load_with(loader: str, job: Job) -> Any:
    """Return base model and adapter as a tool loads them for itself; not all of them put it into evaluation mode."""
    if loader == "toolkit":
        import inference_example

        return inference_example.load_generator(str(job.adapter)).engine.model
    if loader == "transformers":
        import torch
        from transformers import AutoModelForCausalLM

        dtype, device = getattr(torch, job.dtype), {"": 0 if torch.cuda.is_available() else "cpu"}
        return AutoModelForCausalLM.from_pretrained(str(job.adapter), dtype=dtype, device_map=device, **packing(job))
    from peft import PeftModel

    return PeftModel.from_pretrained(four_bit_model(job), str(job.adapter))
