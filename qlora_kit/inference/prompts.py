"""Prompts from a flag, a file or standard input, each with the place that a message about it names; and those of the demo."""

import sys
from pathlib import Path
from typing import NamedTuple

from qlora_kit.errors import UserError

# Beginnings for an adapter of running text, the first two in Wikitext's form; requests for one of chats or instructions.
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
    text: str
    place: str = "--prompt"  # for messages
    ids: tuple[int, ...] = ()  # as the adapter's own style gives it to the model; empty until then


def demo_prompts(style: str) -> list[Prompt]:
    return [Prompt(text, f"prompt of the demo {text!r}") for text in (DEMO_TEXTS if style == "text" else DEMO_REQUESTS)]


def read_prompt(text: str) -> Prompt:
    """The flag's own text, or all of standard input for `-`, without the line end that `echo` puts behind it.

    Raises:
        UserError: it is empty, or not UTF-8.
    """
    if text == "-":
        text = _standard_input("--prompt -").removesuffix("\n")
    if not text:
        raise UserError("--prompt: the prompt is empty; give it some text")
    return Prompt(_checked(text, "--prompt"))


def read_prompt_file(name: str) -> list[Prompt]:
    """One prompt a line; lines of nothing but spaces are left out. `-` is standard input.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds no prompt.
    """
    key = f"--prompt_file {name}"
    if name == "-":
        text = _standard_input(key)
    else:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8-sig")
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            raise UserError(f"{key}: {reason}; name a text file with one prompt a line, or - for standard input") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{key}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    lines = enumerate(_checked(text, key).split("\n"), 1)
    prompts = [Prompt(line, f"{key}, line {number}") for number, line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{key}: holds no prompt; write one a line")
    return prompts


def _standard_input(key: str) -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: standard input is not UTF-8 text ({error.reason}); convert it") from None


def _checked(text: str, key: str) -> str:
    """Python keeps bytes that are no UTF-8 as lone surrogates; no tokenizer takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{key}: not UTF-8 text; convert it") from None
    return text
