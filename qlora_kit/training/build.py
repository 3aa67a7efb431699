"""Settings -> the Trainer of a run: its arguments, its callbacks, and the way that micro-steps take."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from qlora_kit.config import Config
from qlora_kit.data.blocks import Blocks, RecordBlocks
from qlora_kit.errors import Failed, UserError, cannot_work
from qlora_kit.fast.micro_step import MicroStep, why_not_compiled, why_not_graphed, why_not_used
from qlora_kit.fast.peft_layers import fuse
from qlora_kit.fast.training_pass import FastDecoder, why_not_fast
from qlora_kit.model.loss import IGNORED
from qlora_kit.output.folder import CHECKPOINTS
from qlora_kit.training.machine import Machine
from qlora_kit.training.processes import Team
from qlora_kit.training.progress import ProgressCallback
from qlora_kit.training.report import RunReport
from qlora_kit.training.trainer import QLoraTrainer


def build_trainer(
    model: Any, train: Blocks | RecordBlocks, evaluation: Blocks | RecordBlocks | None, report: RunReport
) -> QLoraTrainer:
    config, machine = report.config, report.machine
    progress = ProgressCallback(report, train.tokens / config.steps_per_epoch(len(train)))
    callbacks: list[TrainerCallback] = [progress]
    if config.training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.training.early_stopping_patience))
    steps = config.total_steps(len(train))
    trainer = QLoraTrainer(
        steps=steps,
        model=model,
        args=training_arguments(config, machine, steps, evaluation is not None, report.plan.micro_batch * report.team.count),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=OwnRows(report.team, report.plan.micro_batch),
        rows=report.plan.micro_batch,
        callbacks=callbacks,
        checkpoints_kept=config.training.save_total_limit,
        compute_dtype=machine.dtype,
        progress=progress,
        micro=build_micro_step(
            model, report, any(isinstance(blocks, RecordBlocks) and blocks.packed for blocks in (train, evaluation))
        ),
    )
    trainer.remove_callback(PrinterCallback)  # prints a dict per logged step
    return trainer


def build_micro_step(model: Any, report: RunReport, packed: bool) -> MicroStep | None:
    """The fast path, or None where the library's own layers have to do; the log says which, and why.

    Args:
        packed: whether blocks hold several records.

    Raises:
        UserError: performance.compile or performance.cuda_graphs is true and cannot work.
    """
    config, device = report.config, report.machine.device
    reason = why_not_fast(model, config.data.max_length) if config.performance.fused_lora else "performance.fused_lora is false"
    settings = config.performance
    not_compiled = why_not_used("performance.compile", settings.compile, reason or why_not_compiled(device))
    not_captured = why_not_used("performance.cuda_graphs", settings.cuda_graphs, reason or why_not_graphed(device))
    if settings.fsdp and reason:
        raise UserError(cannot_work("performance.fsdp", reason, "false"))
    if config.performance.offload_embedding and (reason or device != "cuda"):
        raise UserError(cannot_work("performance.offload_embedding", reason or "needs a CUDA GPU", "false"))
    report.describe_path(reason, not_compiled, not_captured)
    if reason:
        if config.performance.fused_lora:
            fuse(model)
        return None
    decoder = FastDecoder(model, report.plan.recomputed, not_compiled is None, report.plan.keep_weights)
    insisted = True in (settings.compile, settings.cuda_graphs)
    give_up = None if insisted or device == "cpu" else end_all if settings.fsdp else report.plain_path
    micro_batch, length = report.plan.micro_batch, config.data.max_length
    turn = (report.team.rank, report.team.count)
    return MicroStep(decoder, micro_batch, length, config.training.seed, not_captured is None, give_up, packed, turn)


def end_all(reason: str) -> None:
    """What gives compiling and capturing up in processes that share each pass: alone in it, one would meet the others nowhere.

    Raises:
        Failed: always.
    """
    raise Failed(
        f"compiling or capturing failed ({reason}); do without it: --set performance.compile=false --set "
        "performance.cuda_graphs=false"
    )


class OwnRows:
    """Collates a micro-step's rows, of which each process takes its own.

    Where the data ends in the middle of one, a process without rows takes one that counts for nothing: all take every step.

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


def training_arguments(config: Config, machine: Machine, steps: int, evaluate: bool, together: int) -> TrainingArguments:
    """The library's settings of a run.

    Args:
        together: sequences of a micro-step, of all processes.
    """
    training, device = config.training, machine.device
    keep_best = training.keeps_best_adapter
    return TrainingArguments(
        output_dir=str(Path(training.output_dir).expanduser() / CHECKPOINTS),
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=together,
        gradient_accumulation_steps=config.effective_batch // together,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=math.ceil(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        fp16=machine.dtype == torch.float16,  # brings the loss scaling that float16 needs; bfloat16 needs none
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter hides a diverged loss behind the running mean, and syncs every micro-batch
        eval_strategy="steps" if evaluate else "no",
        eval_steps=training.eval_steps,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=None,  # checkpoints.py removes what is too much
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        seed=training.seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        ddp_backend="gloo" if device == "cpu" and torch.distributed.is_initialized() else None,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=training.report_to,
    )
