"""Compare a killed and resumed 3B run on a GPU with two undisturbed ones: do its losses differ by more than theirs do?

    python benchmarks/resume_on_gpu.py --tokenizer DIR --train FILE --eval FILE

The same command runs twice, then once more: killed (SIGKILL) as soon as one of its checkpoints is complete, and resumed. The
optimizer's paged 8-bit moments must be paged again after loading. The exit status is 1 if a loss differs from the first run's by
more than NOISE times the difference of the two undisturbed runs, or if no moment was paged again.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

from runs import ROOT, Job, NoMeasurement, in_own_process, input_parser, random_checkpoint, require_gpu, run_limited, versions_of
from train_speed import PACKAGES

NOISE = 2
ROUNDING = 1e-4  # of the loss: two undisturbed runs may agree exactly, but a resumed one captures its graph at another step


def kill_after(command: list[str], step: int, output: Path, limit_seconds: float) -> None:
    """Start a run and kill it as soon as the checkpoint of a step is complete.

    Raises:
        NoMeasurement: it ended before that, or exceeded the limit.
    """
    until, checkpoint = time.monotonic() + limit_seconds, output / "checkpoints" / f"checkpoint-{step}"
    with subprocess.Popen(command, cwd=output.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not checkpoint.exists() and time.monotonic() < until:
            time.sleep(0.001)
        process.kill()
    if process.returncode != -signal.SIGKILL or not checkpoint.exists():
        raise NoMeasurement(f"the run to be killed ended with status {process.returncode} before checkpoint-{step} was complete")


def resume(flags: list[str]) -> tuple[int, int]:
    """Resume in this process; return how many moments were paged again, and how many are paged at the end of the run."""
    sys.path.insert(0, str(ROOT))
    import train_qlora
    from qlora_kit import cli
    from qlora_kit.training import trainer

    found, page = [], trainer.move_state_to_paged_memory
    trainer.move_state_to_paged_memory = lambda optimizer: found.append((optimizer, page(optimizer)))
    cli.prepare_libraries()
    with redirect_stdout(sys.stderr):
        train_qlora.main([*flags, "--resume"])
    ((optimizer, moved),) = found
    states = [state[name] for state in optimizer.state.values() for name in ("state1", "state2")]
    return moved, sum(getattr(state, "is_paged", False) for state in states)


def losses(output: Path) -> list[float]:
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def greatest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = input_parser(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a run (default: 12)")
    parser.add_argument(
        "--kill_after", type=int, default=5, metavar="STEP", help="kill when this checkpoint is complete (default: 5)"
    )
    arguments = parser.parse_args()
    gpu, flags = require_gpu(), ["--set", "training.save_steps=1"]
    with random_checkpoint("3B", arguments.tokenizer, arguments.checkpoints) as checkpoint, tempfile.TemporaryDirectory() as work:
        job = Job(checkpoint, arguments.train, arguments.eval, arguments.steps)
        outputs = [Path(work, name) for name in ("first", "second", "killed")]
        commands = [job.toolkit_command(flags, output) for output in outputs]
        try:
            for command in commands[:2]:
                run_limited(command, Path(work), arguments.timeout)
            kill_after(commands[2], arguments.kill_after, outputs[2], arguments.timeout)
            moved, paged = in_own_process(resume, commands[2][2:])
        except NoMeasurement as failure:
            print(failure.tail, file=sys.stderr)
            sys.exit(f"error: {failure}")
        first, second, resumed = map(losses, outputs)
    noise, difference = greatest_difference(first, second), greatest_difference(first, resumed)
    print("| step | first run | second run | killed and resumed |\n|---|---|---|---|")
    for step, row in enumerate(zip(first, second, resumed, strict=True), 1):
        print(f"| {step} | " + " | ".join(f"{loss:.5f}" for loss in row) + " |")
    print(f"\nThe two undisturbed runs differ by at most {noise:.1e}, the resumed one from the first by {difference:.1e}.")
    print(f"Moments paged again after loading: {moved}; paged at the end of the run: {paged}.")
    print(f"{gpu}; {versions_of(PACKAGES)}; {datetime.now(UTC).date().isoformat()}")
    sys.exit(not moved or difference > NOISE * max(noise, ROUNDING * first[0]))


if __name__ == "__main__":
    main()
