"""The Hugging Face Trainer with the overrides that this project needs.

Overridden: the micro-step (through fast/, token-weighted over the optimizer step, starting the step again with less when memory
runs out) and the batches that it takes, what the optimizer and clipping see (one flat tensor, when guard.py lets it pass),
evaluation (perplexity with its standard error); and, in resumable.py, checkpoints and going on from them. Loop, schedule and
logging are the library's.
"""

import gc
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from qlora_kit.data.blocks import Blocks, RecordBlocks
from qlora_kit.errors import Failed
from qlora_kit.fast.micro_step import MicroStep
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.loss import IGNORED, token_losses
from qlora_kit.model.perplexity import Perplexity, as_metrics, from_block_losses, library_losses, measure_block_losses
from qlora_kit.output.checkpoints import describe_resume_point
from qlora_kit.training.checkpointing import ResumableTrainer
from qlora_kit.training.progress import ProgressCallback
from qlora_kit.training.step_guard import StepGuard, numbered
from qlora_kit.training.stop import StopCallback


class QLoraTrainer(ResumableTrainer):
    """Trainer whose evaluation is a Perplexity, and whose micro-steps go through fast/ where they can.

    Args:
        steps: optimizer steps of the whole run.
        rows: sequences in a forward pass.
        micro: the fast path, or None for the library's own layers under autocast to `compute_dtype`.
    """

    def __init__(
        self,
        *,
        steps: int,
        rows: int,
        compute_dtype: torch.dtype,
        progress: ProgressCallback,
        micro: MicroStep | None,
        checkpoints_kept: int | None,
        **rest: Any,
    ):
        self.micro = micro  # before the library's own preparations, which may ask for the optimizer
        super().__init__(**rest)
        self.steps, self.checkpoints_kept = steps, checkpoints_kept
        self.rows = rows  # halved when memory runs out
        self.team = progress.report.team
        self.shared = True  # whether the processes have put together what they have of the step at hand
        self.seen: list[dict[str, torch.Tensor]] = []  # micro-batches of the optimizer step so far
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step
        self.model_accepts_loss_kwargs = True  # the same, for transformers before it knew the line above
        self.adapted = rest["model"]
        if micro:  # `_begin_step` clears the gradients; the library's way looks at every module, 4 ms a step at Qwen2.5-3B
            self.adapted.zero_grad = lambda set_to_none=True: None
        self.lora_b = {
            name: parameter
            for name, parameter in self.adapted.named_parameters()
            if parameter.requires_grad and ".lora_B." in name
        }
        self.compute_dtype = compute_dtype
        self.progress = progress
        self.stopping = StopCallback(self.team)
        self.add_callback(self.stopping)
        self.last_measured: tuple[int, Perplexity] | None = None
        self.guard = StepGuard(progress.report, self._batch, lambda: describe_resume_point(self._root()), self._silent)
        self.loss_before: torch.Tensor | None = None  # summed up since the last logged step, without the step at hand
        self.step_tokens = 0

    def autocast(self) -> AbstractContextManager:
        # Adapters are fp32: autocast casts them for each product instead of turning activations to fp32.
        return torch.autocast(self.args.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def compute_loss_context_manager(self) -> AbstractContextManager:  # type: ignore[override]
        return self.autocast()

    def get_train_dataloader(self):
        loader: Any = super().get_train_dataloader()
        loader.device = None  # batches stay in pinned host memory, where counting their tokens waits for no GPU
        if self.team.count > 1:  # OwnRows divides them; accelerate would also repeat rows to make the last ones even
            sampler = loader.batch_sampler
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Not at all: it lies where it was loaded. From cpu to cpu:0, as one of several processes would, adapters are copied."""

    def _prepare_for_training(self, *arguments: Any) -> Any:
        # No wrapper around the model: gradients are summed once a step, in `_share`.
        if self.team.count > 1:
            self.accelerator.prepare_model = lambda model, **how: model
        return super()._prepare_for_training(*arguments)

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # type: ignore[override]
        """The micro-batches of one optimizer step and the tokens they predict together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._begin_step()
        self.loss_before = None
        own = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
        self.step_tokens = int(self.team.sum(torch.as_tensor(own)))
        return batches, self.step_tokens

    def _begin_step(self) -> None:
        self.seen, self.shared = [], False
        if self.micro:
            self.micro.begin_step(self.state.global_step)
        else:
            self.adapted.zero_grad()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        """The micro-batch's share of the mean over all tokens of the optimizer step, so that 1 x 16 equals 16 x 1."""
        losses = token_losses(self.adapted, inputs["input_ids"], inputs["labels"], inputs.get("starts"))
        return losses.sum() / num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[override]
        """Forward and backward of one micro-batch; out of memory, the optimizer step starts again with smaller ones."""
        self.seen.append(inputs)
        if self.loss_before is None:  # not where the step begins: there a resumed run has not read its sum yet
            self.loss_before = self._tr_loss.clone()
        try:
            pieces = [{key: value[at : at + self.rows] for key, value in inputs.items()} for at in self._starts(inputs)]
            return sum(self._micro_step(model, piece, num_items_in_batch) for piece in pieces)
        except RuntimeError as error:
            if not self._can_halve(error):
                raise
        # Here, and not under `except`, whose traceback keeps the tensors of the failed pass alive.
        again = self.seen
        self._halve(f"in step {self.state.global_step + 1}: starting it again")
        self._begin_step()
        for earlier in again:
            loss = self.training_step(model, earlier, num_items_in_batch)
        return loss

    def _starts(self, inputs: dict[str, torch.Tensor]) -> range:
        return range(0, len(inputs["input_ids"]), self.rows)

    def _micro_step(self, model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
        if self.micro is None:
            return super().training_step(model, inputs, tokens)
        ids, labels, starts = inputs["input_ids"], inputs["labels"], inputs.get("starts")
        if (scaler := getattr(self.accelerator, "scaler", None)) is None:
            return self.micro.train(ids, labels, torch.ones(()) / tokens, starts)
        factor = scaler.scale(torch.ones((), device=self.args.device))  # float16
        return self.micro.train(ids, labels, factor / tokens, starts) / factor

    def _can_halve(self, error: RuntimeError) -> bool:
        sharded = self.micro is not None and self.micro.decoder.sharded is not None  # then all take as many passes as the others
        return self.rows > 1 and not sharded and is_out_of_memory(error)

    def _halve(self, what: str) -> None:
        self.rows = (self.rows + 1) // 2
        if self.micro:
            self.micro = self.micro.smaller(self.rows)
        gc.collect()
        torch.cuda.empty_cache()
        self.progress.report.out_of_memory(what, self.rows)

    def floating_point_ops(self, inputs) -> int:  # type: ignore[override]
        return 0  # nobody reads it, and the library counts all parameters for it at each micro-batch

    def create_optimizer(self, model=None):  # type: ignore[override]
        if self.micro is None:
            return super().create_optimizer()
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.adapted)
        self.optimizer = kind([self.micro.decoder.adapters.flat], weight_decay=self.args.weight_decay, **arguments)
        return self.optimizer

    def _share(self) -> None:
        """Sum gradients and loss over the processes, once a step: each had its part of what was divided by all tokens."""
        if self.shared or self.team.count == 1:
            return
        self.shared = True
        if self.micro:
            self.team.sum(self.micro.decoder.adapters.gradient)
        else:
            gradients = [parameter.grad for parameter in self.adapted.parameters() if parameter.requires_grad]
            flat = self.team.sum(parameters_to_vector(gradients))
            vector_to_parameters(flat, gradients)
        assert self.loss_before is not None, "a step without a micro-step"
        self._tr_loss = self.loss_before + self.team.sum(self._tr_loss - self.loss_before)

    def _clip_grad_norm(self, model):
        self._share()
        if self.micro is None:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([self.micro.decoder.adapters.flat], self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of a step that the optimizer may see; None for one that is left out, of which nothing is logged."""
        self._share()
        if self.micro is None or grad_norm is not None:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        else:
            norm = self.accelerator.clip_grad_norm_([self.micro.decoder.adapters.flat], math.inf)
        assert self.loss_before is not None, "a step without a micro-step"
        loss, scaler = self._tr_loss - self.loss_before, getattr(self.accelerator, "scaler", None)
        smallest = torch.stack(torch._foreach_norm(list(self._gradients_of_b().values()), math.inf)).min()
        if self.guard.passes(self.state.global_step + 1, loss, norm, smallest, scaler and scaler.get_scale):
            return norm
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)  # optimizers pass over parameters that have none
        self._tr_loss = self.loss_before
        self._globalstep_last_logged += 1  # the next mean is over fewer steps
        return None

    def _gradients_of_b(self) -> dict[str, torch.Tensor]:
        gradients = {}
        for name, parameter in self.lora_b.items():
            found = self.micro.decoder.adapters.gradient_of(parameter) if self.micro else parameter.grad
            gradients[name] = parameter.new_zeros(1) if found is None else found
        return gradients

    def _silent(self) -> list[str]:
        names = [name for name, gradient in self._gradients_of_b().items() if not gradient.any()]
        return [name.removeprefix("base_model.model.").partition(".lora_B.")[0] for name in names]

    def _batch(self) -> str:
        """What the step at hand was computed on."""
        own = [int(number) for batch in self.seen for number in batch["block"] if number >= 0]
        blocks = [number for part in self.team.gather(own) for number in part]
        data: Any = self.train_dataset
        sources = sorted({number for block in blocks for number in data.sources(block)})
        held = f" with {numbered(data.unit, sources)}" if sources else ""
        return f"{numbered('block', [block + 1 for block in blocks])}{held}, {self.step_tokens:,} trained tokens"

    def measure(self) -> Perplexity:
        """Perplexity on the evaluation blocks with the weights as they are now."""
        assert isinstance(self.eval_dataset, Blocks | RecordBlocks)
        if self.micro is None:
            self.adapted.eval()  # once, for all batches; the library's training_step switches back
        losses_of = self.micro.losses if self.micro else library_losses(self.adapted, self.autocast())
        with self.progress.evaluation(len(self.team.shard(self.eval_dataset))) as on_batch:
            try:
                own = measure_block_losses(losses_of, self.team.shard(self.eval_dataset), self.rows, on_batch)
                sums, counts = (self.team.gather_in_order(part)[: len(self.eval_dataset)] for part in own)
                return self._checked(from_block_losses(sums, counts))
            except RuntimeError as error:
                if not self._can_halve(error):
                    raise
        del losses_of
        self._halve("in an evaluation: starting it again")
        return self.measure()

    def _checked(self, result: Perplexity) -> Perplexity:
        if math.isfinite(result.loss):
            return result
        raise Failed(
            f"the evaluation loss is {result.loss} after step {self.state.global_step}: stopped, and no adapter was written; "
            f"{self.guard.advice()}; {describe_resume_point(self._root())}"
        )

    def measure_base(self) -> Perplexity | None:
        """Perplexity before the first step, when B is zero and the adapter changes nothing: that of the base model."""
        if self.eval_dataset is None:
            return None
        result = self.measure()
        self.progress.report.perplexity("base model", result)
        self.progress.report.log.metrics({"step": 0, "epoch": 0.0, **as_metrics(result)})
        return result

    def how_it_went(self) -> dict[str, Any]:
        """For the provenance: steps of the adapter and of the run, why it ended, the steps that the guard left out."""
        last = self.state.global_step
        ended = "after the last step" if last >= self.steps else "early, as training.early_stopping_patience asks"
        return {"optimizer_steps": self.kept_step, "last_step": last, "ended": ended, "skipped_steps": self.guard.skipped}

    @property
    def kept_step(self) -> int:
        """The step whose weights are in the model when training is over: that of the best evaluation where asked."""
        best = self.state.best_global_step if self.state.best_model_checkpoint and self.args.load_best_model_at_end else None
        return best or self.state.global_step

    def measure_final(self) -> Perplexity | None:
        """Perplexity of the weights that will be saved; not measured again when the last step's evaluation was of the same."""
        if self.eval_dataset is None:
            return None
        if self.last_measured and self.last_measured[0] == self.state.global_step and not self.args.load_best_model_at_end:
            return self.last_measured[1]
        return self.measure()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:  # type: ignore[override]
        result = self.measure()
        self.last_measured = (self.state.global_step, result)
        metrics = as_metrics(result)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
