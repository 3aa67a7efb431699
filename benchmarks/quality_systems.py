"""One training run of quality.py, by the toolkit or by another system, on given blocks in a given order from given matrices.

The toolkit runs first, through train_qlora.train. What it started from and the order in which it took the blocks are noted, and
the other systems start from the same matrices and take the same blocks in the same order.

    python benchmarks/quality_systems.py JOB.json RESULT.json    a run in a process of its own, which Unsloth needs
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from rivals import TARGETS
from runs import ROOT

TOOLKIT = {"toolkit": True, "toolkit, library path": False}  # systems that are this project, and performance.fused_lora
PACKAGES = {"trl": "trl", "trl, adapter in fp32": "trl", "unsloth": "unsloth"}  # what others need beside peft and transformers
WARM_UP = 2  # steps that do not count for speed


@dataclass(frozen=True)
class Job:
    """A run: what it trains on, and every setting in which runs of quality.py differ."""

    system: str
    model: str  # folder
    text: str  # file that the toolkit cuts into blocks
    work: str  # folder of the run: adapter/, start.safetensors
    seed: int = 1
    length: int = 512  # tokens of a block
    blocks: int | None = None  # at most
    rows: int = 16  # blocks of an optimizer step
    micro_batch: int = 16
    epochs: float = 1.0
    dtype: str = "bfloat16"
    quantization: str | None = "nf4"  # nf4, fp4; None: 16 bits
    double: bool = True
    rank: int = 16
    targets: tuple[str, ...] = tuple(TARGETS)
    dropout: float = 0.05
    learning_rate: float = 2e-4
    scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    clip: float = 0.3
    optimizer: str = "paged_adamw_8bit"
    compile: bool = True  # False spares the time of torch.compile where speed does not count
    limit_gib: float | None = None  # of GPU memory, for the toolkit's plan
    keep: bool = True  # False: other systems than the toolkit write no adapter or model, where only speed and memory count

    @property
    def adapter(self) -> Path:
        return Path(self.work) / "adapter"

    @property
    def start(self) -> Path:
        return Path(self.work) / "start.safetensors"


@dataclass
class Result:
    """The result of a run: the loss and the norm of the gradient of each optimizer step, and what it cost."""

    system: str
    seed: int
    losses: list[float] = field(default_factory=list)  # nats a token
    gradient_norms: list[float] = field(default_factory=list)  # before clipping in the toolkit, after it in the others
    order: list[int] = field(default_factory=list)  # numbers of the blocks as they were trained
    tokens_per_second: float | None = None  # median, without the first two steps
    peak_reserved_gib: float | None = None  # of torch's allocator; None on a CPU
    seconds: float = 0.0  # all of it, loading included
    probe: list[list[float]] = field(default_factory=list)  # logits after training, where they are asked for


def why_not_here(system: str) -> str | None:
    """Return why a system cannot run on this machine, or None."""
    import torch

    if (package := PACKAGES.get(system)) and find_spec(package) is None:
        return f"{package} is not installed"
    return "needs a GPU" if system == "unsloth" and not torch.cuda.is_available() else None


def train(
    job: Job, like: "Result | None" = None, start: Path | None = None, probe: list[int] | None = None, apart: bool = False
) -> Result:
    """Run a job; the adapter is in `job.adapter` afterwards.

    Args:
        like: the run whose order of blocks this one takes; the toolkit shuffles by itself.
        start: a file with the LoRA matrices to start from; the toolkit draws its own, and writes them to `job.start`.
        probe: token ids whose logits are computed with the trained model.
        apart: in a process of its own, as Unsloth always is.
    """
    Path(job.work).mkdir(parents=True, exist_ok=True)
    if apart or job.system == "unsloth":
        return in_own_process(job, like, start)
    import torch

    forget_earlier_runs()
    started = time.perf_counter()
    result = Result(job.system, job.seed)
    if job.system in TOOLKIT:
        train_toolkit(job, result, probe)
    else:
        train_other(job, like.order if like else None, start, result, probe)
    result.seconds = round(time.perf_counter() - started, 1)
    if torch.cuda.is_available():
        result.peak_reserved_gib = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    forget_earlier_runs()
    return result


def forget_earlier_runs() -> None:
    """Free the GPU's memory, begin to measure its peak anew, and undo the precision that a Trainer has set for later ones."""
    import torch
    from accelerate.state import AcceleratorState

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(reset_partial_state=True)


