"""Training speed and memory of the toolkit and of its alternatives, measured in one go on one GPU.

    python benchmarks/train_speed.py --tokenizer DIR --train FILE --eval FILE --json speed.json
    python benchmarks/train_speed.py ... --sections "1 x 16" lean
    python benchmarks/train_speed.py ... --dry-run          only print the commands; needs no GPU

The job: a random checkpoint of Qwen2.5-3B's true shape (speed and memory do not depend on the weights' values), real text, and
the settings of config.yaml: NF4 with double quantization, LoRA of rank 16, alpha 32 and dropout 0.05 on all seven projections,
blocks of 512 tokens, 16 of them (8,192 tokens) per optimizer step, paged 8-bit Adam, bfloat16. The name of a row states any
difference. The toolkit runs through its own command line, its rivals through rivals.py, each run in a separate process. The row
of a rival that is not installed, fails or runs out of memory states the reason.

Speed: tokens per second of each optimizer step, up to the moment when the GPU has finished it. The first two steps are left out
(warm-up, graph capture, compilation), and the median of the others counts. The toolkit logs each step's speed in metrics.jsonl,
without evaluations; a callback of each rival takes the time at the end of each step.
Memory: the peak that torch's allocator reserved over the whole process, loading included, without the CUDA context and the paged
optimizer state. The toolkit's process also evaluates before and after training; those of the rivals do not.

Each row is printed when it is measured, and progress goes to standard error. The exit status is 1 if a run of the toolkit failed.
"""

import json
import shlex
import signal
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from rivals import SYSTEMS, Rival
from runs import ROOT, Job, NoMeasurement, input_parser, random_checkpoint, require_gpu, run_limited, run_toolkit, versions_of

WARM_UP = 2  # first optimizer steps, which are not counted
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "unsloth")


@dataclass(frozen=True)
class Toolkit:
    """A run of train_qlora.py: its name in the table, settings besides the job's, and its config file."""

    name: str
    keys: tuple[str, ...] = ()
    config: str = "config.yaml"

    def flags(self) -> list[str]:
        return ["--config", str(ROOT / self.config), *(word for key in self.keys for word in ("--set", key))]


PLANNED = ("performance.micro_batch=auto", "training.gradient_checkpointing=auto")
SECTIONS: dict[str, tuple[str, list[Toolkit | Rival]]] = {
    "1 x 16": (
        "the textbook's micro-batch, where launching kernels takes longer than running them",
        [
            Toolkit("toolkit 1 x 16", ("performance.micro_batch=1", "training.gradient_checkpointing=true")),
            Rival("plain", 1),
            Rival("trl", 1),
            Rival("unsloth", 1, "own"),
        ],
    ),
    "8 GiB": (
        "the fastest that fits the card this is for",
        [
            Toolkit("toolkit, its planner's choice", ("performance.vram_limit_gib=8", *PLANNED)),
            Rival("plain", 1, cap_gib=8),
            Rival("trl", 16, cap_gib=8),
            Rival("unsloth", 16, "own", cap_gib=8),
            Rival("unsloth", 16, dropout=0.0, cap_gib=8),
        ],
    ),
    "no cap": (
        "the fastest of all",
        [
            Toolkit("toolkit, its planner's choice", PLANNED),
            Rival("plain", 16),
            Rival("trl", 16),
            Rival("unsloth", 16, dropout=0.0),
            Rival("unsloth", 4, "off", dropout=0.0),
            Rival("unsloth", 16, "off", dropout=0.0),
        ],
    ),
    "lean": (
        "the least memory",
        [Toolkit("toolkit, configs/lean.yaml", config="configs/lean.yaml"), Rival("trl", 1)],
    ),
}


@dataclass
class Row:
    """One measurement, or the reason for its failure."""

    section: str
    run: str
    command: str
    tokens_per_second: float | None = None
    step_tokens_per_second: list[float] = field(default_factory=list)  # of each step, warm-up included
    peak_reserved_gib: float | None = None
    peak_allocated_gib: float | None = None
    predicted_gib: float | None = None  # predicted by the toolkit before it started
    no_measurement: str | None = None
    output_end: str = ""  # last lines of a failed run
    log: str = ""  # training_log.txt of the toolkit
    seconds: float = 0.0  # of the whole process

    def line(self, toolkit_speed: float | None) -> str:
        speed = f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else (self.no_measurement or "-").replace("|", "/")
        both = toolkit_speed is not None and self.tokens_per_second is not None
        ratio = f"{toolkit_speed / self.tokens_per_second:.2f}" if both else "-"  # type: ignore[operator]
        cells = [self.section, self.run, speed, ratio, in_gib(self.peak_reserved_gib), in_gib(self.predicted_gib)]
        return f"| {' | '.join(cells)} |"


HEADER = "| section | run | tokens/s | toolkit's speed / this | peak reserved GiB | predicted GiB |\n|---|---|---|---|---|---|"


def in_gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def steady(step_speeds: list[float]) -> float:
    """Return the median over the optimizer steps after the warm-up.

    Raises:
        NoMeasurement: there is no such step.
    """
    if len(step_speeds) <= WARM_UP:
        raise NoMeasurement(f"{len(step_speeds)} timed steps; the first {WARM_UP} do not count")
    return statistics.median(step_speeds[WARM_UP:])


