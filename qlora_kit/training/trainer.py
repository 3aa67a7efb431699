"""The Hugging Face Trainer with the overrides that this project needs.

Loop, schedule, logging and the files of a checkpoint are the library's. Overridden through its public methods and callbacks: the
micro-step (through fast/, weighted by tokens over the optimizer step, repeated with fewer sequences when GPU memory runs out),
the parameters that the loop sees, the check of each step, evaluation, and where checkpoints are written.
"""

import gc
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState

from qlora_kit.adapter.save import write_adapter
from qlora_kit.config import TrainingSettings
from qlora_kit.data.blocks import TrainingBlocks
from qlora_kit.errors import Failed, Stopped, UserError
from qlora_kit.fast.micro_step import MicroStep
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.loss import IGNORED, token_losses
from qlora_kit.model.perplexity import Perplexity, as_metrics, from_block_losses, library_losses, measure_block_losses
from qlora_kit.output.checkpoints import Checkpoint, describe_resume_point
from qlora_kit.training.checkpointing import (
    CheckpointStore,
    follow_schedule,
    load_adapter_weights,
    move_state_to_paged_memory,
    unreadable,
)
from qlora_kit.training.progress import ProgressCallback
from qlora_kit.training.report import RunReport
from qlora_kit.training.step_guard import StepGuard, enumerate_numbers
from qlora_kit.training.stop import BestEvaluation, StopCallback
from qlora_kit.training.trained_parameters import TrainedParameters


