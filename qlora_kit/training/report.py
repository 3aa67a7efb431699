"""The lines that a run prints and logs, and the content of run.json."""

import hashlib
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import GIB, MIB, Config
from qlora_kit.data.blocks import RecordBlocks, TrainingBlocks, describe_unpacked
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.data.overlap import describe_overlap
from qlora_kit.data.splits import describe_files
from qlora_kit.errors import Stopped, describe
from qlora_kit.model.fingerprint import weights_fingerprint
from qlora_kit.model.hub import is_local, model_folder, read_model_config, remote_code_warning
from qlora_kit.model.packed_base import read_packed
from qlora_kit.model.tokenizer import separator_id, tokenizer_fingerprint, vocabulary_fingerprint
from qlora_kit.output.checkpoints import Checkpoint
from qlora_kit.output.curves import scheduled_rates
from qlora_kit.output.folder import CHECKPOINTS, CONFIG, CURVES, LOG, NEW, remove, replace_text
from qlora_kit.output.log import RunLog
from qlora_kit.output.metrics import best_evaluation, read_metrics
from qlora_kit.output.provenance import command_line, now, versions
from qlora_kit.planning.plan import Plan
from qlora_kit.shipped import spell_command
from qlora_kit.training.processes import Team

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.adapter.targets import Reach
    from qlora_kit.model.perplexity import Perplexity
    from qlora_kit.model.projections import Packing
    from qlora_kit.training.machine import Machine


@dataclass
class Run:
    """The facts of a run, for the report and for run.json; nothing else receives it."""

    config: Config
    machine: "Machine"
    plan: Plan
    team: Team
    fingerprints: dict[str, str] = field(default_factory=dict)  # of training data, tokenizer and base weights
    data: dict[str, Any] = field(default_factory=dict)  # the `data` of run.json
    projections: dict[str, Any] = field(default_factory=dict)  # likewise
    started: str = field(default_factory=now)

    def take_data_fingerprints(self) -> None:
        """Keep the fingerprints of the data that `data` describes; that of no evaluation data is empty."""
        self.fingerprints |= {name: self.data.get(name, "") for name in ("train_sha256", "eval_sha256")}


