"""Prompts -> answers of the adapter, and of the base model beside them, as text, in columns or as JSON lines.

Standard output holds answers only; what is said about them goes to standard error. Several plain answers have a line between them
that holds nothing but a form feed.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from qlora_kit import cli
from qlora_kit.inference.generator import Generated, Generator, PromptEncoder, check_context
from qlora_kit.inference.prompts import Prompt
from qlora_kit.inference.terminal import HARMLESS, shown

CONTROL = re.compile(r"[\x7f-\x9f]")
BETWEEN = "\f"  # the line between two answers: no text holds one in practice


@dataclass(frozen=True)
class Answered:
    prompt: str
    seed: int
    answer: Generated
    base: Generated | None  # the base model's, where it was asked too

    def as_object(self) -> dict[str, Any]:
        """A line of --json: the answer, and under `base` the base model's."""
        base = {} if self.base is None else {"base": _fields(self.base)}
        return {"prompt": self.prompt, **_fields(self.answer), "seed": self.seed, **base}


def _fields(answer: Generated) -> dict[str, Any]:
    return {"text": answer.text, "tokens": answer.tokens, "stop": answer.stop, "seconds": round(answer.seconds, 4)}


def encode_prompts(prompts: list[Prompt], encoder: PromptEncoder, new_tokens: int, context: int | None) -> list[Prompt]:
    """The same prompts with their ids.

    Raises:
        UserError: one is empty, or too long for an answer of `new_tokens` to fit into the context behind it.
    """
    encoded = [prompt._replace(ids=tuple(encoder.encode(prompt.text, prompt.place))) for prompt in prompts]
    for prompt in encoded:
        check_context(prompt.ids, new_tokens, context, prompt.place)
    return encoded


def answer_prompts(generator: Generator, prompts: list[Prompt], batch_size: int, compare: bool) -> Iterator[Answered]:
    """Answers to encoded prompts in their order, `batch_size` at a time.

    With temperature 0 an answer does not depend on the prompts beside it. Sampled ones share the random numbers of their batch:
    the same prompts, seed and batch size give the same answers.
    """
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids = [list(prompt.ids) for prompt in batch]
        answers = generator.complete(ids)
        bases: list[Generated | None] = [None] * len(ids)
        if compare:
            with generator.adapter_off():
                bases = list(generator.complete(ids))
        for prompt, answer, base in zip(batch, answers, bases, strict=True):
            yield Answered(prompt.text, generator.seed, answer, base)


def run_text(generator: Generator, prompts: list[Prompt], batch_size: int, compare: bool, as_json: bool) -> None:
    """Print one answer after the other, each as soon as its batch is done."""
    same = True
    for number, answered in enumerate(answer_prompts(generator, prompts, batch_size, compare)):
        same = same and answered.base is not None and answered.base.text == answered.answer.text
        if as_json:
            lines = as_line(answered.as_object())
        elif answered.base is not None:
            lines = shown(beside_each_other(answered))
        else:
            lines = f"{BETWEEN}\n" * bool(number) + shown(answered.answer.text)
        print(lines, flush=True)
    if compare and same:
        say_same(len(prompts))


def run_demo(generator: Generator, prompts: list[Prompt], compare: bool, as_json: bool) -> None:
    """Print one prompt after the other with its answers, in columns on a terminal; without `compare` the base model's alone."""
    if as_json:
        return run_text(generator, prompts, 1, compare, as_json)
    console = cli.results_console()
    same = True
    for answered in answer_prompts(generator, prompts, 1, compare):
        same = same and answered.base is not None and answered.base.text == answered.answer.text
        if answered.base is not None and console.is_terminal:
            console.print(columns(answered))
        else:
            print(shown(beside_each_other(answered, "adapter" if compare else "base")), flush=True)
    if compare and same:
        say_same(len(prompts))


def as_line(values: dict[str, Any]) -> str:
    """JSON in one line that a terminal obeys nowhere: json leaves the characters from 7F to 9F as they are."""
    return CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", json.dumps(values, ensure_ascii=False))


def say_same(count: int) -> None:
    which = "the answer is" if count == 1 else f"all {count} answers are"
    print(f"The adapter does nothing here: {which} the base model's.", file=sys.stderr)


def beside_each_other(answered: Answered, who: str = "adapter") -> str:
    """Prompt and answers one below the other, for pipes and files."""
    answers = [("base", answered.base), (who, answered.answer)]
    blocks = [f"--- {name}, {_speed(answer)}\n{answer.text}" for name, answer in answers if answer is not None]
    return "\n".join([f"--- prompt: {answered.prompt!r}", *blocks, ""])


def columns(answered: Answered) -> Table:
    title = Text(answered.prompt.strip().translate(HARMLESS))
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", expand=True)
    assert answered.base is not None
    for name, answer in (("base", answered.base), ("adapter", answered.answer)):
        table.add_column(name, footer=_speed(answer), ratio=1, overflow="fold")
    table.show_footer = True
    table.add_row(*(Text(answer.text.translate(HARMLESS)) for answer in (answered.base, answered.answer)))
    return table


def _speed(answer: Generated) -> str:
    return f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s"
