"""The Hugging Face Trainer with the overrides that this project needs.

Overridden: the micro-step (through fast/, token-weighted over the optimizer step, starting the step again with less when memory
runs out), what the optimizer and clipping see (one flat tensor), evaluation (perplexity with its standard error), and resuming a
run that is through. Everything else (the loop, schedule, accumulation, logging, saving) is the library's.
"""

import gc
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from qlora_kit.callbacks import FiniteLossCallback, StopCallback
from qlora_kit.checkpoint import CHECKPOINTS, write_adapter
from qlora_kit.config import UserError
from qlora_kit.dataset import Blocks
from qlora_kit.device import Machine
from qlora_kit.fast.decoder import FastDecoder, why_not_fast
from qlora_kit.fast.graph import MicroStep, wanted, why_not_compiled, why_not_graphed
from qlora_kit.fast.lora import fuse
from qlora_kit.fast.loss import IGNORED, token_losses
from qlora_kit.perplexity import Perplexity, as_metrics, library_losses, measure_perplexity
from qlora_kit.progress import ProgressCallback
from qlora_kit.report import RunReport
from qlora_kit.settings import Config


class QLoraTrainer(Trainer):
    """Trainer whose evaluation is a Perplexity, and whose micro-steps go through fast/ where they can.

    Args:
        steps: optimizer steps of the whole run.
        micro: the fast path, or None for the library's own layers under autocast to `compute_dtype`.
    """

    def __init__(
        self, *, steps: int, compute_dtype: torch.dtype, progress: "ProgressCallback", micro: MicroStep | None, **rest: Any
    ):
        self.micro = micro  # before the library's own preparations, which may ask for the optimizer
        super().__init__(**rest)
        self.steps = steps
        self.rows = self.args.per_device_train_batch_size  # sequences in a forward pass; halved when memory runs out
        self.seen: list[dict[str, torch.Tensor]] = []  # micro-batches of the optimizer step so far
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step
        self.model_accepts_loss_kwargs = True  # the same, for transformers before it knew the line above
        self.adapted = rest["model"]
        self.compute_dtype = compute_dtype
        self.progress = progress
        self.stopping = StopCallback()
        self.add_callback(self.stopping)
        self.last_measured: tuple[int, Perplexity] | None = None

    def autocast(self) -> AbstractContextManager:
        # Adapters are fp32: autocast casts them for each product instead of turning activations to fp32.
        return torch.autocast(self.args.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def compute_loss_context_manager(self) -> AbstractContextManager:  # type: ignore[override]
        return self.autocast()

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        loader.device = None  # batches stay in pinned host memory, where counting their tokens waits for no GPU
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # type: ignore[override]
        """The micro-batches of one optimizer step and the tokens they predict together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._begin_step()
        return batches, sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)

    def _begin_step(self) -> None:
        self.seen = []
        if self.micro:
            self.micro.begin_step(self.state.global_step)
        else:
            self.adapted.zero_grad()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        """The micro-batch's share of the mean over all tokens of the optimizer step, so that 1 x 16 equals 16 x 1."""
        return token_losses(self.adapted, inputs["input_ids"], inputs["labels"]).sum() / num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[override]
        """Forward and backward of one micro-batch; out of memory, the optimizer step starts again with smaller ones."""
        self.seen.append(inputs)
        try:
            pieces = [{key: value[at : at + self.rows] for key, value in inputs.items()} for at in self._starts(inputs)]
            return sum(self._micro_step(model, piece, num_items_in_batch) for piece in pieces)
        except torch.cuda.OutOfMemoryError:
            if self.rows == 1:
                raise
        # Here, and not under `except`, whose traceback keeps the tensors of the failed pass alive.
        again = self.seen
        self._halve()
        self._begin_step()
        for earlier in again:
            loss = self.training_step(model, earlier, num_items_in_batch)
        return loss

    def _starts(self, inputs: dict[str, torch.Tensor]) -> range:
        return range(0, len(inputs["input_ids"]), self.rows)

    def _micro_step(self, model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
        if self.micro is None:
            return super().training_step(model, inputs, tokens)
        scaler = getattr(self.accelerator, "scaler", None)
        factor = torch.ones((), device=self.args.device)
        if scaler is not None:  # float16
            factor = scaler.scale(factor)
        return self.micro.train(inputs["input_ids"], inputs["labels"], factor / tokens) / factor

    def _halve(self) -> None:
        self.rows = (self.rows + 1) // 2
        if self.micro:
            self.micro = self.micro.smaller(self.rows)
        gc.collect()
        torch.cuda.empty_cache()
        self.progress.report.out_of_memory(self.state.global_step, self.rows)

    def floating_point_ops(self, inputs) -> int:  # type: ignore[override]
        return 0  # nobody reads it, and the library counts all parameters for it at each micro-batch

    def create_optimizer(self, model=None):  # type: ignore[override]
        if self.micro is None:
            return super().create_optimizer()
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.adapted)
        self.optimizer = kind([self.micro.decoder.adapters.flat], weight_decay=self.args.weight_decay, **arguments)
        return self.optimizer

    def _clip_grad_norm(self, model):
        if self.micro is None:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([self.micro.decoder.adapters.flat], self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if self.micro is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.accelerator.clip_grad_norm_([self.micro.decoder.adapters.flat], math.inf)

    def train(self, resume_from_checkpoint=None, **rest):  # type: ignore[override]
        checkpoint = resume_from_checkpoint
        done = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))) if checkpoint else TrainerState()
        if done.global_step < self.steps:
            return super().train(resume_from_checkpoint=checkpoint, **rest)
        # Stopped after its last step: nothing is left to train, and the library would take a step too many.
        self.state = done
        weights = load_peft_weights(done.best_model_checkpoint or checkpoint, device=self.args.device.type)
        set_peft_model_state_dict(self.adapted, weights)

    def measure(self) -> Perplexity:
        """Perplexity on the evaluation blocks with the weights as they are now."""
        assert isinstance(self.eval_dataset, Blocks)
        losses_of = self.micro.losses if self.micro else library_losses(self.adapted, self.autocast())
        with self.progress.evaluation(len(self.eval_dataset)) as on_batch:
            try:
                return measure_perplexity(losses_of, self.eval_dataset, self.rows, on_batch)
            except torch.cuda.OutOfMemoryError:
                if self.rows == 1:
                    raise
        del losses_of
        self._halve()
        return self.measure()

    def measure_base(self) -> Perplexity | None:
        """Perplexity before the first step, when B is zero and the adapter changes nothing: that of the base model."""
        if self.eval_dataset is None:
            return None
        result = self.measure()
        self.progress.report.perplexity("base model", result)
        self.progress.report.log.metrics({"step": 0, "epoch": 0.0, **as_metrics(result)})
        return result

    def measure_final(self) -> Perplexity | None:
        """Perplexity of the weights that will be saved; not measured again when the last step's evaluation was of the same."""
        if self.eval_dataset is None:
            return None
        if self.last_measured and self.last_measured[0] == self.state.global_step and not self.args.load_best_model_at_end:
            return self.last_measured[1]
        return self.measure()

    def _save(self, output_dir=None, state_dict=None) -> None:
        write_adapter(self.adapted, Path(output_dir))  # the adapter alone: no pickled arguments

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:  # type: ignore[override]
        result = self.measure()
        self.last_measured = (self.state.global_step, result)
        metrics = as_metrics(result)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def build_trainer(model: Any, train: Blocks, evaluation: Blocks | None, report: RunReport) -> QLoraTrainer:
    config, machine = report.config, report.machine
    progress = ProgressCallback(report, train.tokens / config.steps_per_epoch(len(train)))
    callbacks: list[TrainerCallback] = [FiniteLossCallback(), progress]  # in this order: no NaN reaches the files
    if config.training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.training.early_stopping_patience))
    steps = total_steps(config, len(train))
    trainer = QLoraTrainer(
        steps=steps,
        model=model,
        args=training_arguments(config, machine, steps, evaluation is not None, report.plan.micro_batch),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=default_data_collator,
        callbacks=callbacks,
        compute_dtype=machine.dtype,
        progress=progress,
        micro=build_micro_step(model, report),
    )
    trainer.remove_callback(PrinterCallback)  # prints a dict per logged step
    return trainer


