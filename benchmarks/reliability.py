"""Kills and stops at random moments: is anything ever lost?

    python benchmarks/reliability.py --kills 200 --stops 100

Each run trains the embedded model of configs/tiny.yaml on the CPU for a few steps and saves after each. It is killed (SIGKILL)
at a random moment, more than half the times aiming at a save, and resumed, until it has finished; then its adapter and its log
are compared with those of a run that nobody disturbed, byte for byte. Stops (SIGINT, SIGTERM) likewise, with exit status and
step checked.

To be quick, a run is a forked child of this process, which has imported the libraries and started no thread of its own; every
tenth one is a process of its own (`python train_qlora.py`). Both call the same function, qlora_kit.cli.run. Nothing is mocked.
Before its first checkpoint a run is begun anew. A kill counts as inside a save when what the save works with was left behind. A
stop before the first step or after the last one ends the process as it would any program (130; SIGTERM itself): there is nothing
to save.
Prints a Markdown table and leaves with 1 when anything was lost.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # forks inherit no threads

from qlora_kit import cli  # noqa: E402
from qlora_kit.checkpoints import candidates, newest_valid  # noqa: E402

STEPS = 6
SETTINGS = [
    "--config", "configs/tiny.yaml", "--max_length", "32", "--batch_size", "2", "--max_steps", str(STEPS),
    "--set", "data.max_train_samples=10", "--set", "data.max_eval_samples=2",  # 3 steps an epoch, the last one short
    "--set", "training.save_steps=1", "--set", "training.logging_steps=2", "--set", "training.eval_steps=4",
]  # fmt: skip
OWN_PROCESS = 10  # every tenth
SHARE_IN_TRAINING = 0.75  # of the stops
SHARE_IN_A_SAVE = 0.6  # of the kills; fewer hit, as a save takes some 20 ms


@dataclass
class Child:
    """A training process, forked from this one or of its own; what it says goes to `said`."""

    pid: int
    said: Path
    status: int | None = None  # negative for a signal; None while it runs

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def wait(self, seconds: float = 300) -> int:
        until = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise SystemExit(f"a run hangs: {self.said}")
            time.sleep(0.002)
        assert self.status is not None
        return self.status


def start(folder: Path, own_process: bool) -> Child:
    """Begin in `folder`, or go on from what it holds."""
    flags = [*SETTINGS, "--output_dir", str(folder)]
    if candidates(folder / "checkpoints") or any(folder.glob("checkpoints/.replaced-*")):
        flags.append("--resume")
    elif (folder / "adapter_model.safetensors").exists():
        raise SystemExit(f"{folder}: an adapter and no checkpoint")
    said = folder.with_suffix(".txt")
    if own_process:
        with said.open("ab") as file:
            command = [sys.executable, "train_qlora.py", *flags]
            return Child(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file).pid, said)
    if pid := os.fork():
        return Child(pid, said)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 1
    try:
        import train_qlora

        sys.argv = ["train_qlora.py", *flags]
        cli.run(train_qlora.main)
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def steps_done(folder: Path) -> int:
    """Optimizer steps that the folder shows to be over: their checkpoint is there, or being written."""
    with suppress(FileNotFoundError):
        names = os.listdir(folder / "checkpoints")
        return max((int(name.rpartition("-")[2]) for name in names if name.startswith(("checkpoint-", ".saving-"))), default=0)
    return 0


def half_done(folder: Path) -> bool:
    """Whether a save was cut off: what it works with is still there."""
    return any(folder.glob("checkpoints/.*"))


def wait_for_a_save(child: Child, folder: Path) -> None:
    while child.running() and not half_done(folder):
        time.sleep(0.0003)


def outcome(folder: Path) -> tuple[str, list]:
    """What has to be the same: the adapter's bytes, and every logged number that is no measurement of time."""
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return digest, [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]


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
        valid, _ = newest_valid(candidates(folder / "checkpoints"))
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


FAULTS = (
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
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    cli.prepare_libraries()
    for name in ("train_qlora", "quantization_utils", "qlora_kit.device", "qlora_kit.perplexity", "qlora_kit.training"):
        importlib.import_module(name)  # everything that a fork would import

    place = Path(tempfile.mkdtemp(prefix="reliability-"))
    begun = time.monotonic()
    trial = Trial(place, arguments.seed)
    trial.repeat(arguments.kills, trial.kill)
    trial.repeat(arguments.stops, trial.stop)
    print(f"| {STEPS} steps, {trial.seconds:.1f} s a run left alone, seed {arguments.seed} | count |\n|---|---|")
    for name in (*COUNTS, *FAULTS):
        print(f"| {name} | {trial.found[name]} |")
    print(f"| minutes | {(time.monotonic() - begun) / 60:.1f} |")
    lost = any(trial.found[name] for name in FAULTS)
    if not lost:
        shutil.rmtree(place)
    sys.exit(lost)


if __name__ == "__main__":
    main()
