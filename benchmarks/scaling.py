"""Compare one GPU with several of one machine: tokens per second and memory of the same command, started by torchrun.

    python benchmarks/scaling.py --tokenizer DIR --train FILE --eval FILE --gpus 2
    python benchmarks/scaling.py --tokenizer DIR --train FILE --eval FILE --gpus 2 --fsdp 32B

Without --fsdp each run is the job of train_speed.py with its own plan: 16 sequences of 512 tokens per optimizer step on one GPU;
then 16 on each GPU; then 16 over all GPUs. Each process holds the whole base model; once a step the processes sum the adapters'
gradient in fp32.
With --fsdp one sequence at a time with all layers recomputed: on one GPU, and with the base model sharded over all GPUs
(performance.fsdp). The gathered weights pass over the links twice per micro-step.
Speed as in train_speed.py: the median over optimizer steps after the first two. The exit status is 1 if a run failed.
"""

import signal
import sys
from dataclasses import dataclass
from datetime import UTC, datetime

from runs import (
    LARGE,
    SEQUENCES,
    SHAPES,
    Job,
    NoMeasurement,
    input_parser,
    random_checkpoint,
    require_gpu,
    run_toolkit,
    versions_of,
)
from train_speed import PACKAGES, PLANNED, WARM_UP, steady

ONE_AT_A_TIME = ("performance.micro_batch=1", "training.gradient_checkpointing=true")


@dataclass(frozen=True)
class Case:
    name: str
    gpus: int
    sequences: int  # per optimizer step, on all GPUs together
    keys: tuple[str, ...] = PLANNED

    def flags(self, steps: int) -> list[str]:
        keys = [*self.keys, "training.batch_size=1", f"training.gradient_accumulation_steps={self.sequences}"]
        keys += [f"data.max_train_samples={steps * self.sequences}"]
        return [word for key in keys for word in ("--set", key)]


def replicated(gpus: int) -> list[Case]:
    return [
        Case("one GPU", 1, SEQUENCES),
        Case(f"{gpus} GPUs, as much on each", gpus, gpus * SEQUENCES),
        Case(f"{gpus} GPUs, as much in all", gpus, SEQUENCES),
    ]


def sharded(gpus: int) -> list[Case]:
    return [
        Case("one GPU", 1, SEQUENCES, ONE_AT_A_TIME),
        Case(f"{gpus} GPUs, fsdp", gpus, gpus * SEQUENCES, (*ONE_AT_A_TIME, "performance.fsdp=true")),
        Case(f"{gpus} GPUs, fsdp, shards in host memory", gpus, gpus * SEQUENCES, (*ONE_AT_A_TIME, "performance.fsdp=offload")),
    ]


def main() -> None:
    parser = input_parser(__doc__)
    parser.add_argument("--gpus", type=int, default=2, help="how many to use (default: 2)")
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps of a run, more than {WARM_UP} (default: 12)")
    parser.add_argument("--fsdp", choices=[*SHAPES, *LARGE], help="shard a random model of this size")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP or SEQUENCES % arguments.gpus:
        parser.error(f"--steps must be more than {WARM_UP}, and --gpus divide {SEQUENCES}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the current run is ended, too
    gpu, alone, failed = require_gpu(), None, False
    print(
        "| run | sequences a step | tokens/s | times one GPU | peak reserved GiB of the first | of one GPU's | predicted |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    with random_checkpoint(arguments.fsdp or "3B", arguments.tokenizer, arguments.checkpoints) as checkpoint:
        job = Job(checkpoint, arguments.train, arguments.eval, arguments.steps)
        for case in (sharded if arguments.fsdp else replicated)(arguments.gpus):
            start = f"| {case.name} | {case.sequences} |"
            try:
                flags = case.flags(arguments.steps)
                run, metrics, _ = run_toolkit(job, flags, arguments.timeout, case.gpus, case.sequences)
            except NoMeasurement as failure:
                failed = True
                print(failure.tail, file=sys.stderr, flush=True)
                print(f"{start} {str(failure).replace('|', '/')} | - | - | - | - |", flush=True)
                continue
            speed = steady([entry["tokens_per_second"] for entry in metrics if "tokens_per_second" in entry])
            peak, predicted = run["memory_gib"]["peak_reserved"], run["memory_gib"]["predicted_peak"]
            alone = alone or (speed, peak)
            print(
                f"{start} {speed:,.0f} | {speed / alone[0]:.2f} | {peak:.2f} | {peak / alone[1]:.2f} | {predicted:.2f} |",
                flush=True,
            )
    print(f"\n{arguments.gpus} x {gpu}; {versions_of(PACKAGES)}; {datetime.now(UTC).date().isoformat()}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
