"""Prompts as people write them -> tokens for an engine -> text, streamed or whole.

An engine (decoding.py, fast/decode.py) turns token ids into token ids; here are the words: how a prompt is given to an adapter of
running text, of chats or of instructions, what of an answer can be printed already, and why it ended.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qlora_kit.config import Config, GenerationSettings
from qlora_kit.config_file import override
from qlora_kit.data.chat_template import Message
from qlora_kit.data.formats import TrainOn, prompt_pieces
from qlora_kit.data.tokenizing import encode
from qlora_kit.errors import BadRecord, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Engine(Protocol):
    """What turns prompts into tokens; decoding.LibraryEngine says what each member does."""

    model: Any  # for what needs more than tokens: losses, the adapter's norm

    @property
    def context(self) -> int | None: ...
    def steps(
        self, prompts: list[list[int]], settings: GenerationSettings, seed: int, stop_ids: list[int]
    ) -> Iterator[list[int | None]]: ...
    def adapter_off(self) -> AbstractContextManager: ...


@dataclass(frozen=True)
class Generated:
    text: str  # the answer alone
    tokens: int
    seconds: float
    stop: Literal["end", "length", "interrupted"]  # it ended itself, took all of max_new_tokens, or nobody listened any more

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def replace_settings(settings: GenerationSettings, given: dict[str, str], called: str, otherwise: str) -> GenerationSettings:
    """Settings with some values replaced by what was typed.

    Args:
        called: what stands before a key in messages.
        otherwise: what its value without the mistake is introduced by; the general default is none here.

    Raises:
        UserError: values that cannot be: one problem for each.
    """
    try:
        return override(Config(generation=settings), {f"generation.{key}": value for key, value in given.items()}).generation
    except UserError as error:
        told = []
        for problem in error.lines:
            key, _, what = problem.removeprefix("command line: generation.").partition(": ")
            told.append(f"{called}{key}: {what.rpartition('; ')[0]}; {otherwise} {getattr(settings, key)}")
        raise UserError(*told) from None


def check_context(ids: Sequence[int], new_tokens: int, room: int | None, place: str) -> None:
    """
    Args:
        room: the model's context; None where it is not known.
        place: where the prompt comes from.

    Raises:
        UserError: prompt and answer exceed the context.
    """
    if room and len(ids) + new_tokens > room:
        raise UserError(
            f"{place}: {len(ids)} tokens and {new_tokens} new ones exceed the model's context "
            f"of {room}; shorten the prompt or use a smaller --max_new_tokens"
        )


class PromptEncoder:
    """How a prompt is given to an adapter: as training gave it.

    Args:
        style: text, chat or instruction.
        system: stands before a prompt in the chat style.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", style: str, train_on: TrainOn = "assistant", system: str | None = None
    ):
        self.tokenizer, self.style, self.train_on, self.system = tokenizer, style, train_on, system

    def encode(self, prompt: str, place: str = "--prompt") -> list[int]:
        """Ids of one prompt in the adapter's own style.

        Args:
            place: where the prompt comes from.

        Raises:
            UserError: it has no tokens.
        """
        if self.style == "chat":
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            try:
                return self.encode_chat([*system, {"role": "user", "content": prompt}])
            except BadRecord as error:
                raise UserError(f"{'--system' if system else place}: {error}") from None
        text = f"### Instruction:\n{prompt}\n\n### Response:\n" if self.style == "instruction" else prompt
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or not prompt:
            raise UserError(f"{place}: the prompt is empty; give it some text")
        return ids

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation that waits for an answer: those that training gave it, up to that answer.

        Raises:
            BadRecord: the chat template refuses the turns.
        """
        return encode([prompt_pieces(messages, self.tokenizer, self.train_on)], self.tokenizer)[0].ids.tolist()


class Generator(PromptEncoder):
    """An engine, its tokenizer and the settings of its answers, which may be replaced between them.

    Args:
        fixed: the flag that leaves the adapter on, or off, for good; None where it can be switched.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: "PreTrainedTokenizerBase",
        settings: GenerationSettings,
        stop_ids: list[int],
        seed: int,
        style: str = "text",
        train_on: TrainOn = "assistant",
        system: str | None = None,
        fixed: str | None = None,
    ):
        super().__init__(tokenizer, style, train_on, system)
        self.engine, self.settings, self.stop_ids, self.seed = engine, settings, stop_ids, seed
        self.fixed = fixed
        self.last: Generated | None = None  # what `stream` gave

    def stream(self, ids: list[int]) -> Iterator[str]:
        """The answer a piece a token, empty while a character is half there; `last` then says how it went."""
        check_context(ids, self.settings.max_new_tokens, self.engine.context, "--prompt")
        answer = _Answer(self.tokenizer, self.stop_ids)
        steps = self.engine.steps([ids], self.settings, self.seed, self.stop_ids)
        try:
            for (token,) in steps:
                if token is not None:
                    yield answer.add(token)
            if rest := answer.rest():
                yield rest
        finally:
            steps.close()  # type: ignore[attr-defined]
            self.last = answer.result(self.settings.max_new_tokens)

    def complete(self, prompts: list[list[int]]) -> list[Generated]:
        """Whole answers to several prompts at once."""
        for ids in prompts:
            check_context(ids, self.settings.max_new_tokens, self.engine.context, "--prompt")
        answers = [_Answer(self.tokenizer, self.stop_ids) for _ in prompts]
        for step in self.engine.steps(prompts, self.settings, self.seed, self.stop_ids):
            for answer, token in zip(answers, step, strict=True):
                if token is not None:
                    answer.add(token)
        return [answer.result(self.settings.max_new_tokens) for answer in answers]

    def adapter_off(self) -> AbstractContextManager:
        """The base model alone, while the context lasts."""
        return self.engine.adapter_off()


class _Answer:
    """Tokens of one answer as text.

    A character may take several tokens, and what a token says may depend on the one before it: each piece is what the text gained
    since the last whole character, seen from a token back.
    """

    def __init__(self, tokenizer: Any, stop_ids: list[int]):
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.ids: list[int] = []
        self.text = ""
        self.shown = self.context = 0  # ids whose text was given; where the ids begin by which it is seen
        self.started = self.latest = time.perf_counter()
        self.ended = False

    def add(self, token: int) -> str:
        """The text that can be shown now."""
        self.latest = time.perf_counter()
        self.ids.append(token)
        self.ended = token in self.stop_ids
        return self._gained(final=False)

    def rest(self) -> str:
        return self._gained(final=True)

    def _gained(self, final: bool) -> str:
        before, now = self._decode(self.ids[self.context : self.shown]), self._decode(self.ids[self.context :])
        if final:
            now = now.rstrip("\ufffd")  # half a character, where the answer was cut
        elif now.endswith("\ufffd"):
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        self.text += (piece := now[len(before) :])
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def result(self, most: int) -> Generated:
        stop: Any = "end" if self.ended else "length" if len(self.ids) >= most else "interrupted"
        self.rest()
        return Generated(self.text, len(self.ids), self.latest - self.started, stop)
