"""Short training runs of the embedded model on the CPU, which reliability.py and faults.py kill, stop and disturb."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # forks inherit no threads

from qlora_kit import cli  # noqa: E402
from qlora_kit.output.checkpoints import list_checkpoints  # noqa: E402

STEPS = 6
SETTINGS = [
    "--config", "configs/tiny.yaml", "--max_length", "32", "--batch_size", "2", "--max_steps", str(STEPS),
    "--set", "data.max_train_samples=10", "--set", "data.max_eval_samples=2",  # 3 steps an epoch, the last one short
    "--set", "training.save_steps=1", "--set", "training.logging_steps=2", "--set", "training.eval_steps=4",
]  # fmt: skip


@dataclass
class Child:
    """A training process, forked or started as a command; `said` is the file of its output."""

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


def start(folder: Path, own_process: bool = False, flags: Sequence[str] = (), inject: Callable[[], None] | None = None) -> Child:
    """Start a run in `folder`, or resume its newest checkpoint; the output goes to `folder` with the suffix .txt.

    Args:
        own_process: start train_qlora.py as a command instead of forking.
        inject: called in the forked child before the run, to inject a fault.
    """
    flags = [*SETTINGS, *flags, "--output_dir", str(folder)]
    if list_checkpoints(folder / "checkpoints") or any(folder.glob("checkpoints/.replaced/checkpoint-*")):
        flags.append("--resume")
    elif (folder / "adapter_model.safetensors").exists():
        raise SystemExit(f"{folder}: an adapter and no checkpoint")
    else:
        (folder / "training_log.txt").unlink(missing_ok=True)  # a run that died early is not started again while it is there
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

        if inject:
            inject()
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


def outcome(folder: Path) -> tuple[str, list]:
    """Return what must not differ between runs: the adapter's hash, and every logged number except tokens_per_second."""
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return digest, [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]
