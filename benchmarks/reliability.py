"""Kills and stops at random moments, and faults: is anything ever lost?

    python benchmarks/reliability.py --kills 200 --stops 100

Each run trains the embedded model of configs/tiny.yaml on the CPU for a few steps and saves after each. It is killed (SIGKILL)
at a random moment, more than half the times aiming at a save, and resumed, until it has finished; then its adapter and its log
are compared with those of a run that nobody disturbed, byte for byte. Stops (SIGINT, SIGTERM) likewise, with exit status and
step checked. Then each fault of faults.py.

To be quick, a run is a forked child of this process, which has imported the libraries and started no thread of its own; every
tenth one is a process of its own (`python train_qlora.py`). Both call the same function, qlora_kit.cli.run. Nothing is mocked.
Before its first checkpoint a run is begun anew. A kill counts as inside a save when what the save works with was left behind. A
stop before the first step or after the last one ends the process as it would any program (130; SIGTERM itself): there is nothing
to save.
Prints two Markdown tables and leaves with 1 when anything was lost.
"""

import argparse
import importlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from faults import FAULTS, Fault, Skipped
from tiny_runs import ROOT, STEPS, Child, outcome, start

from qlora_kit import cli
from qlora_kit.output.checkpoints import find_newest_valid, list_checkpoints

OWN_PROCESS = 10  # every tenth
SHARE_IN_TRAINING = 0.75  # of the stops
SHARE_IN_A_SAVE = 0.6  # of the kills; fewer hit, as a save takes some 20 ms


def steps_done(folder: Path) -> int:
    """Optimizer steps that the folder shows to be over: their checkpoint is there, or being written."""
    with suppress(FileNotFoundError):
        root = folder / "checkpoints"
        folders = [*list_checkpoints(root), *list_checkpoints(root / ".saving")]
        return max((int(path.name.rpartition("-")[2]) for path in folders), default=0)
    return 0


def half_done(folder: Path) -> bool:
    """Whether a save was cut off: what it works with is still there."""
    return any(folder.glob("checkpoints/.*"))


def wait_for_a_save(child: Child, folder: Path) -> None:
    while child.running() and not half_done(folder):
        time.sleep(0.0003)


class Trial:
    """Runs that are disturbed and resumed, until the wanted number of disturbances is reached; `found` counts what they met."""

    def __init__(self, place: Path, seed: int):
        self.place, self.random, self.found = place, random.Random(seed), Counter[str]()
        begun, folder = time.monotonic(), place / "undisturbed"
        if start(folder, own_process=False).wait() != 0:
            raise SystemExit(folder.with_suffix(".txt").read_text())
        self.seconds, self.expected = time.monotonic() - begun, outcome(folder)

    def repeat(self, wanted: int, disturb: Callable[[Child, Path, float], bool]) -> None:
        """`disturb` returns whether it came in time; the run is then resumed, and so on until it has finished."""
        done = 0
        while done < wanted:
            self.found["runs"] += 1
            folder = self.place / f"run-{self.found['runs']}"
            while True:
                self.found["processes"] += 1
                own_process = self.found["processes"] % OWN_PROCESS == 0
                self.found["of their own"] += own_process
                child = start(folder, own_process)
                # A process of its own imports the libraries first, for some six seconds; in the first half second there is only
                # the interpreter, which answers Ctrl+C in its own way.
                moment = self.random.uniform(0.5 * own_process, self.seconds + 6 * own_process)
                if done == wanted or not disturb(child, folder, moment):
                    break
                done += 1
                print(f"\r{done} of {wanted}", end="", file=sys.stderr)
            self.judge(child, folder)
        print(file=sys.stderr)

    def kill(self, child: Child, folder: Path, moment: float) -> bool:
        if self.random.random() < SHARE_IN_A_SAVE:
            for _ in range(self.random.randint(1, 3)):  # not always in the first that there is
                wait_for_a_save(child, folder)
                time.sleep(self.random.uniform(0, 0.012))
        else:
            time.sleep(moment)
        if not child.running():
            return False
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        self.found["kills"] += 1
        self.found["kills inside a save"] += half_done(folder)
        return True

    def stop(self, child: Child, folder: Path, moment: float) -> bool:
        number = self.random.choice([signal.SIGINT, signal.SIGTERM])
        if self.random.random() < SHARE_IN_TRAINING:
            begun, wanted = steps_done(folder), self.random.randint(1, 3)
            while child.running() and steps_done(folder) < begun + wanted:
                time.sleep(0.0003)
            time.sleep(self.random.uniform(0, 0.1))
        else:
            time.sleep(moment)
        if not child.running():
            return False
        seen, said = steps_done(folder), child.said.stat().st_size if child.said.exists() else 0
        os.kill(child.pid, number)
        status = child.wait()
        if status == 0:  # it had nothing left to do
            return False
        with child.said.open("rb") as file:
            stopped = re.search(rb"Stopped after step (\d+); everything is saved", file.read()[said:])
        self.found[f"stops by {number.name}"] += 1
        self.found["stops after a step"] += bool(stopped)
        self.found["stops with another exit status"] += status not in (128 + number, -number)
        valid, _ = find_newest_valid(list_checkpoints(folder / "checkpoints"))
        if stopped:
            step = int(stopped.group(1))
            self.found["stops more than a step late"] += step - seen > 2  # the one under way, and one more
            self.found["stops without their checkpoint"] += valid is None or valid.step != step
        return True

    def judge(self, child: Child, folder: Path) -> None:
        """The run was left alone at last."""
        finished = child.wait() == 0 and (folder / "run.json").exists()
        text = folder.with_suffix(".txt").read_text(errors="replace")
        self.found["runs lost"] += not finished
        self.found["invalid checkpoints met"] += text.count("Passed over, not valid")
        same = finished and outcome(folder) == self.expected
        self.found["runs with another adapter or log"] += finished and not same
        if same:
            shutil.rmtree(folder)
        else:
            print(f"\nkept for a look: {folder}", file=sys.stderr)


