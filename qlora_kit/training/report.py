"""What a run tells its user; what goes into run.json."""

import hashlib
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import GIB, MIB, Config
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.model.fingerprint import weights_fingerprint
from qlora_kit.model.hub import is_local, model_folder, remote_code_warning
from qlora_kit.model.tokenizer import separator_id, tokenizer_fingerprint, vocabulary_fingerprint
from qlora_kit.output.checkpoints import Checkpoint
from qlora_kit.output.folder import CHECKPOINTS, CONFIG, CURVES, LOG, OUTPUT_FILES, SAVING, replace_text
from qlora_kit.output.log import RunLog
from qlora_kit.output.provenance import command_line, now, versions
from qlora_kit.planning.plan import Plan
from qlora_kit.training.processes import ALONE, Team

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


if TYPE_CHECKING:
    from qlora_kit.data.blocks import Blocks, RecordBlocks
    from qlora_kit.model.perplexity import Perplexity
    from qlora_kit.training.machine import Machine


class RunReport:
    """Tells the reader what was asked, predicted and measured; keeps what the provenance will state."""

    def __init__(self, config: Config, machine: "Machine", plan: Plan, team: Team = ALONE):
        self.config, self.machine, self.plan, self.team = config, machine, plan, team
        self.log = RunLog(team.is_main)
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
        size = (folder / "adapter_model.safetensors").stat().st_size / MIB
        self.log.line(f"  adapter      {folder / 'adapter_model.safetensors'} ({size:.1f} MiB)")
        self.log.line(f"  curves       {folder / CURVES}")
        self.log.line(f"  log          {folder / LOG}")
        self.log.line(f"  talk to it   python inference_example.py --mode interactive --adapter {shlex.quote(str(folder))}")


def open_output(folder: Path, report: RunReport, checkpoint: Checkpoint | None, overwrite: bool) -> None:
    """Begin writing: the resolved config and the log. Only now, with model and data ready, does --overwrite remove anything."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite and checkpoint is None:
        for name in OUTPUT_FILES:  # so that no file of the earlier run can be taken for one of the new run
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for left in folder.glob(f"{SAVING}*"):  # of a run that was killed while it wrote the adapter
        shutil.rmtree(left, ignore_errors=True)
    replace_text(folder / CONFIG, report.config.to_yaml())
    report.log.open(folder, checkpoint.folder if checkpoint else None)


def build_provenance(
    report: RunReport, tokenizer: "PreTrainedTokenizerBase", before: "Perplexity | None", after: "Perplexity | None", **how: Any
) -> dict[str, Any]:
    """Where an adapter comes from and how to load it: inference_example.py goes by this.

    Args:
        how: the run went, as QLoraTrainer.how_it_went says.
    """
    config, name = report.config, report.config.model.name
    template, base = tokenizer.chat_template, model_folder(config.model)
    return {
        "base_model": {
            "name": name,
            "revision": config.model.revision,
            "folder": str(Path(name).resolve()) if is_local(name) else None,
        },
        "base_commit": base.name if base and not is_local(name) else None,
        "base_weights_sha256": weights_fingerprint(base) if base else None,
        "trust_remote_code": config.model.trust_remote_code,
        "quantization": config.quantization.model_dump() | {"compute_dtype": report.machine.dtype_name},
        "prompt_style": report.data["prompt_style"],
        "separator_id": separator_id(tokenizer),
        "stop_ids": find_stop_ids(tokenizer, report.data["prompt_style"]),
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        "data": report.data,
        "seed": config.training.seed,
        "config": config.model_dump(),
        **how,
        "perplexity": {"base": before.as_json(), "adapter": after.as_json(), "definition": report.definition(after)}
        if before and after
        else None,
        "micro_batch": report.micro_batch,
        "memory_gib": {"predicted_peak": report.predicted_gib, **report.machine.memory_gib()},
        "versions": versions(),
        "hardware": report.machine.description,
        "command": command_line(),
        "started": report.started,
        "finished": now(),
        "seconds": round(report.seconds(), 1),
    }


def write_run_files(report: RunReport, checkpoint: Path) -> None:
    """What a resumed run has to find as it was at this step: the settings, and the log with its numbers."""
    (checkpoint / CONFIG).write_text(report.config.to_yaml(), encoding="utf-8")
    report.log.copy_to(checkpoint)
