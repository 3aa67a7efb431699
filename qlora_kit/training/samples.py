"""Log the answers to training.sample_prompts."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from qlora_kit.output.log import RunLog


class SampleCallback(TrainerCallback):
    """Log a model's answers at each evaluation.

    Args:
        sample: gives the answers of a model as it is now, one for each prompt.
        model: the PEFT model.
    """

    def __init__(self, sample: Callable[[Any], list[str]], model: Any, prompts: list[str], log: RunLog):
        self.sample, self.model, self.prompts, self.log = sample, model, prompts, log

    def answer(self, step: int) -> None:
        """Log the answers after a step; 0 is the base model."""
        for prompt, answer in zip(self.prompts, self.sample(self.model), strict=True):
            self.log.write(f"step {step}: {prompt!r} -> {answer!r}")

    def on_evaluate(self, args, state, control, **rest):
        self.answer(state.global_step)
