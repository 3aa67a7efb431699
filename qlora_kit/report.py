"""What a run leaves to read: training_log.txt, metrics.jsonl, training_curves.png, run.json.

metrics.jsonl holds one object a logged step and is the source of the picture. Imports no torch.
"""

import hashlib
import json
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import Config
from qlora_kit.model.hub import remote_code_warning
from qlora_kit.planning.plan import Plan
from qlora_kit.planning.shape import GIB
from qlora_kit.processes import ALONE, Team
from qlora_kit.secrets import redact

if TYPE_CHECKING:
    from qlora_kit.data.blocks import Blocks, RecordBlocks
    from qlora_kit.model.perplexity import Perplexity
    from qlora_kit.training.machine import Machine

LOG, METRICS, CURVES = "training_log.txt", "metrics.jsonl", "training_curves.png"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


class RunLog:
    """Lines for the reader, on standard error and in training_log.txt; numbers for programs, in metrics.jsonl.

    Nothing is written to disk before `open`: a run that fails while it gets ready leaves an earlier run's files alone.

    Args:
        speaks: False in a process that leaves this to another: it says and writes nothing.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self._waiting: list[str] = []
        self._folder: Path | None = None

    def open(self, folder: Path, checkpoint: Path | None) -> None:
        """Start the files in `folder` afresh, or go on from those that a checkpoint holds: no step is missing, none twice."""
        self._folder = folder
        for name in (LOG, METRICS):
            (folder / name).unlink(missing_ok=True)  # a run that failed before its first checkpoint may have left both
            if checkpoint:
                shutil.copyfile(checkpoint / name, folder / name)
            (folder / name).touch()  # a short run may have nothing to log
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            self.file_only(text)

    def copy_to(self, checkpoint: Path) -> None:
        """Both files as they are now."""
        assert self._folder is not None, "a checkpoint before the log was opened"
        for name in (LOG, METRICS):
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, checkpoint / name)
            else:
                (checkpoint / name).touch()

    def line(self, text: str = "") -> None:
        if self.speaks:
            print(redact(text), file=sys.stderr)
        self.file_only(text)

    def file_only(self, text: str) -> None:
        text = redact(text)
        if not self.speaks:
            return
        if self._folder is None:
            self._waiting.append(text)
        else:
            _append(self._folder / LOG, text)

    def metrics(self, values: dict[str, Any]) -> None:
        if not self.speaks:
            return
        assert self._folder is not None, "metrics before the log was opened"
        _append(self._folder / METRICS, json.dumps(finite(values)))


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """With null for what JSON has no word for, such as the standard error of a single block."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