class QLoraTrainer(Trainer):
    """Trainer whose evaluation is a Perplexity, and whose micro-steps go through fast/ where they can.

    Args:
        settings: for clipping, the guard and the best evaluation. (`args` must not ask the library to clip.)
        steps: optimizer steps of the whole run.
        rows: sequences in a forward pass; halved when GPU memory runs out.
        compute_dtype: of autocast on the library's path.
        micro: the fast path, or None for the library's own layers.
    """

    def __init__(
        self,
        *,
        settings: TrainingSettings,
        steps: int,
        rows: int,
        compute_dtype: torch.dtype,
        micro: MicroStep | None,
        store: CheckpointStore,
        report: RunReport,
        progress: ProgressCallback,
        **rest: Any,
    ):
        self.micro = micro  # before the library's own preparations, which may ask for the optimizer
        super().__init__(**rest)
        self.settings, self.steps, self.rows, self.compute_dtype = settings, steps, rows, compute_dtype
        self.store, self.team, self.report, self.progress = store, store.team, report, progress
        self.guard = StepGuard(settings, str(compute_dtype).removeprefix("torch."), report.log.write, self)
        self.best = BestEvaluation(settings.early_stopping_patience) if settings.keeps_best_adapter else None
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step
        self.model_accepts_loss_kwargs = True  # the same, for versions without the line above
        self.adapted: Any = rest["model"]
        self.trained = TrainedParameters(self.adapted, micro.decoder.adapters if micro else None)
        # Nor a DDP wrapper: gradients are summed once a step, in `_sum_over_team`.
        self.accelerator.prepare_model = lambda model, **settings: self.trained  # type: ignore[method-assign]
        self.seen: list[dict[str, torch.Tensor]] = []  # micro-batches of the optimizer step so far
        self.step_tokens = 0
        self.loss_sum = torch.zeros((), device=self.args.device)  # of the steps since the last logged one
        self.loss_before = self.loss_sum.clone()  # without the current step
        self.steps_to_log = 0
        self.last_measured: tuple[int, Perplexity] | None = None
        self.resuming: Checkpoint | None = None  # until the first step after resuming
        self.stopping = StopCallback(self.team, store.root, report.log.show)
        for callback in (self.stopping, *([self.best] if self.best else []), _LoopCallback(self)):
            self.add_callback(callback)

    # The loop

    def train(self, resume_from_checkpoint: Checkpoint | None = None, **rest: Any) -> None:  # type: ignore[override]
        """Train up to the last step; with keep_best, end with the weights of the best evaluation.

        Raises:
            UserError: the checkpoint's files hold what no run has written.
            Failed: a step or an evaluation is NaN, or the disk refuses a checkpoint.
        """
        self.resuming = resume_from_checkpoint
        try:
            done = self._restore(resume_from_checkpoint) if resume_from_checkpoint else TrainerState()
            if done.global_step < self.steps and not (self.best and self.best.is_over):
                with self.store.transaction:
                    super().train(str(resume_from_checkpoint.folder) if resume_from_checkpoint else None, **rest)
            else:  # nothing is left to train, and the library would take a step too many
                assert resume_from_checkpoint is not None
                self.state = done
                load_adapter_weights(self.adapted, resume_from_checkpoint.folder, self.args.device.type)
                self.store.rotate(done.global_step, self.best.step if self.best else None)  # a killed run may not have
        except Exception as error:
            if self.resuming is None or isinstance(error, UserError | Failed | Stopped | OSError) or is_out_of_memory(error):
                raise
            raise unreadable(self.resuming, error) from error
        finally:  # also when training fails: no progress bar keeps running, no signal stays caught
            self.progress.close()
            self.stopping.release()
        if self.kept_step != self.state.global_step:
            load_adapter_weights(self.adapted, self.store.folder(self.kept_step), self.args.device.type)

    def _restore(self, checkpoint: Checkpoint) -> TrainerState:
        """Take up what the library does not restore; returns the library's own state."""
        run, done = checkpoint.run, TrainerState.load_from_json(str(checkpoint.folder / "trainer_state.json"))
        if run["micro_batch"] == self.rows and run["rows"] < self.rows:  # memory had run out
            self.rows = run["rows"]
            self.micro = self.micro and self.micro.smaller(self.rows)
        self.guard.restore(run["guard"])
        self.loss_sum.fill_(run["loss_sum"])
        self.steps_to_log = run["steps_to_log"]
        if self.best:
            self.best.restore(run["best"], run["best"] is not None and self.store.is_valid(run["best"]["step"]))
        return done

    def get_train_dataloader(self):
        loader: Any = super().get_train_dataloader()
        loader.device = None  # batches stay in pinned host memory, where counting their tokens waits for no GPU
        if self.team.count > 1:  # RankCollator divides them; accelerate would also repeat rows to make the last ones even
            sampler = loader.batch_sampler
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # type: ignore[override]
        """Return the micro-batches of one optimizer step and the number of tokens that they predict together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._begin_step()
        self.loss_before = self.loss_sum.clone()
        own = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
        self.step_tokens = int(self.team.sum(torch.as_tensor(own)))
        return batches, self.step_tokens

    def _begin_step(self) -> None:
        self.seen = []
        if self.micro:
            self.micro.begin_step(self.state.global_step)
        else:
            self.trained.zero_grad()
            self.adapted.train()  # an evaluation has switched dropout off

    # The micro-step

    def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[override]
        """Add the gradients of one micro-batch; out of GPU memory, the optimizer step starts again with fewer sequences."""
        self.seen.append(inputs)
        loss = self._accumulate(inputs, num_items_in_batch)
        while loss is None:
            loss = self._repeat_step(num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch of the optimizer step
            self._sum_over_team()
        return loss

    def _accumulate(self, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor | None:
        """Run a micro-batch, `rows` sequences at a time; returns its loss, or None when memory ran out and fewer rows may fit."""
        try:
            starts = range(0, len(inputs["input_ids"]), self.rows)
            pieces = [{key: value[at : at + self.rows] for key, value in inputs.items()} for at in starts]
            loss: Any = sum(self._micro_step(piece, tokens) for piece in pieces)
        except RuntimeError as error:
            if not self._can_halve(error):
                raise
            return None  # the error's traceback keeps the tensors of the failed pass alive until here
        self.loss_sum += loss
        return loss

    def _micro_step(self, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
        if self.micro is None:
            return super().training_step(self.trained, inputs, tokens)
        ids, labels, starts = inputs["input_ids"], inputs["labels"], inputs.get("starts")
        if (scaler := self._scaler()) is None:
            return self.micro.train(ids, labels, torch.ones(()) / tokens, starts)
        factor = scaler.scale(torch.ones((), device=self.args.device))
        return self.micro.train(ids, labels, factor / tokens, starts) / factor

    def _scaler(self) -> Any:
        """Return float16's loss scaler, or None."""
        return getattr(self.accelerator, "scaler", None)

    def _repeat_step(self, tokens: int) -> torch.Tensor | None:
        """Repeat the micro-batches of the optimizer step so far with half as many sequences at a time."""
        self._halve(f"in step {self.state.global_step + 1}: starting it again")
        seen = self.seen
        self._begin_step()
        self.seen, self.loss_sum = seen, self.loss_before.clone()
        for inputs in seen:
            loss = self._accumulate(inputs, tokens)
            if loss is None:
                return None
        return loss

    def _can_halve(self, error: RuntimeError) -> bool:
        sharded = self.micro is not None and self.micro.decoder.sharded is not None  # then all ranks take as many passes
        return self.rows > 1 and not sharded and is_out_of_memory(error)

    def _halve(self, place: str) -> None:
        self.rows = (self.rows + 1) // 2
        if self.micro:
            self.micro = self.micro.smaller(self.rows)
        gc.collect()
        torch.cuda.empty_cache()
        self.report.out_of_memory(place, self.rows)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        """Return the micro-batch's share of the mean over all tokens of the optimizer step, so that 1 x 16 equals 16 x 1."""
        losses = token_losses(self.adapted, inputs["input_ids"], inputs["labels"], inputs.get("starts"))
        return losses.sum() / num_items_in_batch

    def compute_loss_context_manager(self) -> AbstractContextManager:  # type: ignore[override]
        # Adapters are fp32: autocast casts them for each product instead of casting activations to fp32.
        return torch.autocast(self.args.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def floating_point_ops(self, inputs) -> int:  # type: ignore[override]
        return 0  # nobody reads it, and the library counts all parameters for it at each micro-batch

    # The optimizer step

    def create_optimizer(self, model=None):  # type: ignore[override]
        if self.micro is None:
            return super().create_optimizer()
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.adapted)
        self.optimizer = kind([self.micro.decoder.adapters.flat], weight_decay=self.args.weight_decay, **arguments)
        return self.optimizer

    def _sum_over_team(self) -> None:
        """Sum gradients and loss over the processes, once a step."""
        if self.team.count > 1:
            self.trained.sum_gradients(self.team)
            self.loss_sum = self.loss_before + self.team.sum(self.loss_sum - self.loss_before)

    def check_step(self) -> None:
        """Clip the gradient, and keep the optimizer from applying a step that the guard rejects."""
        norm, scaler = self.trained.clip(self.settings.max_grad_norm), self._scaler()
        loss, smallest = self.loss_sum - self.loss_before, self.trained.smallest_gradient_of_b()
        if self.guard.passes(self.state.global_step + 1, loss, norm, smallest, scaler and scaler.get_scale):
            self.steps_to_log += 1
            return
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)  # optimizers skip parameters without a gradient
        self.loss_sum = self.loss_before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean loss of the steps that the optimizer applied; the library's mean would count skipped ones."""
        if "loss" in logs:
            if not self.steps_to_log:
                return
            logs["loss"] = self.loss_sum.item() / self.steps_to_log
            if self.guard.skipped[-1:] == [self.state.global_step]:
                logs.pop("grad_norm", None)
            self.loss_sum, self.steps_to_log = torch.zeros_like(self.loss_sum), 0
        super().log(logs, start_time)

    # Descriptions for the guard's messages

    def describe_batch(self) -> str:
        own = [int(number) for batch in self.seen for number in batch["block"] if number >= 0]
        blocks = [number for part in self.team.gather(own) for number in part]
        data: Any = self.train_dataset
        sources = sorted({number for block in blocks for number in data.sources(block)})
        content = f" with {enumerate_numbers(data.unit, sources)}" if sources else ""
        return f"{enumerate_numbers('block', [block + 1 for block in blocks])}{content}, {self.step_tokens:,} trained tokens"

    def describe_checkpoints(self) -> str:
        return describe_resume_point(self.store.root)

    def modules_without_gradient(self) -> Sequence[str]:
        return self.trained.modules_without_gradient()

    # Evaluation

    def measure(self) -> Perplexity:
        """Return the perplexity on the evaluation blocks with the weights as they are now.

        Raises:
            Failed: the loss is NaN or infinite.
        """
        data: TrainingBlocks = self.eval_dataset  # type: ignore[assignment]
        if self.micro is None:
            self.adapted.eval()
        losses_of = self.micro.losses if self.micro else library_losses(self.adapted, self.compute_loss_context_manager())
        own = self.team.shard(data)
        with self.progress.evaluation(len(own)) as on_batch:
            try:
                measured = measure_block_losses(losses_of, own, self.rows, on_batch)
                sums, counts = (self.team.gather_in_order(part)[: len(data)] for part in measured)
                return self._check_finite(from_block_losses(sums, counts))
            except RuntimeError as error:
                if not self._can_halve(error):
                    raise
        del losses_of
        self._halve("in an evaluation: starting it again")
        return self.measure()

    def _check_finite(self, result: Perplexity) -> Perplexity:
        if math.isfinite(result.loss):
            return result
        raise Failed(
            f"the evaluation loss is {result.loss} after step {self.state.global_step}: stopped, and no adapter was written; "
            f"{self.guard.advice()}; {self.describe_checkpoints()}"
        )

    def measure_base(self) -> Perplexity | None:
        """Return the perplexity before the first step, when B is zero: that of the base model."""
        if self.eval_dataset is None:
            return None
        result = self.measure()
        self.report.perplexity("base model", result)
        self.report.log.write_metrics({"step": 0, "epoch": 0.0, **as_metrics(result)})
        return result

    def measure_final(self) -> Perplexity | None:
        """Return the perplexity of the weights that will be saved; not measured again where the last evaluation was of them."""
        if self.eval_dataset is None:
            return None
        if self.last_measured and self.last_measured[0] == self.state.global_step and not self.best:
            return self.last_measured[1]
        return self.measure()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:  # type: ignore[override]
        result = self.measure()
        self.last_measured = (self.state.global_step, result)
        metrics = as_metrics(result)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints and the end

    def _get_output_dir(self, trial: Any) -> str:
        # Private, see build.check_library. The public way, `args.output_dir`, is also where TensorBoard writes, and a staging
        # folder does not stay.
        return str(self.store.staging)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Begin a checkpoint with the adapter; the library adds the rest, and _LoopCallback completes it."""
        folder = self.store.begin(self.state.global_step, self._state(), sum(p.numel() for p in self.trained.parameters()))
        assert output_dir == str(folder), "the library saves a checkpoint elsewhere"
        if self.team.is_main:
            write_adapter(self.adapted, folder)

    def _state(self) -> dict[str, Any]:
        """Return the state that the library's files lack."""
        measured = self.last_measured
        return {
            "rows": self.rows,
            "guard": self.guard.state(),
            "best": self.best.state() if self.best else None,
            "loss_sum": self.loss_sum.item(),
            "steps_to_log": self.steps_to_log,
            "eval_loss": measured[1].loss if measured and measured[0] == self.state.global_step else None,
        }

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has when training is over: that of the best evaluation with keep_best."""
        best = self.best.step if self.best else None
        return best if best is not None and self.store.is_valid(best) else self.state.global_step

    def ending(self) -> dict[str, Any]:
        """Return how the run ended, for run.json."""
        last = self.state.global_step >= self.steps
        ended = "after the last step" if last else "early, as training.early_stopping_patience asks"
        return {"ended": ended, "skipped_steps": self.guard.skipped, "micro_batch": self.rows}


class _LoopCallback(TrainerCallback):
    """Call the Trainer back at the points of its loop that only callbacks see."""

    def __init__(self, trainer: QLoraTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **rest):
        trainer = self.trainer
        if trainer.resuming is not None:  # finish what the library has loaded
            follow_schedule(trainer.lr_scheduler)
            if args.device.type == "cuda":
                move_state_to_paged_memory(getattr(trainer.optimizer, "optimizer", trainer.optimizer))  # accelerate wraps it

    def on_step_begin(self, args, state, control, **rest):
        self.trainer.resuming = None  # everything is loaded

    def on_pre_optimizer_step(self, args, state, control, **rest):
        self.trainer.check_step()

    def on_save(self, args, state, control, **rest):
        best = self.trainer.best
        self.trainer.store.complete(state.global_step, best.step if best else None)
