"""One GPU beside several of one machine: tokens per second of the same command, started by torchrun.

    python benchmarks/scaling.py --tokenizer DIR --train FILE --eval FILE --gpus 2

The job of train_speed.py, the planner choosing for each run: 16 sequences of 512 tokens an optimizer step on one GPU; then so
many on each of the GPUs, and so many divided among them. Speed as there: the median over optimizer steps after the first two.
What the processes exchange is the gradient of the adapters, in fp32, once a step. Exit status 1 when a run gave no number.
"""

import signal
import sys
from dataclasses import dataclass
from datetime import UTC, datetime

from runs import SEQUENCES, Job, NoMeasurement, input_parser, random_checkpoint, require_gpu, run_toolkit, versions_of
from train_speed import PACKAGES, PLANNED, WARM_UP, steady


@dataclass(frozen=True)
class Case:
    name: str
    gpus: int
    sequences: int  # of an optimizer step, on all GPUs together

    def flags(self, steps: int) -> list[str]:
        keys = [*PLANNED, "training.batch_size=1", f"training.gradient_accumulation_steps={self.sequences}"]
        keys += [f"data.max_train_samples={steps * self.sequences}"]
        return [word for key in keys for word in ("--set", key)]


def cases(gpus: int) -> list[Case]:
    return [
        Case("one GPU", 1, SEQUENCES),
        Case(f"{gpus} GPUs, as much on each", gpus, gpus * SEQUENCES),
        Case(f"{gpus} GPUs, as much in all", gpus, SEQUENCES),
    ]


def main() -> None:
    parser = input_parser(__doc__)
    parser.add_argument("--gpus", type=int, default=2, help="how many to use (default: 2)")
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps of a run, more than {WARM_UP} (default: 12)")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP or SEQUENCES % arguments.gpus:
        parser.error(f"--steps must be more than {WARM_UP}, and --gpus divide {SEQUENCES}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way is ended, too
    gpu, alone, failed = require_gpu(), None, False
    print(
        "| run | sequences a step | tokens/s | times one GPU | peak reserved GiB of the first |\n|---|---|---|---|---|",
        flush=True,
    )
    with random_checkpoint("3B", arguments.tokenizer, arguments.checkpoints) as checkpoint:
        job = Job(checkpoint, arguments.train, arguments.eval, arguments.steps)
        for case in cases(arguments.gpus):
            start = f"| {case.name} | {case.sequences} |"
            try:
                flags = case.flags(arguments.steps)
                run, metrics, _ = run_toolkit(job, flags, arguments.timeout, case.gpus, case.sequences)
            except NoMeasurement as failure:
                failed = True
                print(failure.tail, file=sys.stderr, flush=True)
                print(f"{start} {str(failure).replace('|', '/')} | - | - |", flush=True)
                continue
            speed = steady([entry["tokens_per_second"] for entry in metrics if "tokens_per_second" in entry])
            alone = alone or speed
            print(f"{start} {speed:,.0f} | {speed / alone:.2f} | {run['memory_gib']['peak_reserved']:.2f} |", flush=True)
    print(f"\n{arguments.gpus} x {gpu}; {versions_of(PACKAGES)}; {datetime.now(UTC).date().isoformat()}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