def toolkit_settings(job: Job) -> dict[str, Any]:
    """Return the keys of config.yaml that make the toolkit run a job."""
    import torch

    return {
        "model.name": job.model,
        "quantization.load_in_4bit": job.quantization is not None,
        "quantization.quant_type": job.quantization or "nf4",
        "quantization.use_double_quant": job.double,
        "quantization.compute_dtype": job.dtype,
        "lora.rank": job.rank,
        "lora.alpha": 2.0 * job.rank,
        "lora.dropout": job.dropout,
        "lora.target_modules": list(job.targets),
        "data.dataset": job.text,
        "data.subset": None,
        "data.eval_split": None,
        "data.max_length": job.length,
        "data.max_train_samples": job.blocks,
        "training.output_dir": str(job.adapter),
        "training.num_epochs": job.epochs,
        "training.batch_size": job.micro_batch,
        "training.gradient_accumulation_steps": job.rows // job.micro_batch,
        "training.learning_rate": job.learning_rate,
        "training.lr_scheduler": job.scheduler,
        "training.warmup_ratio": job.warmup_ratio,
        "training.max_grad_norm": job.clip,
        "training.optim": job.optimizer,
        "training.logging_steps": 1,
        "training.save_steps": 1_000_000,
        "training.seed": job.seed,
        "training.device": "cuda" if torch.cuda.is_available() else "cpu",
        "performance.fused_lora": TOOLKIT.get(job.system, True),
        "performance.compile": "auto" if job.compile else False,
        "performance.vram_limit_gib": job.limit_gib,
    }


def train_toolkit(job: Job, result: Result, probe: list[int] | None) -> None:
    """Run a job with train_qlora.train, and note start and order."""
    sys.path.insert(0, str(ROOT))
    import train_qlora
    from qlora_kit.output.metrics import read_metrics

    with watching(job, result, probe):
        train_qlora.train(toolkit_settings(job), overwrite=True)
    steps = [entry for entry in read_metrics(job.adapter) if "loss" in entry]
    result.losses = [entry["loss"] for entry in steps]
    result.tokens_per_second = steady([entry["tokens_per_second"] for entry in steps if entry.get("tokens_per_second")])


@contextmanager
def watching(job: Job, result: Result, probe: list[int] | None) -> Iterator[None]:
    """Write the first LoRA matrices of the run inside, and note the blocks it takes and the logits it ends with."""
    from safetensors.torch import save_file

    from qlora_kit.training.trainer import QLoraTrainer

    whole, step = QLoraTrainer.train, QLoraTrainer.training_step

    def watch_whole(trainer: Any, *arguments: Any, **rest: Any) -> None:
        matrices = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in lora_matrices(trainer.adapted).items()}
        save_file(matrices, job.start)
        whole(trainer, *arguments, **rest)
        if probe:
            result.probe = logits_of(trainer.adapted, probe)

    def watch_step(trainer: Any, model: Any, inputs: dict[str, Any], items: Any = None) -> Any:
        result.order += inputs["block"].tolist()
        loss = step(trainer, model, inputs, items)
        if trainer.accelerator.sync_gradients:  # the last micro-batch of the optimizer step
            result.gradient_norms.append(gradient_norm(trainer.trained.trained))
        return loss

    QLoraTrainer.train, QLoraTrainer.training_step = watch_whole, watch_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        QLoraTrainer.train, QLoraTrainer.training_step = whole, step  # type: ignore[method-assign]