WRONG = (
    "runs lost", "runs with another adapter or log", "invalid checkpoints met", "stops with another exit status",
    "stops more than a step late", "stops without their checkpoint",
)  # fmt: skip
COUNTS = (
    "kills",
    "kills inside a save",
    "stops by SIGINT",
    "stops by SIGTERM",
    "stops after a step",
    "runs",
    "processes",
    "of their own",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILL at random moments (default: 200)")
    parser.add_argument("--stops", type=int, default=100, help="SIGINT or SIGTERM at random moments (default: 100)")
    parser.add_argument("--no_faults", action="store_true", help="kills and stops alone")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    cli.prepare_libraries()
    for name in (
        "train_qlora",
        "quantization_utils",
        "qlora_kit.model.device",
        "qlora_kit.model.perplexity",
        "qlora_kit.training.build",
    ):
        importlib.import_module(name)  # everything that a fork would import

    place = Path(tempfile.mkdtemp(prefix="reliability-"))
    begun = time.monotonic()
    trial = Trial(place, arguments.seed)
    trial.repeat(arguments.kills, trial.kill)
    trial.repeat(arguments.stops, trial.stop)
    print(f"| {STEPS} steps, {trial.seconds:.1f} s a run left alone, seed {arguments.seed} | count |\n|---|---|")
    for name in (*COUNTS, *WRONG):
        print(f"| {name} | {trial.found[name]} |")
    print(f"| minutes | {(time.monotonic() - begun) / 60:.1f} |")
    lost = any(trial.found[name] for name in WRONG)
    lost |= not (arguments.no_faults or try_faults(place, trial.expected))
    if not lost:
        shutil.rmtree(place)
    sys.exit(lost)


def try_faults(place: Path, expected: tuple) -> bool:
    """Whether every fault went as it should; prints the table."""
    print("\n| fault | tried | one line, nothing lost | what was said |\n|---|---|---|---|")
    right = True
    for name, fault in FAULTS.items():
        try:
            result = fault(place, expected)
        except Skipped as reason:
            result = Fault(0, 0, f"skipped: {reason}")
        right &= result.right == result.tried
        said = result.said.replace(str(place), "OUT").replace("|", "\\|")
        print(f"| {name} | {result.tried} | {result.right} | `{said}` |", flush=True)
    return right


if __name__ == "__main__":
    main()