def build_micro_step(model: Any, report: RunReport) -> MicroStep | None:
    """The fast path, or None where the library's own layers have to do; the log says which, and why.

    Raises:
        UserError: performance.compile or performance.cuda_graphs is true and cannot work.
    """
    config, device = report.config, report.machine.device
    reason = why_not_fast(model, config.data.max_length) if config.performance.fused_lora else "performance.fused_lora is false"
    compiled = wanted("performance.compile", config.performance.compile, reason or why_not_compiled(device))
    captured = wanted("performance.cuda_graphs", config.performance.cuda_graphs, reason or why_not_graphed(device))
    if config.performance.offload_embedding and (reason or device != "cuda"):
        raise UserError(f"performance.offload_embedding: true: cannot work here ({reason or 'needs a CUDA GPU'}); use false")
    report.describe_path(device, reason, compiled, captured)
    if reason:
        if config.performance.fused_lora:
            fuse(model)
        return None
    decoder = FastDecoder(model, config.lora.dropout, report.plan.recomputed, compiled is None)
    return MicroStep(decoder, report.plan.micro_batch, config.data.max_length, config.training.seed, captured is None)


def total_steps(config: Config, blocks: int) -> int:
    """Optimizer steps of the run."""
    return config.training.max_steps or math.ceil(config.training.num_epochs * config.steps_per_epoch(blocks))


def training_arguments(config: Config, machine: Machine, steps: int, evaluate: bool, micro_batch: int) -> TrainingArguments:
    training, device = config.training, machine.device
    keep_best = training.early_stopping_patience is not None
    return TrainingArguments(
        output_dir=str(Path(training.output_dir).expanduser() / CHECKPOINTS),
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=config.effective_batch // micro_batch,
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
        save_total_limit=training.save_total_limit,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        seed=training.seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=training.report_to,
    )
