"""Build the Trainer of a run from its settings: TrainingArguments, callbacks, the fast path."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from qlora_kit.config import Config
from qlora_kit.data.blocks import RecordBlocks, TrainingBlocks
from qlora_kit.errors import Failed, UserError, unsupported
from qlora_kit.fast.micro_step import MicroStep, StepSettings, why_not_compiled, why_not_graphed, why_not_used
from qlora_kit.fast.peft_layers import fuse
from qlora_kit.fast.sharding import load_sharded, sharded_base
from qlora_kit.fast.training_pass import FastDecoder, why_not_fast
from qlora_kit.model.hub import model_folder
from qlora_kit.model.load import guard_cpu_kernels, quantization_config, set_padding
from qlora_kit.model.loss import IGNORED
from qlora_kit.model.packing_check import needs_marks, why_not_packed
from qlora_kit.model.perplexity import library_losses
from qlora_kit.output.folder import CHECKPOINTS
from qlora_kit.output.provenance import code_digest, versions
from qlora_kit.planning.plan import Plan, plan_inputs
from qlora_kit.training.checkpointing import CheckpointStore
from qlora_kit.training.machine import Machine
from qlora_kit.training.processes import Team
from qlora_kit.training.progress import ProgressCallback
from qlora_kit.training.report import RunReport, write_run_files
from qlora_kit.training.reporters import guard_reporters
from qlora_kit.training.trainer import QLoraTrainer

# The private methods of Trainer that QLoraTrainer overrides: a library without one would skip the override without a word.
PRIVATE_OVERRIDES = ("_get_output_dir",)


class TrainingData(NamedTuple):
    train: TrainingBlocks
    evaluation: TrainingBlocks | None

    def unpack(self) -> "TrainingData":
        """Return the data with one record in each block."""
        return self._change(RecordBlocks.unpack)

    def mark(self) -> "TrainingData":
        """Return the data with `starts` in all blocks of records."""
        return self._change(RecordBlocks.mark)

    @property
    def most_records(self) -> int:
        """The most records of a block; 0 where no block says where its records begin."""
        return max((blocks.most_records for blocks in self if isinstance(blocks, RecordBlocks)), default=0)

    def _change(self, change: Callable[[RecordBlocks], RecordBlocks]) -> "TrainingData":
        train, evaluation = (change(blocks) if isinstance(blocks, RecordBlocks) else blocks for blocks in self)
        assert train is not None
        return TrainingData(train, evaluation)


class RunArguments(TrainingArguments):
    """The library's arguments of a run, whose model stays where it was loaded.

    One of several processes on a CPU has the device cpu:0 otherwise: moving the model there copies the adapters, and torch.load
    refuses to restore an optimizer there (transformers 5.17).
    """

    @property
    def device(self) -> torch.device:
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def place_model_on_device(self) -> bool:
        return False


def check_library() -> None:
    """Check that the installed transformers has the private methods that QLoraTrainer overrides.

    Raises:
        UserError: one is missing.
    """
    for name in PRIVATE_OVERRIDES:
        if not hasattr(Trainer, name):
            remedy = "install transformers>=5.17,<6; 5.17 and 5.24 were tested"
            raise UserError("transformers", version("transformers"), f"has no Trainer.{name}", remedy)


def find_why_not_packed(model: Any, data: TrainingData, config: Config, machine: Machine, team: Team) -> str | None:
    """Return why each record needs a block of its own, or None if records can share blocks, or do not anyway.

    The fast path computes attention alone, which masks keep apart; a model that takes the library's layers is tried. Rank 0
    decides for all.

    Args:
        model: the PEFT model, before training.

    Raises:
        UserError: data.packing is true, and records cannot share blocks.
    """
    packed = [blocks for blocks in data if isinstance(blocks, RecordBlocks) and blocks.packed]
    if not packed or why_not_on_fast_path(model, config) is None:
        return None
    autocast = torch.autocast(machine.device, machine.dtype, enabled=machine.dtype != torch.float32)
    reason = team.broadcast(why_not_packed(model, packed[0].sample(), library_losses(model, autocast)))
    if reason and config.data.packing is True:
        raise UserError.of([unsupported("data.packing", reason, "auto or false")])
    return reason


def why_not_on_fast_path(model: Any, config: Config) -> str | None:
    """Return why a model is computed through the library's layers, or None if it takes the fast path.

    Raises:
        UserError: performance.fsdp or offload_embedding is true, which the library's layers know nothing of.
    """
    settings = config.performance
    reason = why_not_fast(model, config.data.max_length) if settings.fused_lora else "performance.fused_lora is false"
    for key in ("fsdp", "offload_embedding"):
        if reason and getattr(settings, key):
            raise UserError.of([unsupported(f"performance.{key}", reason, "false")])
    return reason


def build_store(
    config: Config, plan: Plan, team: Team, fingerprints: dict[str, str], prompt_style: str, report: RunReport,
    folder: Path, not_packed: str | None = None,
) -> CheckpointStore:  # fmt: skip
    """Return the checkpoints of a run, whose manifests keep what resuming must find unchanged.

    Args:
        fingerprints: of the data, the tokenizer and the base weights.
        folder: where the run writes.
        not_packed: as find_why_not_packed; a resumed run does not decide anew.
    """
    facts = {
        "fingerprints": fingerprints,
        "versions": versions() | {"code": code_digest()},
        "prompt_style": prompt_style,
        "not_packed": not_packed,
        "plan_inputs": plan_inputs(config),
        "micro_batch": plan.micro_batch,
        "recomputed": plan.recomputed,
        "processes": team.count,
    }
    root, kept = folder / CHECKPOINTS, config.training.save_total_limit
    return CheckpointStore(root, team, kept, facts, config.training.optimizer_bytes, lambda at: write_run_files(report, at))


def build_trainer(
    model: Any, data: TrainingData, config: Config, machine: Machine, plan: Plan, report: RunReport, store: CheckpointStore
) -> QLoraTrainer:
    """Return the Trainer of a run.

    Args:
        model: the PEFT model.

    Raises:
        UserError: performance.compile, cuda_graphs, fsdp or offload_embedding is true and cannot work.
    """
    check_library()
    team, steps = store.team, config.total_steps(len(data.train))
    data = data.mark() if needs_marks(model, config.data.max_length) else data
    progress = ProgressCallback(report.log, machine, data.train.tokens / config.steps_per_epoch(len(data.train)))
    trainer = QLoraTrainer(
        model=model,
        args=training_arguments(config, machine, steps, data.evaluation is not None, plan.micro_batch * team.count, store.root),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=RankCollator(team, plan.micro_batch),
        callbacks=[progress],
        settings=config.training,
        steps=steps,
        rows=plan.micro_batch,
        compute_dtype=machine.dtype,
        micro=build_micro_step(model, config, machine.device, plan, team, report, data.most_records),
        store=store,
        report=report,
        progress=progress,
    )
    trainer.remove_callback(PrinterCallback)  # prints a dict per logged step
    guard_reporters(trainer, report.log.write)
    return trainer


def build_micro_step(
    model: Any, config: Config, device: str, plan: Plan, team: Team, report: RunReport, most_records: int
) -> MicroStep | None:
    """Return the fast path, or None for the library's own layers; the log says which, and why.

    Args:
        most_records: in a block, if items say where each begins; else 0.

    Raises:
        UserError: performance.compile, cuda_graphs, fsdp or offload_embedding is true and cannot work.
    """
    settings = config.performance
    reason = why_not_on_fast_path(model, config)
    not_compiled = why_not_used("performance.compile", settings.compile, reason or why_not_compiled(device))
    not_captured = why_not_used("performance.cuda_graphs", settings.cuda_graphs, reason or why_not_graphed(device))
    if settings.offload_embedding and device != "cuda":
        raise UserError.of([unsupported("performance.offload_embedding", "needs a CUDA GPU", "false")])
    report.describe_path(reason, not_compiled, not_captured)
    if reason:
        if settings.fused_lora:
            fuse(model)
        return None
    decoder = FastDecoder(model, plan.recomputed, not_compiled is None)
    insisted = True in (settings.compile, settings.cuda_graphs)
    fall_back = None if insisted or device == "cpu" else fail_without_fallback if settings.fsdp else report.fall_back
    length, seed, captured = config.data.max_length, config.training.seed, not_captured is None
    step = StepSettings(plan.micro_batch, length, seed, captured, most_records, team.rank, team.count)
    return MicroStep(decoder, step, fall_back)


def fail_without_fallback(reason: str) -> None:
    """Stop the run: one rank alone must not fall back to the uncompiled path, where it would gather in another order.

    Raises:
        Failed: always.
    """
    raise Failed(
        f"compiling or capturing failed ({reason}); do without it: --set performance.compile=false --set "
        "performance.cuda_graphs=false"
    )


class RankCollator:
    """Collate this rank's rows of a micro-batch.

    Where the data end in the middle of a micro-batch, a process without rows takes one whose labels count for nothing: all
    processes take every step.

    Args:
        micro_batch: rows of each process.
    """

    def __init__(self, team: Team, micro_batch: int):
        self.team, self.micro_batch = team, micro_batch

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        first = self.team.rank * self.micro_batch
        own = rows[first : first + self.micro_batch]
        batch = default_data_collator(own or rows[:1])
        if not own:
            batch["labels"].fill_(IGNORED)
            batch["block"].fill_(-1)
        return batch


def training_arguments(
    config: Config, machine: Machine, steps: int, evaluate: bool, sequences: int, checkpoints: Path
) -> RunArguments:
    """Return the library's settings of a run.

    Args:
        steps: optimizer steps of the run.
        sequences: of a micro-step, over all processes.
    """
    training, device = config.training, machine.device
    return RunArguments(
        output_dir=str(checkpoints),
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=sequences,
        gradient_accumulation_steps=config.effective_batch // sequences,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_steps(steps),
        weight_decay=training.weight_decay,
        max_grad_norm=0.0,  # QLoraTrainer clips, after the gradients of all processes are summed
        optim=training.optim,
        fp16=machine.dtype == torch.float16,  # brings the loss scaling that float16 needs; bfloat16 needs none
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter hides a diverged loss behind the running mean, and syncs every micro-batch
        eval_strategy="steps" if evaluate else "no",
        eval_steps=training.eval_steps,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=None,  # CheckpointStore deletes the checkpoints that are too many
        seed=training.seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        ddp_backend="gloo" if device == "cpu" and torch.distributed.is_initialized() else None,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=training.report_to,
    )


def load_sharded_base(config: Config, machine: Machine, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, int]:
    """Load this rank's shard of the base model; returns it and the number of parameters that are not in its modules."""
    performance, folder = config.performance, model_folder(config.model)
    quantization = quantization_config(config.quantization, machine.dtype)
    in_host_memory, whole_embedding = performance.fsdp == "offload", performance.offload_embedding
    assert folder is not None  # the model was fetched
    model = load_sharded(folder, quantization, machine.device, machine.dtype, in_host_memory, not whole_embedding)
    guard_cpu_kernels(model, config.model.name)
    set_padding(tokenizer, model)
    base = sharded_base(model)
    return model, base.parameters if base else 0
