"""Faults injected into short runs on the CPU: each must end in one line, lose nothing, and resume to the undisturbed result.

reliability.py runs them and prints the table. A fault that this machine cannot produce (mounting a small disk needs root) is
skipped, and the table says so.
"""

import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tiny_runs import STEPS, Child, outcome, start

from qlora_kit.output.checkpoints import find_newest_valid, list_checkpoints


class Fault(NamedTuple):
    """The result of one kind of fault."""

    tried: int
    right: int
    said: str  # the message of the last run, or why the fault was skipped


class Skipped(Exception):
    pass


def last_line(folder: Path) -> str:
    """Return the last line of a process, if it printed one error line and no traceback; else the end of its output."""
    text = folder.with_suffix(".txt").read_text(errors="replace")
    folder.with_suffix(".txt").unlink()
    lines = text.strip().splitlines()
    single = sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in text
    return lines[-1] if lines and single else f"not one line: {text[-2000:]}"


def resumes(folder: Path, expected: tuple) -> bool:
    """Resume the run without a fault; return whether its adapter and log equal those of the undisturbed run."""
    status = start(folder).wait()
    same = status == 0 and outcome(folder) == expected
    if not same:
        print(f"\n{folder}: status {status}: {folder.with_suffix('.txt').read_text()[-2000:]}")
    return same


def pause_at(folder: Path, step: int) -> Child:
    """Start a run and pause it after the checkpoint of `step`."""
    child = start(folder)
    while child.running() and not (folder / "checkpoints" / f"checkpoint-{step}").exists():
        time.sleep(0.0005)
    os.kill(child.pid, signal.SIGSTOP)
    return child


