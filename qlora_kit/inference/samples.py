"""Answer fixed prompts with a model while it trains (training.sample_prompts)."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.config import SAMPLE_TOKENS, Config
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.errors import UserError
from qlora_kit.inference.prompts import PromptEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "training.sample_prompts"


def build_sampler(
    config: Config, tokenizer: "PreTrainedTokenizerBase", style: str, evaluates: bool
) -> Callable[[Any], list[str]] | None:
    """Return a function that gives a PEFT model's answers to training.sample_prompts; None without prompts.

    It takes the likeliest token each time and draws no random number, so that the run stays what it is without.

    Args:
        style: of the prompts: text, chat or instruction.
        evaluates: whether the run has evaluations, with which the answers come.

    Raises:
        UserError: a prompt is longer than data.max_length, or the run cannot answer any.
    """
    prompts = config.training.sample_prompts
    if not prompts:
        return None
    for key in ("fsdp", "offload_embedding"):
        if getattr(config.performance, key):
            raise UserError(KEY, None, f"cannot be answered under performance.{key}", f"use null, or performance.{key}=false")
    if not evaluates:
        raise UserError(KEY, None, "are answered at each evaluation, and data.eval_split is null", "use null, or hold data out")
    stop_ids = find_stop_ids(tokenizer, style)
    encoder = PromptEncoder(tokenizer, style, stop_ids, config.data.train_on)
    encoded = [encoder.encode(prompt, KEY, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > config.data.max_length:
            raise UserError(KEY, prompt[:40], f"has {len(ids)} tokens, more than data.max_length", "shorten it")

    def sample(model: Any) -> list[str]:
        return [str(tokenizer.decode(_continue(model, ids, stop_ids), skip_special_tokens=True)) for ids in encoded]

    return sample


@torch.no_grad()
def _continue(model: Any, ids: list[int], stop_ids: list[int]) -> list[int]:
    """Return the likeliest tokens one by one, up to SAMPLE_TOKENS or a stop token, which is left out."""
    accepted = inspect.signature(model.get_base_model().forward).parameters
    options: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})}
    name = "cache" if "cache" in accepted else "past_key_values"  # as transformers before 5.24 calls it
    answer: list[int] = []
    new = ids
    was_training = model.training
    model.eval()
    try:
        while len(answer) < SAMPLE_TOKENS:
            output = model(input_ids=torch.tensor([new], device=model.device), **options)
            token = int(output.logits[0, -1].argmax())
            if token in stop_ids:
                break
            answer.append(token)
            cache = getattr(output, "past_key_values", None)  # some architectures keep none
            options |= {name: cache} if cache is not None else {}
            new = [token] if cache is not None else ids + answer
    finally:
        model.train(was_training)
    return answer
