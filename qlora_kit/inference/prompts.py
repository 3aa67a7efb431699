"""Prompts from flags, files, standard input; their tokens as the adapter was trained on them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from qlora_kit.data.apply_template import OTHER_TEMPLATE, Message
from qlora_kit.data.encoding import encode_text
from qlora_kit.data.rendering import Piece, Rendering, TrainOn, render_prompt
from qlora_kit.data.tokenizing import encode_records
from qlora_kit.errors import BadRecord, UserError
from qlora_kit.shipped import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_FILE = 2**26  # bytes of prompts
# Beginnings for an adapter trained on running text, the first two in Wikitext's form; requests for one trained on chats or
# instructions.
DEMO_TEXTS = [
    " = Lighthouse = \n \n A lighthouse is",
    " = River = \n \n A river is a",
    "The history of the city begins",
    "In the spring of that year",
]
DEMO_REQUESTS = [
    "What is a river?",
    "Name three colors.",
    "How do I find the length of a list in Python?",
    "Write one sentence about the sea.",
]


class Prompt(NamedTuple):
    """A prompt, the flag and value that name it in messages, and its token ids, which encode_prompts fills in."""

    text: str
    flag: str = "--prompt"
    value: str | None = None
    ids: tuple[int, ...] = ()


def demo_prompts(style: str) -> list[Prompt]:
    """Return the prompts of --mode demo that fit an adapter of this style."""
    return [Prompt(text, "--mode", f"demo, prompt {text!r}") for text in (DEMO_TEXTS if style == "text" else DEMO_REQUESTS)]


def read_prompt(text: str) -> Prompt:
    """Return the flag's text as a prompt; `-` reads all of standard input, without the line end that `echo` appends.

    Raises:
        UserError: the prompt is empty or not UTF-8.
    """
    if text == "-":
        text = _read_standard_input("--prompt").removesuffix("\n")
    if not text:
        raise _empty_prompt("--prompt", None)
    return Prompt(_check_utf8(text, "--prompt", None))


def read_prompt_file(name: str) -> list[Prompt]:
    """Read one prompt a line and skip blank lines; `-` is standard input.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has no prompt.
    """
    flag = "--prompt_file"
    if name == "-":
        text = _read_standard_input(flag)
    else:
        remedy = "use a text file with one prompt a line, or - for standard input"
        try:
            with open(os.path.expanduser(locate(name)), "rb") as file:  # which may be a pipe
                content = file.read(LARGEST_FILE + 1)
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise UserError(flag, name, f"is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8") from None
        except (OSError, ValueError) as error:
            raise UserError(flag, name, f"cannot be read ({getattr(error, 'strerror', None) or error})", remedy) from None
        if len(content) > LARGEST_FILE:
            raise UserError(flag, name, f"holds more than {LARGEST_FILE:,} bytes", "divide it")
    lines = enumerate(_check_utf8(text, flag, name).split("\n"), 1)
    prompts = [Prompt(line, flag, f"{name}, line {number}") for number, line in lines if line.strip()]
    if not prompts:
        raise UserError(flag, name, "has no prompt", "write one a line")
    return prompts


def _read_standard_input(flag: str) -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(flag, "-", f"standard input is not UTF-8 ({error.reason})", "convert it") from None


def _check_utf8(text: str, flag: str, value: str | None) -> str:
    """Refuse lone surrogates, as which Python keeps bytes that are not UTF-8: no tokenizer takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(flag, value, "is not UTF-8", "convert it") from None
    return text


def _empty_prompt(flag: str, value: str | None) -> UserError:
    return UserError(flag, value, "is empty", "give it some text")


def format_instruction(prompt: str) -> str:
    """Return a prompt as instructions are trained, up to the answer."""
    return f"### Instruction:\n{prompt}\n\n### Response:\n"


@dataclass(frozen=True)
class PromptEncoder:
    """Turn prompts into the token ids that training would have produced up to the answer.

    Attributes:
        style: text, chat or instruction: the form of the adapter's training data.
        stop_ids: tokens that end an answer.
        train_on: which answers of a chat were trained.
        system: the system message of a chat; None for none.
    """

    tokenizer: "PreTrainedTokenizerBase"
    style: str = "text"
    stop_ids: list[int] = field(default_factory=list)
    train_on: TrainOn = "assistant"
    system: str | None = None

    def encode(self, prompt: str, flag: str = "--prompt", value: str | None = None) -> list[int]:
        """Return the ids of one prompt in the adapter's style.

        Args:
            flag, value: name the prompt in messages.

        Raises:
            UserError: the prompt has no tokens, or the chat template refuses it.
        """
        if self.style == "chat":
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            try:
                return self.encode_chat([*system, {"role": "user", "content": prompt}])
            except BadRecord as error:
                if system:
                    raise UserError("--system", None, str(error), "leave it out") from None
                raise UserError(flag, value, str(error), "change the prompt") from None
        ids = self._encode_instruction(prompt) if self.style == "instruction" else encode_text(prompt, self.tokenizer)
        if not ids or not prompt:
            raise _empty_prompt(flag, value)
        return ids

    def _encode_instruction(self, prompt: str) -> list[int]:
        return self._encode(Rendering([Piece(format_instruction(prompt), trained=False)], is_plain=True))

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Return the ids of a conversation whose last turn is the user's.

        Raises:
            BadRecord: the chat template refuses the turns, or writes nothing of them.
        """
        if ids := self._encode(render_prompt(messages, self.tokenizer, self.train_on)):
            return ids
        raise BadRecord("the chat template writes nothing of the turns", OTHER_TEMPLATE)

    def _encode(self, rendering: Rendering) -> list[int]:
        return encode_records([rendering], self.tokenizer)[0].ids.tolist()


def encode_prompts(prompts: list[Prompt], encoder: PromptEncoder, new_tokens: int, context: int | None) -> list[Prompt]:
    """Return the prompts with their ids.

    Raises:
        UserError: a prompt is empty, or leaves no room for `new_tokens` in the model's context.
    """
    encoded = [prompt._replace(ids=tuple(encoder.encode(prompt.text, prompt.flag, prompt.value))) for prompt in prompts]
    for prompt in encoded:
        check_context(prompt.ids, new_tokens, context, prompt.flag, prompt.value)
    return encoded


def check_context(
    ids: Sequence[int], new_tokens: int, context: int | None, flag: str = "--prompt", value: str | None = None
) -> None:
    """Check that a prompt and its answer fit in the model's context.

    Args:
        context: tokens at most; None where the model states no limit.

    Raises:
        UserError: prompt and answer exceed the context.
    """
    if context and len(ids) + new_tokens > context:
        problem = f"{len(ids)} tokens and {new_tokens} new tokens exceed the model's context of {context}"
        raise UserError(flag, value, problem, "shorten the prompt, or use a smaller --max_new_tokens")