class RunReport:
    """Print the settings, predictions and measurements of a run, and write them to the log."""

    def __init__(self, run: Run):
        self.run = run
        self.log = RunLog(run.team.is_main)
        self.predicted_gib = run.plan.peak / GIB if run.plan.parts else None
        self.steps = 0  # of the whole run; known with its data
        self._clock = time.perf_counter()

    def announce(self, notes: list[str]) -> None:
        """Print device, base model, and the notes on the checkpoint that the run resumes."""
        config, machine, team = self.run.config, self.run.machine, self.run.team
        self.log.write_to_file(f"{self.run.started}  {command_line()}")
        for line in machine.description:
            self.log.write(line)
        if team.count > 1:
            self.log.write(f"Processes: {team.count}, each with the base model on its own device; rank 0 reports")
        quantization = f"4-bit {config.quantization.quant_type.upper()}" if config.quantization.load_in_4bit else "16-bit"
        double = " with double quantization" if config.quantization.load_in_4bit and config.quantization.use_double_quant else ""
        self.log.write(f"Base model: {config.model.name}, {quantization}{double}, computing in {machine.dtype_name}")
        if config.model.trust_remote_code:
            self.log.write(remote_code_warning(config.model))
        for note in notes:
            self.log.write(note)

    @contextmanager
    def logging_failure(self) -> Iterator[None]:
        """Write into the log how the run ends before its adapter is written."""
        try:
            yield
        except BaseException as ending:
            reason = str(ending) or type(ending).__name__
            how = "" if isinstance(ending, Stopped) else "ended without an adapter: "
            with suppress(OSError):  # the disk may be the reason
                self.log.write_to_file(f"{now()}  {how}{reason.splitlines()[0]}")
            raise

    def note(self, line: str | None) -> None:
        """Print a line, if there is one."""
        if line:
            self.log.write(line)

    def describe_model(self, trainable: int, total: int, packing: "Packing", reach: "Reach") -> None:
        """Print what of the model is in 4 bits and what is trained, and keep it for run.json."""
        lora = self.run.config.lora
        if self.run.config.quantization.load_in_4bit:
            self.log.write(f"Projections: {packing}")
        self.log.write(
            f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, {trainable:,} trainable parameters "
            f"of {total:,} ({100 * trainable / total:.2f} %), {reach}"
        )
        self.run.projections = packing.as_json() | reach.as_json()

    def describe_path(self, reason: str | None, not_compiled: str | None, not_captured: str | None) -> None:
        """Print how micro-steps run.

        Args:
            reason: why not through the fast path, or None.
            not_compiled: why not compiled, or None.
            not_captured: why not captured as CUDA graphs, or None.
        """
        plan, team = self.run.plan, self.run.team
        times = self.run.config.effective_batch // team.count // plan.micro_batch
        division = f"{plan.micro_batch} sequence{'s' * (plan.micro_batch > 1)} at a time, {times} time{'s' * (times > 1)}"
        division += f" in each of {team.count} processes" if team.count > 1 else ""
        if reason:
            self.predicted_gib = None  # the prediction was for the fast path
            self.log.write(f"Each optimizer step: {division}, through the library's layers ({reason})")
            return
        layers = f"{plan.recomputed} layers recomputed in the backward pass" if plan.recomputed else "no layer recomputed"
        self.log.write(f"Each optimizer step: {division}; {layers}")
        if self.run.machine.device == "cuda":
            compiled = f"no, {not_compiled}" if not_compiled else "yes, the first evaluation and the first step wait for it"
            self.log.write(f"  compiled: {compiled}; CUDA graphs: {f'no, {not_captured}' if not_captured else 'yes'}")
        if self.predicted_gib:
            self.log.write(f"  memory predicted at the peak: {self.predicted_gib:.2f} GiB")

    def fall_back(self, reason: str) -> None:
        self.log.write(f"Compiling or capturing failed ({reason}): continuing without it, slower, with the same result")

    def out_of_memory(self, place: str, micro_batch: int) -> None:
        """Print that the micro-batch shrinks to `micro_batch` sequences, and where memory ran out."""
        rows = f"{micro_batch} sequence{'s' * (micro_batch > 1)}"
        self.log.write(f"Out of GPU memory {place} with {rows} at a time; the effective batch stays")

    def describe_data(self, train: TrainingBlocks, evaluation: TrainingBlocks | None, not_packed: str | None = None) -> None:
        """Print the data, and keep what run.json says of them; a second time, only what unpacking their records has changed.

        Args:
            not_packed: why records do not share blocks although data.packing lets them.
        """
        config, is_first = self.run.config, not self.run.data
        if not_packed:
            self.log.write(describe_unpacked(not_packed))
        steps = config.steps_per_epoch(len(train))
        source = ", ".join(config.data.names)
        self.log.write(f"Training data: {source}: {train.describe()}; {steps:,} optimizer steps an epoch")
        for name, note in [*describe_files(config.data), *train.notes] if is_first else []:
            self.log.write(f"  {name}: {note}")
        self.steps = config.total_steps(len(train))
        self._describe_schedule(self.steps)
        self.run.data = {
            "source": config.data.dataset,
            "prompt_style": train.prompt_style,
            "join_rule": train.join_rule,
            "packed": next((blocks.packed for blocks in (train, evaluation) if isinstance(blocks, RecordBlocks)), None),
            "not_packed": not_packed,
            "train_blocks": len(train),
            "train_sha256": train.fingerprint(),
        }
        if evaluation:
            self.log.write(f"Evaluation data: {evaluation.summarise()}, {len(evaluation):,} blocks")
            if is_first and self.log.enabled and (overlap := describe_overlap(train, evaluation)):
                self.log.write(f"  overlap: {overlap}")
            for name, note in evaluation.notes if is_first else []:
                if (name, note) not in train.notes:
                    self.log.write(f"  {name}: {note}")
            self.run.data |= {"eval_blocks": len(evaluation), "eval_sha256": evaluation.fingerprint()}

    def _describe_schedule(self, steps: int) -> None:
        """Print that a warm-up is as long as the run, if it is."""
        training = self.run.config.training
        if (highest := max(scheduled_rates(training, steps))) < training.learning_rate:
            span = "the only step" if steps == 1 else f"all {steps:,} steps"
            self.log.write(
                f"The warm-up takes {span}: the learning rate rises to {highest:.3g} and does not reach "
                f"training.learning_rate {training.learning_rate:g}"
            )

    def memory(self, when: str) -> None:
        if held := self.run.machine.memory_gib():
            self.log.write(f"GPU memory {when}: {held['allocated']:.2f} GiB allocated, {held['reserved']:.2f} GiB reserved")

    def perplexity(self, whose: str, result: "Perplexity") -> None:
        self.log.write(f"Perplexity of the {whose}: {result}")

    def definition(self, result: "Perplexity") -> str:
        """Return what the printed perplexity means, so that it can be compared with others."""
        return result.definition(self.run.config.data.max_length, self.run.data["join_rule"])

    def seconds(self) -> float:
        return time.perf_counter() - self._clock

    def title(self) -> str:
        """Return what the curves are of: model, data and date."""
        config, day = self.run.config, self.run.started.partition("T")[0]
        return f"{Path(config.model.name).name}, trained on {', '.join(Path(name).name for name in config.data.names)}, {day}"

    @contextmanager
    def noting_failure(self, path: Path) -> Iterator[None]:
        """Remove a picture that is not whole and say why in one line: a library or the disk costs nothing but that."""
        try:
            yield
        except Exception as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            self.log.write(f"{path.name} could not be drawn ({describe(error)}); nothing else is missing")

    def summary(self, folder: Path, result: "RunResult") -> None:
        """Print time, memory, perplexities and the files of a run that has ended well."""
        minutes, seconds = divmod(round(self.seconds()), 60)
        self.log.write(f"\nDone in {minutes}:{seconds:02d}.")
        if result.steps < result.last_step:
            self.log.write(
                f"  the adapter is that of step {result.steps}, the best evaluated; training ended after step {result.last_step}"
            )
        elif best := best_evaluation(read_metrics(folder)):
            self.log.write(f"  best step    {describe_best(best, result.last_step)}")
        if held := self.run.machine.memory_gib():
            predicted = f" (predicted {self.predicted_gib:.2f})" if self.predicted_gib else ""
            self.log.write(
                f"  GPU memory   peak {held['peak_reserved']:.2f} GiB reserved{predicted}, "
                f"{held['peak_allocated']:.2f} GiB allocated"
            )
        if result.base and result.trained:
            self.log.write(f"  perplexity   base model {result.base}  ->  adapter {result.trained}")
            self.log.write(f"  which is     {self.definition(result.trained)}")
            if result.trained.loss >= result.base.loss:
                self.log.write("  it is        no better than the base model: try a lower --learning_rate, or more steps")
        size = (folder / "adapter_model.safetensors").stat().st_size / MIB
        self.log.write(f"  adapter      {folder / 'adapter_model.safetensors'} ({size:.1f} MiB)")
        if (folder / CURVES).exists():
            self.log.write(f"  curves       {folder / CURVES}")
        self.log.write(f"  log          {folder / LOG}")
        talk = f"{spell_command('inference_example.py')} --mode interactive"
        self.log.write(f"\nTalk to it:\n  {talk} --adapter {shlex.quote(str(folder))}")