def gradient_norm(parameters: Any) -> float:
    """Return the norm of all gradients together.

    In pieces: a CPU adds up the squares of one tensor in fp32, which is 2e-4 too little for 5 M elements.
    """
    from torch.nn.utils import get_total_norm

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return float(get_total_norm([piece for gradient in gradients for piece in gradient.flatten().split(4096)]))


def lora_matrices(model: Any) -> dict[str, Any]:
    """Return the LoRA matrices of a model by their names in an adapter's file."""
    found = {name.replace(".default.", "."): parameter for name, parameter in model.named_parameters()}
    return {name: parameter for name, parameter in found.items() if ".lora_A." in name or ".lora_B." in name}


def logits_of(model: Any, ids: list[int]) -> list[list[float]]:
    """Return the logits of the last 8 tokens of a text, without dropout."""
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -8:]
    model.train(was_training)
    return logits.float().tolist()


def steady(speeds: list[float]) -> float | None:
    """Return the median of the steps after the warm-up; None if there are too few."""
    return round(statistics.median(speeds[WARM_UP:])) if len(speeds) > WARM_UP else None


def read_blocks(job: Job, text: str | None = None, blocks: int | None = None) -> list[list[int]]:
    """Return blocks of token ids as the toolkit cuts them from a text: of the job, or of another file."""
    sys.path.insert(0, str(ROOT))
    import train_qlora
    from qlora_kit.config import Config
    from qlora_kit.config_file import override
    from qlora_kit.model.tokenizer import load_tokenizer

    config = override(Config(), toolkit_settings(replace(job, text=text or job.text, blocks=blocks or job.blocks)))
    data, _ = train_qlora.prepare_dataset(config, load_tokenizer(config.model))
    return [data[index]["input_ids"].tolist() for index in range(len(data))]


def train_other(job: Job, order: list[int] | None, start: Path | None, result: Result, probe: list[int] | None) -> None:
    """Run a job with another system on the blocks in the order that the toolkit took them in; None: from first to last."""
    from quality_rivals import build_trainer, watch

    blocks = read_blocks(job)
    order = list(range(len(blocks))) if order is None else order
    rows = [blocks[number] for number in order]
    trainer = build_trainer(job, rows, start)
    times = watch(trainer, rows, result)
    trainer.train()
    speeds = [job.rows * job.length / (end - begin) for begin, end in pairwise(times)]
    result.tokens_per_second = steady(speeds)
    result.order = order
    if job.keep:
        trainer.model.save_pretrained(job.adapter)
    if probe:
        result.probe = logits_of(trainer.model, probe)


def in_own_process(job: Job, like: Result | None, start: Path | None) -> Result:
    """Run a job in a process of its own; raises CalledProcessError if it fails, with its output on standard error."""
    job_file, result_file = Path(job.work) / "job.json", Path(job.work) / "result.json"
    whole = {"job": asdict(job), "like": like and asdict(like), "start": start and str(start)}
    job_file.write_text(json.dumps(whole), encoding="utf-8")
    command = [sys.executable, __file__, str(job_file.resolve()), str(result_file.resolve())]
    subprocess.run(command, cwd=job.work, check=True, stdout=sys.stderr)  # Unsloth writes the code it generates there
    return Result(**json.loads(result_file.read_text(encoding="utf-8")))


def main() -> None:
    whole = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job = Job(**{**whole["job"], "targets": tuple(whole["job"]["targets"])})
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    like, start = whole["like"] and Result(**whole["like"]), whole["start"] and Path(whole["start"])
    if job.system == "unsloth":
        import unsloth  # noqa: F401  must come first: it patches the libraries imported below

        started, result = time.perf_counter(), Result(job.system, job.seed)
        train_other(job, like.order, start, result, None)
        import torch

        result.seconds = round(time.perf_counter() - started, 1)
        result.peak_reserved_gib = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    else:
        result = train(job, like, start)
    Path(sys.argv[2]).write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