class RunReport:
    """Tells the reader what was asked, predicted and measured; keeps what the passport will state."""

    def __init__(self, config: Config, machine: "Machine", plan: Plan, team: Team = ALONE):
        self.config, self.machine, self.plan, self.team = config, machine, plan, team
        self.log = RunLog(team.leads)
        self.predicted_gib = plan.peak / GIB if plan.parts else None
        self.micro_batch = plan.micro_batch  # as it is: halved when memory runs out
        self.started, self._clock = now(), time.perf_counter()
        self.data: dict[str, Any] = {}
        self.material: dict[str, str] = {}  # fingerprints of what a resumed run has to find unchanged

    def announce(self) -> None:
        config = self.config
        self.log.file_only(f"{self.started}  {command_line()}")
        for line in self.machine.description:
            self.log.line(line)
        if self.team.count > 1:
            self.log.line(
                f"Processes: {self.team.count}, each with the base model on a device of its own; this is said by the first"
            )
        quantization = f"4-bit {config.quantization.quant_type.upper()}" if config.quantization.load_in_4bit else "16-bit"
        double = " with double quantization" if config.quantization.load_in_4bit and config.quantization.use_double_quant else ""
        self.log.line(f"Base model: {config.model.name}, {quantization}{double}, computing in {self.machine.dtype_name}")
        if config.model.trust_remote_code:
            self.log.line(remote_code_warning(config.model))

    @contextmanager
    def telling_how_it_ends(self) -> Iterator[None]:
        """The log's last line, for a run that ends before its adapter is written."""
        try:
            yield
        except BaseException as ending:
            reason = str(ending) or type(ending).__name__
            with suppress(OSError):  # the disk may be what ended it
                self.log.file_only(f"{now()}  ended without an adapter: {reason.splitlines()[0]}")
            raise

    def describe_model(self, trainable: int, total: int) -> None:
        lora = self.config.lora
        self.log.line(
            f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, {trainable:,} trainable parameters "
            f"of {total:,} ({100 * trainable / total:.2f} %)"
        )

    def describe_path(self, reason: str | None, not_compiled: str | None, not_captured: str | None) -> None:
        """How micro-steps run; each argument says what stands against something, None that nothing does."""
        plan = self.plan
        times = self.config.effective_batch // self.team.count // plan.micro_batch
        division = f"{plan.micro_batch} sequence{'s' * (plan.micro_batch > 1)} at a time, {times} time{'s' * (times > 1)}"
        division += f" in each of {self.team.count} processes" if self.team.count > 1 else ""
        if reason:
            self.predicted_gib = None  # it was for the fast path
            self.log.line(f"Each optimizer step: {division}, through the library's layers ({reason})")
            return
        layers = f"{plan.recomputed} layers computed again in the backward pass" if plan.recomputed else "no layer computed again"
        layers += ", weights unpacked once" if plan.keep_weights else ""
        self.log.line(f"Each optimizer step: {division}; {layers}")
        if self.machine.device == "cuda":
            compiled = f"no, {not_compiled}" if not_compiled else "yes, the first evaluation and the first step wait for it"
            self.log.line(f"  compiled: {compiled}; CUDA graphs: {f'no, {not_captured}' if not_captured else 'yes'}")
        if self.predicted_gib:
            self.log.line(f"  memory predicted at the peak: {self.predicted_gib:.2f} GiB")

    def plain_path(self, reason: str) -> None:
        self.log.line(f"Compiling or capturing failed ({reason}): going on without, slower, with the same result")

    def out_of_memory(self, what: str, micro_batch: int) -> None:
        rows = f"{micro_batch} sequence{'s' * (micro_batch > 1)}"
        self.micro_batch = micro_batch
        self.log.line(f"Out of GPU memory {what} with {rows} at a time; the effective batch stays")

    def describe_data(self, train: "Blocks | RecordBlocks", evaluation: "Blocks | RecordBlocks | None") -> None:
        config = self.config
        steps = config.steps_per_epoch(len(train))
        source = ", ".join(config.data.names)
        self.log.line(f"Training data: {source}: {train.description()}; {steps:,} optimizer steps an epoch")
        self.data = {
            "source": config.data.dataset,
            "prompt_style": train.prompt_style,
            "join_rule": train.join_rule,
            "train_blocks": len(train),
            "train_sha256": train.fingerprint(),
        }
        if evaluation:
            self.log.line(f"Evaluation data: {evaluation.summary()}, {len(evaluation):,} blocks")
            self.data |= {"eval_blocks": len(evaluation), "eval_sha256": evaluation.fingerprint()}

    def memory(self, when: str) -> None:
        if held := self.machine.memory_gib():
            self.log.line(f"GPU memory {when}: {held['allocated']:.2f} GiB allocated, {held['reserved']:.2f} GiB reserved")

    def perplexity(self, whose: str, result: "Perplexity") -> None:
        self.log.line(f"Perplexity of the {whose}: {result}")

    def definition(self, result: "Perplexity") -> str:
        """What the printed perplexity means, so that it can be compared with others."""
        return result.definition(self.config.data.max_length, self.data["join_rule"])

    def seconds(self) -> float:
        return time.perf_counter() - self._clock

    def summary(
        self, folder: Path, before: "Perplexity | None", after: "Perplexity | None", last_step: int, kept_step: int
    ) -> None:
        minutes, seconds = divmod(round(self.seconds()), 60)
        self.log.line(f"\nDone in {minutes}:{seconds:02d}.")
        if kept_step < last_step:
            self.log.line(f"  the adapter is that of step {kept_step}, the best evaluated; training ended after step {last_step}")
        held = self.machine.memory_gib()
        if held:
            predicted = f" (predicted {self.predicted_gib:.2f})" if self.predicted_gib else ""
            self.log.line(
                f"  GPU memory   peak {held['peak_reserved']:.2f} GiB reserved{predicted}, "
                f"{held['peak_allocated']:.2f} GiB allocated"
            )
        if before and after:
            self.log.line(f"  perplexity   base model {before}  ->  adapter {after}")
            self.log.line(f"               {self.definition(after)}")
            if after.loss >= before.loss:
                self.log.line("               no better than the base model: try a lower --learning_rate, or more steps")
        size = (folder / "adapter_model.safetensors").stat().st_size / 2**20
        self.log.line(f"  adapter      {folder / 'adapter_model.safetensors'} ({size:.1f} MiB)")
        self.log.line(f"  curves       {folder / CURVES}")
        self.log.line(f"  log          {folder / LOG}")
        self.log.line(f"  talk to it   python inference_example.py --mode interactive --adapter {shlex.quote(str(folder))}")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    with (folder / METRICS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def plot_training_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses (left) and the learning rate (right) of `metrics` to a PNG file.

    Args:
        metrics: objects of metrics.jsonl: `step` with `loss` and `learning_rate`, or with `eval_loss`.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    train = [entry for entry in metrics if "loss" in entry]
    evaluation = [entry for entry in metrics if "eval_loss" in entry]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([e["step"] for e in train], [e["loss"] for e in train], color="tab:blue", linewidth=1.2, label="training")
    if evaluation:
        left.plot(
            [e["step"] for e in evaluation], [e["eval_loss"] for e in evaluation], "o-", color="tab:orange", label="evaluation"
        )
    left.set(title="Loss", xlabel="optimizer step", ylabel="mean loss (nats per token)")
    left.legend()
    right.plot([e["step"] for e in train], [e["learning_rate"] for e in train], color="tab:green")
    right.set(title="Learning rate", xlabel="optimizer step", ylabel="learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def command_line() -> str:
    return redact(shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]))


def what_runs(config: Config) -> dict[str, str]:
    """What all processes of a run have to have in common, by the words of a message."""
    home = Path(__file__).parent.parent
    code = sorted([*home.glob("*.py"), *home.glob("qlora_kit/**/*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:12]
    settings = {f"{section}.{key}": repr(value) for section, keys in config.model_dump().items() for key, value in keys.items()}
    return settings | {"the code": digest, "the packages": ", ".join(" ".join(pair) for pair in versions().items())}
