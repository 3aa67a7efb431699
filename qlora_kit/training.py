"""The Hugging Face Trainer with the few overrides that this project needs, and its callbacks.

Overridden: the loss (token-weighted over the optimizer step, without full logits), autocast, evaluation (perplexity with its
standard error), and resuming a run that is through. Everything else (schedule, clipping, accumulation, saving) is the library's.
"""

import math
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
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

from qlora_kit.checkpoint import CHECKPOINTS
from qlora_kit.cli import Failed
from qlora_kit.dataset import Blocks
from qlora_kit.fast.graph import GraphedMicroStep, why_not_graphed
from qlora_kit.fast.loss import IGNORED, token_losses
from qlora_kit.perplexity import Perplexity, measure_perplexity
from qlora_kit.progress import ProgressCallback
from qlora_kit.report import RunReport
from qlora_kit.settings import Config


class QLoraTrainer(Trainer):
    """Trainer whose evaluation is a Perplexity and whose products run in `compute_dtype`."""

    def __init__(self, *, steps: int, compute_dtype: torch.dtype, progress: "ProgressCallback", **rest: Any):
        super().__init__(**rest)
        self.steps = steps  # of the whole run
        self.graphed: GraphedMicroStep | None = None
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

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # type: ignore[override]
        """The micro-batches of one optimizer step and the tokens they predict together, counted on the CPU: no sync."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        """The micro-batch's share of the mean over all tokens of the optimizer step, so that 1 x 16 equals 16 x 1."""
        return token_losses(self.adapted, inputs["input_ids"], inputs["labels"]).sum() / num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[override]
        if self.graphed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        if self.graphed.parameters[0].grad is None:  # the Trainer drops the gradients after each optimizer step
            self.graphed.begin_step(self.state.global_step)
        return self.graphed(inputs["input_ids"], inputs["labels"], num_items_in_batch)

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
        with self.progress.evaluation(len(self.eval_dataset)) as on_batch:
            return measure_perplexity(
                self.adapted, self.eval_dataset, self.args.per_device_eval_batch_size, self.autocast(), on_batch
            )

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
        # The adapter alone: no pickled arguments, and no look-up of the base model's vocabulary on the Hub.
        self.adapted.save_pretrained(output_dir, save_embedding_layers=False)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:  # type: ignore[override]
        result = self.measure()
        self.last_measured = (self.state.global_step, result)
        metrics = as_metrics(result)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def as_metrics(result: Perplexity) -> dict[str, float]:
    """The keys under which metrics.jsonl and the Trainer know an evaluation."""
    return {"eval_loss": result.loss, "eval_perplexity": result.perplexity, "eval_standard_error": result.standard_error,
            "eval_tokens": result.tokens, "eval_blocks": result.blocks}  # fmt: skip


def recorded_base(metrics: list[dict[str, Any]]) -> Perplexity | None:
    """The base model's perplexity as an interrupted run wrote it to metrics.jsonl."""
    entry = next((entry for entry in metrics if entry["step"] == 0 and "eval_loss" in entry), None)
    if entry is None:
        return None
    return Perplexity(*(entry[f"eval_{name}"] for name in ("loss", "perplexity", "standard_error", "tokens", "blocks")))


def build_trainer(model: Any, train: Blocks, evaluation: Blocks | None, report: RunReport) -> QLoraTrainer:
    config, device = report.config, report.machine.device
    progress = ProgressCallback(report, train.tokens / config.steps_per_epoch(len(train)))
    callbacks: list[TrainerCallback] = [FiniteLossCallback(), progress]  # in this order: no NaN reaches the files
    if config.training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.training.early_stopping_patience))
    steps = total_steps(config, len(train))
    trainer = QLoraTrainer(
        steps=steps,
        model=model,
        args=training_arguments(config, device, report.machine.dtype, steps, evaluation is not None),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=default_data_collator,
        callbacks=callbacks,
        compute_dtype=report.machine.dtype,
        progress=progress,
    )
    trainer.remove_callback(PrinterCallback)  # prints a dict per logged step
    if config.performance.cuda_graphs:
        reason = why_not_graphed(model, device, report.machine.dtype)
        if reason is None:
            trainer.graphed = GraphedMicroStep(model, config.training.seed)
        report.describe_graph(reason)
    return trainer


def total_steps(config: Config, blocks: int) -> int:
    """Optimizer steps of the run."""
    return config.training.max_steps or math.ceil(config.training.num_epochs * config.steps_per_epoch(blocks))


def training_arguments(config: Config, device: str, compute_dtype: torch.dtype, steps: int, evaluate: bool) -> TrainingArguments:
    training = config.training
    keep_best = training.early_stopping_patience is not None
    return TrainingArguments(
        output_dir=str(Path(training.output_dir).expanduser() / CHECKPOINTS),
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=config.micro_batch,
        per_device_eval_batch_size=config.micro_batch,  # evaluation needs no more memory than training
        gradient_accumulation_steps=config.accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=math.ceil(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        fp16=compute_dtype == torch.float16,  # brings the loss scaling that float16 needs; bfloat16 needs none
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


class FiniteLossCallback(TrainerCallback):
    """Stop at the first logged loss that is NaN or infinite instead of training on.

    The Trainer's closing `train_loss`, the mean of the whole run, tells of the steps after the last logged one.
    """

    def on_log(self, args, state, control, logs=None, **rest):
        loss = (logs or {}).get("loss", (logs or {}).get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise Failed(
                f"the loss is {loss} at step {state.global_step}; the run was stopped and no adapter written: "
                f"try a lower --learning_rate (now {args.learning_rate}), or quantization.compute_dtype bfloat16 or float32"
            )


class StopCallback(TrainerCallback):
    """First Ctrl+C or SIGTERM: finish the optimizer step and save; second: stop at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_begin(self, args, state, control, **rest):
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args, state, control, **rest):
        if self.signal is not None and not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **rest):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
