"""Random checkpoints of true shapes, runs in separate processes, and flags, shared by the benchmarks.

Only those processes import torch, so a benchmark holds no GPU memory while it measures.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
SEQUENCES = 16  # per optimizer step, as in config.yaml, however the step is divided
KNOWN = "Qwen/Qwen2.5-3B-Instruct"  # its shape is in qlora_kit; SHAPES lists how the others differ
SHAPES: dict[str, dict[str, Any]] = {
    "3B": {},
    "0.5B": {"num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "intermediate_size": 4864},
    "7B": {
        "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
LARGE = {"32B": "Qwen/Qwen2.5-32B-Instruct"}  # too large for one GPU; the shape is in qlora_kit too
T = TypeVar("T")


class NoMeasurement(Exception):
    """A failed run: the reason in one line, and the end of its standard error in `tail`."""

    def __init__(self, reason: str, tail: str = ""):
        super().__init__(reason)
        self.tail = tail


@dataclass(frozen=True)
class Job:
    """Inputs and length of every run of a benchmark."""

    checkpoint: Path
    train: Path
    evaluation: Path
    steps: int

    def toolkit_command(self, flags: list[str], output: Path) -> list[str]:
        """Return the command line of train_qlora.py, with full optimizer steps and a full micro-batch to evaluate on."""
        keys = {
            "data.eval_split": self.evaluation,
            "data.max_eval_samples": SEQUENCES,
            "data.max_train_samples": self.steps * SEQUENCES,
            "training.logging_steps": 1,
            "training.eval_steps": self.steps,
        }
        command = [sys.executable, ROOT / "train_qlora.py", "--model_name", self.checkpoint, "--dataset", self.train]
        command += ["--output_dir", output, "--max_steps", self.steps]
        command += [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        return [*map(str, command), *flags]


def run_toolkit(
    job: Job, flags: list[str], limit_seconds: float, processes: int = 1, sequences: int = SEQUENCES
) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Run train_qlora.py; return run.json, the objects of metrics.jsonl, and training_log.txt.

    Args:
        processes: number of processes, one GPU each.
        sequences: sequences per optimizer step, over all processes.

    Raises:
        NoMeasurement: the run failed, reached the time limit or ran out of memory, or the text is too short for its steps.
    """
    with tempfile.TemporaryDirectory() as work:
        output = Path(work, "output")
        command = job.toolkit_command(flags, output)
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [command[0], *launcher, *command[1:]]
        run_limited(command, Path(work), limit_seconds, processes)
        run = json.loads((output / "run.json").read_text(encoding="utf-8"))
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        log = (output / "training_log.txt").read_text(encoding="utf-8")
    if run["data"]["train_blocks"] < job.steps * sequences:
        raise NoMeasurement(f"{job.train} fills {run['data']['train_blocks']} of {job.steps * sequences} blocks; use more text")
    if "Out of GPU memory" in log:
        raise NoMeasurement("ran out of memory and continued with a smaller micro-batch", log)
    return run, metrics, log


def run_limited(command: list[str], folder: Path, limit_seconds: float, gpus: int = 1) -> str:
    """Run a command in `folder` with the first GPUs only, end all its processes, and return its standard output.

    Raises:
        NoMeasurement: the command failed or reached the time limit.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=err, start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible)},
        )  # fmt: skip
        status = None
        with suppress(subprocess.TimeoutExpired):
            try:
                status = process.wait(limit_seconds)
            finally:  # also on Ctrl+C, and because compiler workers may outlive the command
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        written = err.read()
        if status is None:
            raise NoMeasurement(f"not done after {limit_seconds:.0f} s", written[-3000:])
        if status != 0:
            raise NoMeasurement(reason_in(written, status), written[-3000:])
        return out.read()


def reason_in(written: str, status: int) -> str:
    """Return the line of standard error that says why a command failed: the last error, or the last line."""
    lines = [line.rstrip() for line in written.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)(:|$)", line)]
    if not lines or (status < 0 and not errors):
        return f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    reason = (errors or lines)[-1]
    if re.search(r"out ?of ?memory|memory is full", reason, re.IGNORECASE):
        return "out of memory"
    return reason if len(reason) <= 160 else f"{reason[:157]}..."


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that uses the GPU in a process of its own, which frees the GPU's memory at its end."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def gpu_name() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_name(0)}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"


def require_gpu() -> str:
    """Return the name and memory of the GPU, or end the benchmark if there is none."""
    return in_own_process(gpu_name) or sys.exit("error: torch finds no CUDA GPU, which this benchmark needs")


@contextmanager
def random_checkpoint(model: str, tokenizer: Path, kept_in: Path | None) -> Iterator[Path]:
    """Yield the folder of a random checkpoint, made now unless an earlier benchmark kept one."""
    with tempfile.TemporaryDirectory() as work:
        folder = (kept_in or Path(work)) / f"qwen2.5-{model.lower()}-random"
        if not folder.exists():
            print(f"making {folder}", file=sys.stderr, flush=True)
            in_own_process(make_checkpoint, model, tokenizer, folder)
        yield folder


def make_checkpoint(model: str, tokenizer: Path, folder: Path) -> None:
    """Write a checkpoint with random bfloat16 weights of a model's shape, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    sys.path.insert(0, str(ROOT))
    from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

    config = KNOWN_CONFIGS[LARGE[model]] if model in LARGE else KNOWN_CONFIGS[KNOWN] | SHAPES[model]
    shape = read_shape(config)
    assert shape is not None
    roomy = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2.5 * shape.parameters()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with torch.device("cuda" if roomy else "cpu"):
        Qwen2ForCausalLM(Qwen2Config(**config)).save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(unfinished)
    unfinished.rename(folder)


def installed(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions_of(packages: tuple[str, ...]) -> str:
    """Return the versions of Python and of packages in one line."""
    found = {"python": sys.version.split()[0]} | {package: installed(package) for package in packages}
    return ", ".join(f"{name} {number}" for name, number in found.items())


def absolute(name: str) -> Path:
    return Path(name).expanduser().resolve()  # runs change the working folder


def existing(name: str) -> Path:
    if not absolute(name).exists():
        raise argparse.ArgumentTypeError(f"{name}: no such file or folder")
    return absolute(name)


def checkpoint_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the flags of every benchmark on a GPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=existing, required=True, metavar="DIR", help="folder of the Qwen2.5 tokenizer")
    kept = "keep the random checkpoints here for the next time (default: a temporary folder; 3B takes 6 GiB, 7B 15, 32B 61)"
    parser.add_argument("--checkpoints", type=absolute, metavar="DIR", help=kept)
    return parser


def input_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the flags of the benchmarks that train."""
    parser = checkpoint_parser(description)
    parser.add_argument("--train", type=existing, required=True, metavar="FILE", help="text to train on")
    parser.add_argument("--eval", type=existing, required=True, metavar="FILE", help="text to evaluate on")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="limit of one run (default: 300)")
    return parser