def kill_at(folder: Path, step: int) -> None:
    """Start a run and kill it after the checkpoint of `step`."""
    child = pause_at(folder, step)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    folder.with_suffix(".txt").unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a file system of 64 MiB at `folder`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        raise Skipped("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(place: Path, expected: tuple) -> Fault:
    """Fill the disk during a run; the run is resumed when there is space again."""
    right, steps = 0, range(1, STEPS - 1)
    for step in steps:
        folder = place / f"full-{step}"
        with small_disk(folder):
            child = pause_at(folder, step)
            free = shutil.disk_usage(folder).free
            (folder / "filler").write_bytes(bytes(free - 300_000))
            os.kill(child.pid, signal.SIGCONT)
            status, said = child.wait(), last_line(folder)
            valid, _ = find_newest_valid(list_checkpoints(folder / "checkpoints"))
            (folder / "filler").unlink()
            kept = status == 1 and said.startswith("error: ") and valid is not None and valid.step >= step
            right += kept and resumes(folder, expected)
    return Fault(len(steps), right, said)


def read_only(place: Path, expected: tuple) -> Fault:
    """Make the disk of an unfinished run read-only, then writable again."""
    folder = place / "read-only"
    with small_disk(folder):
        kill_at(folder, 3)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        status, said = start(folder).wait(), last_line(folder)
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        right = status == 2 and said.startswith("error: training.output_dir") and resumes(folder, expected)
    return Fault(1, int(right), said)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage(change: Callable[[Path], None]) -> Callable[[Path, tuple], Fault]:
    """Return a fault that damages each file of the newest checkpoint in turn; the run resumes from the one before it."""

    def fault(place: Path, expected: tuple) -> Fault:
        begun = place / f"begun-{change.__name__}"
        kill_at(begun, 4)
        newest = find_newest_valid(list_checkpoints(begun / "checkpoints"))[0]
        assert newest is not None
        files, right = [*newest.files, "manifest.json"], 0
        for name in files:
            folder = Path(shutil.copytree(begun, place / f"{change.__name__}-{name}.run"))
            change(folder / "checkpoints" / newest.folder.name / name)
            same = resumes(folder, expected)
            lines = folder.with_suffix(".txt").read_text().splitlines()
            said = next((line for line in lines if line.startswith("Skipped an invalid checkpoint")), "")
            right += same and name in said
        return Fault(len(files), right, said)

    return fault


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


def two_at_once(place: Path, expected: tuple) -> Fault:
    """Start two runs in one new folder; one of them must be refused."""
    right, pauses = 0, (0.0, 0.05, 0.2, 0.4)
    for number, pause in enumerate(pauses):
        folder = place / f"two-{number}"
        first = start(folder)
        time.sleep(pause)
        second = start(folder, flags=["--overwrite"])  # it would delete the first run's files
        statuses = sorted([first.wait(), second.wait()])
        text = folder.with_suffix(".txt").read_text()
        said = next((line for line in text.splitlines() if line.startswith("error: ")), "")
        right += statuses == [0, 2] and "another run" in said and "Traceback" not in text and outcome(folder) == expected
    return Fault(len(pauses), right, said)


def poison(step: int) -> Callable[[], None]:
    def inject() -> None:
        from qlora_kit.fast.micro_step import MicroStep

        real = MicroStep.train
        MicroStep.train = lambda micro, *rest: real(micro, *rest) * (math.nan if micro.step + 1 == step else 1)  # type: ignore

    return inject


def nan_loss(place: Path, expected: tuple) -> Fault:
    """Make the loss of step k NaN: the run stops at k, and the checkpoint of the step before is its newest."""
    right = 0
    for step in range(1, STEPS + 1):
        folder = place / f"nan-{step}"
        status, said = start(folder, inject=poison(step)).wait(), last_line(folder)
        valid, _ = find_newest_valid(list_checkpoints(folder / "checkpoints"))
        stopped = status == 1 and f"the loss is nan at step {step} " in said and (valid.step if valid else 0) == step - 1
        right += stopped and resumes(folder, expected)
    return Fault(STEPS, right, said)


def starve(step: int) -> Callable[[], None]:
    def inject() -> None:
        import torch

        from qlora_kit.fast.micro_step import MicroStep
        from qlora_kit.fast.training_pass import FastDecoder

        real, begin, now = FastDecoder.accumulate, MicroStep.begin_step, [0]

        def begins(micro, number):
            now[0] = number + 1
            begin(micro, number)

        def accumulate(decoder, inputs, *rest):
            result = real(decoder, inputs, *rest)  # memory runs out after the gradient was added
            if now[0] >= step and len(inputs) > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return result

        FastDecoder.accumulate, MicroStep.begin_step = accumulate, begins  # type: ignore

    return inject


def out_of_memory(place: Path, _: tuple) -> Fault:
    """Let step k run out of memory: from there on half as many sequences at a time, the same data, the same losses."""
    flags = ["--dropout", "0"]  # dropout is drawn for each micro-batch
    straight = place / "enough-memory"
    start(straight, flags=flags).wait()
    expected, right = outcome(straight)[1], 0
    for step in range(1, STEPS + 1):
        folder = place / f"memory-{step}"
        status = start(folder, flags=flags, inject=starve(step)).wait()
        lines = folder.with_suffix(".txt").read_text().splitlines()
        said = next((line for line in lines if line.startswith("Out of GPU memory")), "")
        found = outcome(folder)[1] if status == 0 else []
        same = len(found) == len(expected) and all(
            math.isclose(one.get(key, 0), other.get(key, 0), rel_tol=1e-3)
            for one, other in zip(found, expected, strict=True)
            for key in ("step", "epoch", "loss", "eval_loss")
        )
        right += same and f"in step {step}:" in said
    return Fault(STEPS, right, said)


FAULTS: dict[str, Callable[[Path, tuple], Fault]] = {
    "full disk during a run": full_disk,
    "read-only output": read_only,
    "a flipped bit in a file of the newest checkpoint": damage(flip),
    "a truncated file in it": damage(truncate),
    "a missing file in it": damage(remove),
    "two runs in one folder at once": two_at_once,
    "NaN at step k": nan_loss,
    "out of memory at step k": out_of_memory,
}