def command_of(run: Toolkit | Rival, job: Job, output: Path) -> list[str]:
    if isinstance(run, Toolkit):
        return job.toolkit_command(run.flags(), output)
    command = [sys.executable, str(ROOT / "benchmarks" / "rivals.py"), *run.flags()]
    return [*command, "--model", str(job.checkpoint), "--train", str(job.train), "--steps", str(job.steps)]


def measure(section: str, run: Toolkit | Rival, job: Job, limit_seconds: float) -> Row:
    row = Row(section, run.name, shlex.join(command_of(run, job, Path("OUTPUT"))))
    started = time.perf_counter()
    try:
        if isinstance(run, Toolkit):
            measure_toolkit(row, run, job, limit_seconds)
        else:
            measure_rival(row, run, job, limit_seconds)
        row.tokens_per_second = steady(row.step_tokens_per_second)
    except NoMeasurement as failure:
        row.no_measurement, row.output_end = str(failure), failure.tail
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def measure_toolkit(row: Row, run: Toolkit, job: Job, limit_seconds: float) -> None:
    provenance, metrics, row.log = run_toolkit(job, run.flags(), limit_seconds)
    memory = provenance["memory_gib"]
    row.step_tokens_per_second = [entry["tokens_per_second"] for entry in metrics if "tokens_per_second" in entry]
    row.peak_reserved_gib, row.peak_allocated_gib = memory["peak_reserved"], memory["peak_allocated"]
    row.predicted_gib = memory["predicted_peak"]


def measure_rival(row: Row, rival: Rival, job: Job, limit_seconds: float) -> None:
    if missing := [package for package in SYSTEMS[rival.system] if find_spec(package) is None]:
        raise NoMeasurement(f"not installed ({', '.join(missing)})")
    with tempfile.TemporaryDirectory() as work:  # Unsloth writes the code it generates to the working folder
        written = run_limited(command_of(rival, job, Path(work)), Path(work), limit_seconds)
    result = last_object(written)
    row.step_tokens_per_second = result["tokens_per_second"]
    row.peak_reserved_gib, row.peak_allocated_gib = result["peak_reserved_gib"], result["peak_allocated_gib"]


def last_object(written: str) -> dict:
    """Return the JSON object that rivals.py prints last, among the output of the libraries.

    Raises:
        NoMeasurement: there is no such object.
    """
    lines = [line for line in written.splitlines() if line.startswith('{"')]
    if not lines:
        raise NoMeasurement("ended without a result", written[-3000:])
    return json.loads(lines[-1])


def measure_sections(sections: list[str], job: Job, limit_seconds: float) -> Iterator[Row]:
    """Measure, print and yield row after row."""
    total, done = sum(len(SECTIONS[section][1]) for section in sections), 0
    print(HEADER, flush=True)
    for section in sections:
        purpose, runs = SECTIONS[section]
        say(f"{section}: {purpose}")
        toolkit_speed = None
        for run in runs:
            done += 1
            say(f"[{done}/{total}] {run.name} ...")
            row = measure(section, run, job, limit_seconds)
            if isinstance(run, Toolkit):
                toolkit_speed = row.tokens_per_second
            if row.output_end:
                say(row.output_end)
            say(f"[{done}/{total}] {run.name}: {row.seconds:.0f} s")
            print(row.line(toolkit_speed), flush=True)
            yield row


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show_plan(sections: list[str], job: Job) -> None:
    for section in sections:
        purpose, runs = SECTIONS[section]
        print(f"\n{section}: {purpose}")
        for run in runs:
            cap = f", cap {run.cap_gib:g} GiB" if isinstance(run, Rival) and run.cap_gib else ""
            print(f"  {run.name}{cap}\n    {shlex.join(command_of(run, job, Path('OUTPUT')))}")


def circumstances(gpu: str) -> dict[str, str]:
    """Return hardware, versions, date and command of the measurement."""
    return {
        "hardware": gpu,
        "versions": versions_of(PACKAGES),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def parse_arguments() -> Namespace:
    parser = input_parser(__doc__)
    names = ", ".join(repr(section) for section in SECTIONS)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=f"of {names}")
    parser.add_argument("--steps", type=int, default=8, help=f"optimizer steps of a run, more than {WARM_UP} (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here, after each row")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps: {arguments.steps}: the first {WARM_UP} are not counted; use more")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.dry_run:
        return show_plan(arguments.sections, Job(Path("CHECKPOINT"), arguments.train, arguments.eval, arguments.steps))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the current run is ended too
    facts = circumstances(require_gpu())
    rows: list[Row] = []
    with random_checkpoint("3B", arguments.tokenizer, arguments.checkpoints) as checkpoint:
        job = Job(checkpoint, arguments.train, arguments.eval, arguments.steps)
        for row in measure_sections(arguments.sections, job, arguments.timeout):
            rows.append(row)
            if arguments.json:
                whole = {**facts, "steps": arguments.steps, "rows": [asdict(row) for row in rows]}
                arguments.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print("\n" + "; ".join(facts.values()))
    sys.exit(1 if any(row.no_measurement and row.run.startswith("toolkit") for row in rows) else 0)


if __name__ == "__main__":
    main()
