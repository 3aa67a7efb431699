"""What the benchmarks share: random checkpoints of true shapes, runs in processes of their own, and flags.

torch is imported only in such processes: a benchmark holds no GPU memory while it measures.
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
SEQUENCES = 16  # of an optimizer step, however they are divided; config.yaml's own number
KNOWN = "Qwen/Qwen2.5-3B-Instruct"  # its shape is qlora_kit's; the others are told by what differs
SHAPES: dict[str, dict[str, Any]] = {
    "3B": {},
    "0.5B": {"num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "intermediate_size": 4864},
    "7B": {
        "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
LARGE = {"32B": "Qwen/Qwen2.5-32B-Instruct"}  # more than one GPU's work; shapes of qlora_kit, too
T = TypeVar("T")


class NoMeasurement(Exception):
    """A run that gave no number: the reason in a line, and the end of what it wrote."""

    def __init__(self, reason: str, tail: str = ""):
        super().__init__(reason)
        self.tail = tail


@dataclass(frozen=True)
class Job:
    """What every run of a benchmark has in common."""

    checkpoint: Path
    train: Path
    evaluation: Path
    steps: int

    def toolkit_command(self, flags: list[str], output: Path) -> list[str]:
        """The toolkit's own command line. Every optimizer step is full, and the evaluation a full micro-batch."""
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
    """run.json, the objects of metrics.jsonl and training_log.txt of one run.

    Args:
        processes: a GPU each.
        sequences: of an optimizer step, over all processes.

    Raises:
        NoMeasurement: it failed, ran into the limit, or the text was too short for its steps.
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
        raise NoMeasurement("ran out of memory and went on with a smaller micro-batch", log)
    return run, metrics, log


def run_limited(command: list[str], folder: Path, limit_seconds: float, gpus: int = 1) -> str:
    """Standard output of a command, which runs in `folder`, sees the first GPUs only, and leaves no process behind.

    Raises:
        NoMeasurement: it failed or ran into the limit.
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
            finally:  # also on Ctrl+C; and a compiler's workers may outlive the command
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
    """The line of standard error that says why a command failed: its last error, or just its last line."""
    lines = [line.rstrip() for line in written.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)(:|$)", line)]
    if not lines or (status < 0 and not errors):
        return f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    reason = (errors or lines)[-1]
    if re.search(r"out ?of ?memory|memory is full", reason, re.IGNORECASE):
        return "out of memory"
    return reason if len(reason) <= 160 else f"{reason[:157]}..."


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a function that uses the GPU, whose memory is then free again for what is measured."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def gpu_name() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_name(0)}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"


def require_gpu() -> str:
    """Name and memory of the GPU; ends the benchmark where there is none."""
    return in_own_process(gpu_name) or sys.exit("error: torch finds no CUDA GPU, and this measures one")


@contextmanager
def random_checkpoint(model: str, tokenizer: Path, kept_in: Path | None) -> Iterator[Path]:
    """A folder with a random checkpoint, made now unless it was kept by an earlier benchmark."""
    with tempfile.TemporaryDirectory() as work:
        folder = (kept_in or Path(work)) / f"qwen2.5-{model.lower()}-random"
        if not folder.exists():
            print(f"making {folder}", file=sys.stderr, flush=True)
            in_own_process(make_checkpoint, model, tokenizer, folder)
        yield folder


def make_checkpoint(model: str, tokenizer: Path, folder: Path) -> None:
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
    """Its version, or that it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions_of(packages: tuple[str, ...]) -> str:
    """Of Python and of packages, for the foot of a table."""
    found = {"python": sys.version.split()[0]} | {package: installed(package) for package in packages}
    return ", ".join(f"{name} {number}" for name, number in found.items())


def absolute(name: str) -> Path:
    return Path(name).expanduser().resolve()  # the runs have a working folder of their own


def existing(name: str) -> Path:
    if not absolute(name).exists():
        raise argparse.ArgumentTypeError(f"{name}: no such file or folder")
    return absolute(name)


def checkpoint_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=existing, required=True, metavar="DIR", help="folder of the Qwen2.5 tokenizer")
    kept = "keep the random checkpoints here for the next time (default: a temporary folder; 3B takes 6 GiB, 7B 15, 32B 61)"
    parser.add_argument("--checkpoints", type=absolute, metavar="DIR", help=kept)
    return parser


def input_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of the benchmarks that train."""
    parser = checkpoint_parser(description)
    parser.add_argument("--train", type=existing, required=True, metavar="FILE", help="text to train on")
    parser.add_argument("--eval", type=existing, required=True, metavar="FILE", help="text to evaluate on")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="of one run at most (default: 300)")
    return parser
