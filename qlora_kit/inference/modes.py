"""--mode text, demo and interactive.

Standard output holds answers only; messages about them go to standard error. A line that holds only a form feed separates two
plain answers.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from qlora_kit import cli
from qlora_kit.adapter.attach import adapter_norm
from qlora_kit.inference.conversation import COMPLETIONS, Conversation
from qlora_kit.inference.generator import Generated, Generator
from qlora_kit.inference.prompts import Prompt
from qlora_kit.inference.terminal import VISIBLE_CONTROLS, Terminal, format_json, make_printable
from qlora_kit.wrapping import NARROW, fit, say

SEPARATOR = "\f\n"  # between two answers: no text holds such a line in practice
FIRST_LINES = {
    "chat": "Chat: the whole conversation is sent with each message.",
    "text": "Text: the adapter continues each input; earlier inputs are not sent.",
    "instruction": "Instructions: the adapter follows each input; earlier inputs are not sent.",
}


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with its answer, and with the base model's where that was asked too."""

    prompt: str
    seed: int
    answer: Generated
    base: Generated | None

    def as_object(self) -> dict[str, Any]:
        """Return the object of a line of --json: the answer, and under `base` the base model's."""
        base = {} if self.base is None else {"base": _fields(self.base)}
        return {"prompt": self.prompt, **_fields(self.answer), "seed": self.seed, **base}


def _fields(answer: Generated) -> dict[str, Any]:
    return {"text": answer.text, "tokens": answer.tokens, "stop": answer.stop, "seconds": round(answer.seconds, 4)}


class Printer(ABC):
    """Print answered prompts on standard output, and notes about them on standard error."""

    @abstractmethod
    def print_answer(self, answered: AnsweredPrompt) -> None: ...

    def print_note(self, line: str) -> None:
        say(line)


class JsonPrinter(Printer):
    """Print one object a line."""

    def print_answer(self, answered: AnsweredPrompt) -> None:
        print(format_json(answered.as_object()), flush=True)


class TextPrinter(Printer):
    """Print the answers alone; where the base model answered too, both answers under their names."""

    separator = ""

    def print_answer(self, answered: AnsweredPrompt) -> None:
        printable = make_printable(answered.answer.text if answered.base is None else format_rows(answered))
        print(printable if answered.base else self.separator + printable, flush=True)
        self.separator = SEPARATOR


class DemoPrinter(Printer):
    """Print prompts with their answers: in columns on a terminal that is wide enough, else one below the other; notes as well.

    Args:
        name: of the model that gave `answer`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.console = name, cli.results_console()

    def print_answer(self, answered: AnsweredPrompt) -> None:
        if answered.base is not None and self.console.is_terminal and self.console.width >= NARROW:
            self.console.print(format_columns(answered, answered.base))
        else:
            print(fit(make_printable(format_rows(answered, self.name)), sys.stdout), flush=True)

    def print_note(self, line: str) -> None:
        say(line, sys.stdout)


def choose_printer(mode: str | None, as_json: bool, base_only: bool) -> Printer:
    """Return the printer of --mode text or demo.

    Args:
        base_only: the base model gives all answers.
    """
    if as_json:
        return JsonPrinter()
    return DemoPrinter("base" if base_only else "adapter") if mode == "demo" else TextPrinter()


def run_text(generator: Generator, prompts: list[Prompt], batch_size: int, compare: bool, printer: Printer) -> None:
    """Print the answers to encoded prompts in their order, each as soon as its batch is done.

    Args:
        batch_size: prompts that are answered at once.
        compare: answer with the base model, too.
    """
    same = compare
    for answered in answer_prompts(generator, prompts, batch_size, compare):
        same = same and answered.base is not None and answered.base.text == answered.answer.text
        printer.print_answer(answered)
    if same:
        answers = "the answer is" if len(prompts) == 1 else f"all {len(prompts)} answers are"
        say(f"The adapter does nothing here: {answers} the base model's.")


def run_demo(generator: Generator, prompts: list[Prompt], printer: Printer) -> None:
    """Print the answers with the adapter and without, then the adapter's norm; without an adapter, the base model's answers."""
    has_adapter = generator.fixed != "--base_only"
    run_text(generator, prompts, 1, has_adapter, printer)
    if has_adapter:
        norm, projections = adapter_norm(generator.engine.model)
        printer.print_note(f"Size of the update: {norm:.4g} (Frobenius norm over {projections} projections; 0 = untrained)")


def answer_prompts(generator: Generator, prompts: list[Prompt], batch_size: int, compare: bool) -> Iterator[AnsweredPrompt]:
    """Yield the answers to encoded prompts in their order, `batch_size` at a time.

    With temperature 0 an answer does not depend on the other prompts of its batch. Sampled answers share the random numbers of
    their batch: the same prompts, seed and batch size give the same answers.
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
            yield AnsweredPrompt(prompt.text, generator.seed, answer, base)


def run_interactive(generator: Generator, compare: bool = False, about: Sequence[str] = ()) -> None:
    """Answer inputs from standard input until they end, /exit, or Ctrl+C twice.

    Args:
        compare: follow each answer with the base model's, as /compare does.
        about: lines that say which adapter and base model answer.
    """
    terminal = Terminal(COMPLETIONS)
    conversation = Conversation(generator, terminal, compare, about)
    for line in conversation.describe() if about else []:
        terminal.say(line)
    terminal.say(f"{FIRST_LINES[conversation.style]} /help lists commands, Ctrl+D leaves.")
    interrupted = False
    while True:
        try:
            line = terminal.read()
            interrupted = False
            with terminal.record_interrupts():
                if not conversation.respond(line):
                    return
        except EOFError:
            if terminal.is_typed:
                terminal.say("")
            return
        except KeyboardInterrupt:
            if not terminal.is_typed:
                raise
            if interrupted and not terminal.has_unfinished_line():
                terminal.say("")
                return
            interrupted = not terminal.has_unfinished_line()
            terminal.say("\nCtrl+C again leaves, as /exit and Ctrl+D do." if interrupted else "")


def format_rows(answered: AnsweredPrompt, name: str = "adapter") -> str:
    """Return a prompt and its answers one below the other; `name` is the model that gave `answer`."""
    answers = [("base", answered.base), (name, answered.answer)]
    blocks = [f"--- {model}, {_describe_speed(answer)}\n{answer.text}" for model, answer in answers if answer is not None]
    return "\n".join([f"--- prompt: {answered.prompt!r}", *blocks, ""])


def format_columns(answered: AnsweredPrompt, base: Generated) -> Table:
    """Return a prompt as the title of a table with a column for each answer."""
    title = Text(answered.prompt.strip().translate(VISIBLE_CONTROLS))
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", expand=True, show_footer=True)
    for model, answer in (("base", base), ("adapter", answered.answer)):
        table.add_column(model, footer=_describe_speed(answer), ratio=1, overflow="fold")
    table.add_row(*(Text(answer.text.translate(VISIBLE_CONTROLS)) for answer in (base, answered.answer)))
    return table


def _describe_speed(answer: Generated) -> str:
    return f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s"