def describe_best(best: dict[str, Any], last_step: int) -> str:
    """Return the step of the best evaluation, an entry of metrics.jsonl, and how to keep its adapter if it is not the last."""
    if best["step"] == last_step:
        return f"{last_step}, the last"
    return f"{best['step']} of {last_step}, perplexity {best['eval_perplexity']:.3f}: keep it with --set training.keep_best=true"


@dataclass(frozen=True)
class RunResult:
    """The result of a run: where its adapter is, and what it learned."""

    adapter: Path  # the output folder
    steps: int  # optimizer steps of the adapter: those of the best evaluation with training.keep_best
    last_step: int  # the step after which training ended
    base: "Perplexity | None"  # of the base model on the evaluation data; None without evaluation data
    trained: "Perplexity | None"  # of the adapter on the same data


def open_output(folder: Path, report: RunReport, checkpoint: Checkpoint | None) -> None:
    """Write the resolved config and open the log, now that model and data are ready.

    Args:
        folder: where the run writes; .new loses what an unfinished run has left there, unless that is resumed.
    """
    if folder.name == NEW and checkpoint is None:
        remove(folder)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    replace_text(folder / CONFIG, report.run.config.to_yaml())
    report.log.open(folder, checkpoint.folder if checkpoint else None)


def write_run_files(report: RunReport, checkpoint: Path) -> None:
    """Write into a checkpoint what a resumed run must find as it was at this step: the settings, and the log with its numbers."""
    (checkpoint / CONFIG).write_text(report.run.config.to_yaml(), encoding="utf-8")
    report.log.copy_to(checkpoint)


def build_provenance(report: RunReport, tokenizer: "PreTrainedTokenizerBase", result: RunResult, **ending: Any) -> dict[str, Any]:
    """Return the content of run.json: where the adapter comes from, and how to load and prompt it.

    Args:
        ending: how the run ended, from QLoraTrainer.ending.
    """
    run = report.run
    config, name = run.config, run.config.model.name
    template, base = tokenizer.chat_template, model_folder(config.model)
    before, after = result.base, result.trained
    return {
        "base_model": {
            "name": name,
            "revision": config.model.revision,
            "folder": str(Path(name).resolve()) if is_local(name) else None,
        },
        "base_commit": base.name if base and not is_local(name) else None,
        "base_weights_sha256": weights_fingerprint(base) if base else None,
        "trust_remote_code": config.model.trust_remote_code,
        "quantization": config.quantization.model_dump() | {"compute_dtype": run.machine.dtype_name},
        "base_quantization": read_packed(read_model_config(config.model), name),
        "projections": run.projections,
        "prompt_style": run.data["prompt_style"],
        "separator_id": separator_id(tokenizer),
        "stop_ids": find_stop_ids(tokenizer, run.data["prompt_style"]),
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        "data": run.data,
        "seed": config.training.seed,
        "config": config.model_dump(),
        "optimizer_steps": result.steps,
        "last_step": result.last_step,
        "ended": ending["ended"],
        "skipped_steps": ending["skipped_steps"],
        "perplexity": {"base": before.as_json(), "adapter": after.as_json(), "definition": report.definition(after)}
        if before and after
        else None,
        "micro_batch": ending["micro_batch"],
        "memory_gib": {"predicted_peak": report.predicted_gib, **run.machine.memory_gib()},
        "versions": versions(),
        "hardware": run.machine.description,
        "command": command_line(),
        "started": run.started,
        "finished": now(),
        "seconds": round(report.seconds(), 1),
    }
