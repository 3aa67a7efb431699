"""Predicted and measured GPU memory of runs of train_qlora.py.

    python benchmarks/memory_plan.py --tokenizer DIR --train FILE --eval FILE

Makes random checkpoints of the true shapes of Qwen2.5's 3B, 0.5B and 7B models, trains each for two optimizer steps of 16
sequences, one run per process, and prints a Markdown table. Memory does not depend on the weights' values; the loss does, so it
is not reported. Most rows change one setting of the first row (3B, rank 16, 512 tokens, micro-batch 1, all layers recomputed);
some change several. The GPU's memory has no cap unless a row names one. The CUDA context is left out, because torch's allocator
does not see it. The exit status is 1 if a prediction is off by more than 8 % or a run failed.
"""

import signal
import sys
from dataclasses import dataclass

from runs import SHAPES, Job, NoMeasurement, input_parser, random_checkpoint, require_gpu, run_toolkit

STEPS = 2
TOLERANCE = 0.08


@dataclass(frozen=True)
class Case:
    """Settings of one row."""

    model: str = "3B"
    rank: int = 16
    length: int = 512  # tokens
    micro_batch: int | str = 1
    recompute: bool | str = True
    more: tuple[str, ...] = ()  # KEY=VALUE

    def flags(self) -> list[str]:
        keys = [f"performance.micro_batch={self.micro_batch}", f"training.gradient_checkpointing={str(self.recompute).lower()}"]
        flags = ["--rank", str(self.rank), "--max_length", str(self.length)]
        return flags + [word for key in (*keys, *self.more) for word in ("--set", key)]


CASES = {
    "3B, rank 16, 1 x 512": Case(),
    "rank 8": Case(rank=8),
    "rank 64": Case(rank=64),
    "256 tokens": Case(length=256),
    "1,024 tokens": Case(length=1024),
    "micro-batch 4": Case(micro_batch=4),
    "micro-batch 16": Case(micro_batch=16),
    "no recomputation": Case(recompute=False),
    "no CUDA graph": Case(more=("performance.cuda_graphs=false",)),
    "rank 64, 1,024 tokens, micro-batch 4": Case(rank=64, length=1024, micro_batch=4),
    "rank 8, 256 tokens, micro-batch 16, no recomputation": Case(rank=8, length=256, micro_batch=16, recompute=False),
    "the planner's choice, 8 GiB": Case(micro_batch="auto", recompute="auto", more=("performance.vram_limit_gib=8",)),
    "configs/lean.yaml": Case(more=("performance.offload_embedding=true",)),
    "0.5B": Case("0.5B"),
    "0.5B, micro-batch 4, no recomputation": Case("0.5B", micro_batch=4, recompute=False),
    "7B": Case("7B"),
}


def memory_row(name: str, job: Job, limit_seconds: float) -> tuple[str, bool]:
    """Return a line of the table, and whether the prediction is within TOLERANCE."""
    try:
        run, _, _ = run_toolkit(job, CASES[name].flags(), limit_seconds)
    except NoMeasurement as failure:
        print(failure.tail, file=sys.stderr, flush=True)
        return f"| {name} | - | {str(failure).replace('|', '/')} | - | - |", False
    memory = run["memory_gib"]
    predicted, measured = memory["predicted_peak"], memory["peak_reserved"]
    error = predicted / measured - 1
    row = f"| {name} | {predicted:.2f} | {measured:.2f} | {100 * error:+.1f} % | {memory['peak_allocated']:.2f} |"
    return row, abs(error) <= TOLERANCE


def main() -> None:
    parser = input_parser(__doc__)
    rows = "which rows to measure: " + "; ".join(CASES) + " (default: all)"
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="ROW", help=rows)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the current run is ended too
    require_gpu()
    holds = []
    print("| run | predicted GiB | peak reserved GiB | error | peak allocated GiB |\n|---|---|---|---|---|", flush=True)
    for model in SHAPES:
        names = [name for name in arguments.cases if CASES[name].model == model]
        if not names:
            continue
        with random_checkpoint(model, arguments.tokenizer, arguments.checkpoints) as checkpoint:
            for name in names:
                print(f"{name} ...", file=sys.stderr, flush=True)
                row, held = memory_row(name, Job(checkpoint, arguments.train, arguments.eval, STEPS), arguments.timeout)
                print(row, flush=True)
                holds.append(held)
    sys.exit(0 if all(holds) else 1)


if __name__ == "__main__":
    main()
