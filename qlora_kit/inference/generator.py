"""Prompts -> tokens -> text.

An engine (library_engine.py, graph_engine.py) turns token ids into token ids. The Generator turns prompts into its input, and its
output into text: which part of an answer can be printed already, and why the answer ended.
"""

import time
from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.config import Config, GenerationSettings
from qlora_kit.config_file import override
from qlora_kit.errors import Problem, UserError
from qlora_kit.inference.prompts import PromptEncoder, check_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stop = Literal["end", "length", "interrupted"]
FixedAdapter = Literal["--merged", "--base_only"]  # the flag after which the adapter cannot be switched off, or on


class Engine(ABC):
    """Turn prompts into tokens, one step of all prompts at a time."""

    model: Any  # with or without PEFT around it; losses and the adapter's norm are computed from it

    @property
    def context(self) -> int | None:
        """The most tokens of prompt and answer together; None if the model states no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @abstractmethod
    def steps(
        self, prompts: list[list[int]], settings: GenerationSettings, seed: int, stop_ids: list[int]
    ) -> abc.Generator[list[int]]:
        """Yield the next token of each prompt's answer, for at most `settings.max_new_tokens` steps.

        The same prompts, settings and seed give the same tokens. An answer ends with one of `stop_ids`: what comes after means
        nothing. Closing the generator stops the decoding.
        """

    def adapter_off(self) -> AbstractContextManager:
        """Switch the adapter off while the context lasts."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        text: without the prompt and without the token that ended it.
        tokens: their number, with the one that ended it.
        seconds: from the start of the prompt to the last token.
        stop: "end" after a stop token, "length" after max_new_tokens, "interrupted" when the reader stopped.
    """

    text: str
    tokens: int
    seconds: float
    stop: Stop

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def replace_settings(settings: GenerationSettings, changes: Mapping[str, Any], prefix: str) -> GenerationSettings:
    """Return the settings with some keys of `generation` changed.

    Args:
        prefix: stands before a key in messages: `--`, `/set ` or `generation.`.

    Raises:
        UserError: keys are unknown or values wrong: one problem for each.
    """

    def with_prefix(problem: Problem) -> Problem:
        key = problem.key.removeprefix("generation.")
        known = key in GenerationSettings.model_fields
        remedy = f"use another value, or keep {getattr(settings, key)}" if known else problem.remedy
        return replace(problem, key=prefix + key, remedy=remedy, place="")

    try:
        return override(Config(generation=settings), {f"generation.{key}": value for key, value in changes.items()}).generation
    except UserError as error:
        raise UserError.of(map(with_prefix, error.problems)) from None


class Generator:
    """Answer prompts.

        generator.answer("The river").text
        for piece in generator.stream(generator.encode("The river")):
            print(piece, end="", flush=True)

    Attributes:
        settings, seed: of the next answers; may be replaced. The same prompts, settings and seed give the same answers.
        fixed: the flag that keeps the adapter on, or off, for good; None while adapter_off can switch it.
        last: the answer that `stream` gave last.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: PromptEncoder,
        settings: GenerationSettings,
        seed: int = 42,
        fixed: FixedAdapter | None = None,
    ):
        self.engine, self.encoder, self.settings, self.seed, self.fixed = engine, encoder, settings, seed, fixed
        self.last: Generated | None = None

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt in the adapter's style; raises UserError where it has none."""
        return self.encoder.encode(prompt)

    def answer(self, prompt: str) -> Generated:
        """Answer one prompt.

        Raises:
            UserError: the prompt is empty, or too long for the model's context.
        """
        return self.complete([self.encode(prompt)])[0]

    def stream(self, ids: list[int], settings: GenerationSettings | None = None, seed: int | None = None) -> abc.Generator[str]:
        """Yield the answer in pieces, one a token, empty while a character is incomplete; then set `last`.

        Args:
            settings, seed: for this answer alone; None takes the generator's own.

        Raises:
            UserError: prompt and answer exceed the model's context.
        """
        settings = settings or self.settings
        check_context(ids, settings.max_new_tokens, self.engine.context)
        stop_ids = self.encoder.stop_ids
        answer = _Answer(self.encoder.tokenizer, stop_ids)
        try:
            with closing(self.engine.steps([ids], settings, self.seed if seed is None else seed, stop_ids)) as steps:
                for (token,) in steps:
                    yield answer.add(token)
                    if answer.ended:
                        break
            if rest := answer.finish():
                yield rest
        finally:
            self.last = answer.result(settings.max_new_tokens)

    def complete(self, prompts: list[list[int]]) -> list[Generated]:
        """Return the whole answers to several prompts, computed as one batch.

        Raises:
            UserError: a prompt and its answer exceed the model's context.
        """
        for ids in prompts:
            check_context(ids, self.settings.max_new_tokens, self.engine.context)
        stop_ids = self.encoder.stop_ids
        answers = [_Answer(self.encoder.tokenizer, stop_ids) for _ in prompts]
        with closing(self.engine.steps(prompts, self.settings, self.seed, stop_ids)) as steps:
            for tokens in steps:
                for answer, token in zip(answers, tokens, strict=True):
                    answer.add(token)
                if all(answer.ended for answer in answers):
                    break
        return [answer.result(self.settings.max_new_tokens) for answer in answers]

    def adapter_off(self) -> AbstractContextManager:
        """Answer with the base model alone while the context lasts."""
        return self.engine.adapter_off()


class _Answer:
    """Decode the tokens of one answer as they arrive.

    A character may take several tokens, and the text of a token may depend on the token before it. So each piece is decoded
    together with the piece before it, and printed once its last character is complete.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_ids: list[int]):
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.ids: list[int] = []
        self.text = ""
        self.printed = self.context = 0  # ids whose text was returned; the first id that is decoded again with the next piece
        self.started = self.latest = time.perf_counter()
        self.ended = False

    def add(self, token: int) -> str:
        """Return the text that is complete with this token; nothing after the end."""
        if self.ended:
            return ""
        self.latest = time.perf_counter()
        self.ids.append(token)
        self.ended = token in self.stop_ids
        return self._next_piece(final=False)

    def finish(self) -> str:
        """Return the remaining text, without an incomplete character at its end."""
        return self._next_piece(final=True)

    def _next_piece(self, final: bool) -> str:
        before, now = self._decode(self.ids[self.context : self.printed]), self._decode(self.ids[self.context :])
        if final:
            now = now.rstrip("\ufffd")
        elif now.endswith("\ufffd"):
            return ""
        self.context, self.printed = self.printed, len(self.ids)
        piece = now[len(before) :]
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def result(self, max_new_tokens: int) -> Generated:
        self.finish()
        stop: Stop = "end" if self.ended else "length" if len(self.ids) >= max_new_tokens else "interrupted"
        return Generated(self.text, len(self.ids), self.latest - self.started, stop)
