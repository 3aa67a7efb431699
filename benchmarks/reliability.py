"""Kill and stop runs at random moments, inject faults, and check that nothing is lost.

    python benchmarks/reliability.py --kills 200 --stops 100

Each run trains the embedded model of configs/tiny.yaml on the CPU for a few steps and saves after each step. It is killed
(SIGKILL) at a random moment, in more than half the cases close to a save, and resumed, until it has finished; then its adapter
and its log must equal those of an undisturbed run byte for byte. Stops (SIGINT, SIGTERM) are tested alike; their exit status and
step are checked too. Then each fault of faults.py is injected.

For speed a run is a forked child of this process, which has imported the libraries and started no thread; every tenth run is a
separate process (`python train_qlora.py`). Both call qlora_kit.cli.run, and nothing is mocked. A run without a checkpoint starts
again from step 0. A kill counts as inside a save if temporary folders of the save were left. A stop before the first step or
after the last one ends the process like any program (130, or SIGTERM itself): there is nothing to save.
Prints two Markdown tables; the exit status is 1 if anything was lost.
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

OWN_PROCESS = 10  # every tenth run is a separate process
SHARE_IN_TRAINING = 0.75  # of the stops
SHARE_IN_A_SAVE = 0.6  # of the kills; fewer succeed, because a save takes only some 20 ms


def steps_done(folder: Path) -> int:
    """Return the newest optimizer step whose checkpoint is complete or being written."""
    with suppress(FileNotFoundError):
        root = folder / "checkpoints"
        folders = [*list_checkpoints(root), *list_checkpoints(root / ".saving")]
        return max((int(path.name.rpartition("-")[2]) for path in folders), default=0)
    return 0


def has_leftovers(folder: Path) -> bool:
    """Return whether a save is running or was interrupted: its temporary folders exist."""
    return any(folder.glob("checkpoints/.*"))


def wait_for_a_save(child: Child, folder: Path) -> None:
    while child.running() and not has_leftovers(folder):
        time.sleep(0.0003)


class Trial:
    """Runs that are disturbed and resumed until the wanted number of disturbances is reached; `found` counts the results."""

    def __init__(self, place: Path, seed: int):
        self.place, self.random, self.found = place, random.Random(seed), Counter[str]()
        begun, folder = time.monotonic(), place / "undisturbed"
        if start(folder, own_process=False).wait() != 0:
            raise SystemExit(folder.with_suffix(".txt").read_text())
        self.seconds, self.expected = time.monotonic() - begun, outcome(folder)

    def repeat(self, wanted: int, disturb: Callable[[Child, Path, float], bool]) -> None:
        """Disturb and resume runs until `wanted` disturbances hit; `disturb` returns whether it came before the run's end."""
        done = 0
        while done < wanted:
            self.found["runs"] += 1
            folder = self.place / f"run-{self.found['runs']}"
            while True:
                self.found["processes"] += 1
                own_process = self.found["processes"] % OWN_PROCESS == 0
                self.found["separate processes"] += own_process
                child = start(folder, own_process)
                # A separate process first imports the libraries, for some six seconds; in the first half second only the
                # interpreter runs, which handles Ctrl+C itself.
                moment = self.random.uniform(0.5 * own_process, self.seconds + 6 * own_process)
                if done == wanted or not disturb(child, folder, moment):
                    break
                done += 1
                print(f"\r{done} of {wanted}", end="", file=sys.stderr)
            self.judge(child, folder)
        print(file=sys.stderr)

    def kill(self, child: Child, folder: Path, moment: float) -> bool:
        if self.random.random() < SHARE_IN_A_SAVE:
            for _ in range(self.random.randint(1, 3)):  # not always in the first save
                wait_for_a_save(child, folder)
                time.sleep(self.random.uniform(0, 0.012))
        else:
            time.sleep(moment)
        if not child.running():
            return False
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        self.found["kills"] += 1
        self.found["kills inside a save"] += has_leftovers(folder)
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
        if status == 0:  # the run had finished
            return False
        with child.said.open("rb") as file:
            stopped = re.search(rb"Stopped after step (\d+); everything is saved", file.read()[said:])
        self.found[f"stops by {number.name}"] += 1
        self.found["stops after a step"] += bool(stopped)
        self.found["stops with another exit status"] += status not in (128 + number, -number)
        valid, _ = find_newest_valid(list_checkpoints(folder / "checkpoints"))
        if stopped:
            step = int(stopped.group(1))
            self.found["stops more than a step late"] += step - seen > 2  # the current step and one more are allowed
            self.found["stops without their checkpoint"] += valid is None or valid.step != step
        return True

    def judge(self, child: Child, folder: Path) -> None:
        """Count the result of a run whose last process was not disturbed."""
        finished = child.wait() == 0 and (folder / "run.json").exists()
        text = folder.with_suffix(".txt").read_text(errors="replace")
        self.found["runs lost"] += not finished
        self.found["invalid checkpoints found"] += text.count("Skipped an invalid checkpoint")
        same = finished and outcome(folder) == self.expected
        self.found["runs with another adapter or log"] += finished and not same
        if same:
            shutil.rmtree(folder)
        else:
            print(f"\nkept for inspection: {folder}", file=sys.stderr)


WRONG = (
    "runs lost", "runs with another adapter or log", "invalid checkpoints found", "stops with another exit status",
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
    "separate processes",
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
        importlib.import_module(name)  # all that a fork would import

    place = Path(tempfile.mkdtemp(prefix="reliability-"))
    begun = time.monotonic()
    trial = Trial(place, arguments.seed)
    trial.repeat(arguments.kills, trial.kill)
    trial.repeat(arguments.stops, trial.stop)
    print(f"| {STEPS} steps, {trial.seconds:.1f} s for an undisturbed run, seed {arguments.seed} | count |\n|---|---|")
    for name in (*COUNTS, *WRONG):
        print(f"| {name} | {trial.found[name]} |")
    print(f"| minutes | {(time.monotonic() - begun) / 60:.1f} |")
    lost = any(trial.found[name] for name in WRONG)
    lost |= not (arguments.no_faults or try_faults(place, trial.expected))
    if not lost:
        shutil.rmtree(place)
    sys.exit(lost)


def try_faults(place: Path, expected: tuple) -> bool:
    """Inject every fault and print the table; return whether all went as they should."""
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
