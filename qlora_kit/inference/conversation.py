"""Turns and /commands of a conversation.

An adapter trained on chats gets the whole conversation with each input. An adapter trained on running text or instructions
gets each input alone, because it saw no earlier turns in training.
"""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from qlora_kit.config import GenerationSettings
from qlora_kit.data.chat_template import Message
from qlora_kit.data.formats import require_text
from qlora_kit.errors import BadRecord, UserError, closest, did_you_mean
from qlora_kit.inference.generator import Generated, Generator, replace_settings
from qlora_kit.inference.prompts import format_instruction
from qlora_kit.inference.terminal import Terminal

COMMANDS = {  # name: (its argument, what it does)
    "/help": ("", "list the commands"),
    "/reset": ("", "forget the conversation; keep the system message"),
    "/system": ("[TEXT]", "set the system message; without TEXT, remove it"),
    "/set": ("[KEY VALUE]", "such as /set temperature 0.8; alone, show all"),
    "/show": ("", "which adapter answers, with which settings"),
    "/retry": ("", "answer the last input again, with another seed"),
    "/undo": ("", "remove the last input and its answer"),
    "/compare": ("", "answer again without the adapter, same seed"),
    "/save": ("FILE", "write the conversation to a new .jsonl file to train on"),
    "/exit": ("", "leave, as Ctrl+D does"),
}
COMPLETIONS = [*COMMANDS, *(f"/set {key} " for key in GenerationSettings.model_fields)]  # by the Tab key
OTHER_NAMES = {"/quit": "/exit", "/bye": "/exit", "/q": "/exit", "/clear": "/reset", "/?": "/help", "/h": "/help"}
TYPING_HELP = (
    "Tab completes a command. A line that ends with \\ continues on the next. A space before / makes it text.\n"
    "Ctrl+C stops an answer; at an empty prompt, twice leaves."
)


@dataclass(frozen=True)
class Round:
    """An input and its answer, with all that is needed to answer it again."""

    prompt: str
    ids: list[int]
    settings: GenerationSettings
    seed: int
    answer: str
    was_cut: bool  # by Ctrl+C or at max_new_tokens
    system: str  # the system message under which it was answered; empty for none

    @property
    def is_complete(self) -> bool:
        """Return whether training can learn the answer: it has words and its own end."""
        return bool(self.answer.strip()) and not self.was_cut


def build_messages(rounds: list[Round], system: str, untrained: int = 0) -> list[Message]:
    """Return the turns of rounds whose answers have words, which are all that training accepts.

    Args:
        untrained: answers of that many first rounds are context only.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for number, one in enumerate(rounds):
        if one.answer.strip():
            answer = {"role": "assistant", "content": one.answer} | ({"weight": 0} if number < untrained else {})
            messages += [{"role": "user", "content": one.prompt}, answer]
    return messages


def build_records(rounds: list[Round], style: str) -> list[dict[str, Any]]:
    """Return complete rounds as records to train on, in the form that an adapter of this style is trained in.

    A chat is one record. Where its system message was replaced, a record begins that has the new one before all rounds up to the
    next replacement, as the model got them, and trains the answers that were given under it.
    """
    if style == "text":
        return [{"prompt": one.prompt, "completion": one.answer} for one in rounds]
    if style == "instruction":
        return [{"text": format_instruction(one.prompt) + one.answer} for one in rounds]
    records, done = [], 0
    for system, group in groupby(rounds, key=lambda one: one.system):
        end = done + len(list(group))
        records.append({"messages": build_messages(rounds[:end], system, untrained=done)})
        done = end
    return records


class Conversation:
    """Answer inputs, run commands, and remember the rounds.

    Args:
        compare: follow each answer with the base model's, as /compare does.
        about: lines that say which adapter and base model answer, for /show.
    """

    def __init__(self, generator: Generator, terminal: Terminal, compare: bool, about: Sequence[str] = ()):
        self.generator, self.terminal, self.compare, self.about = generator, terminal, compare, about
        self.doubted = ""  # a word that may have been meant to leave
        self.style = generator.encoder.style
        self.system = generator.encoder.system or ""
        self.rounds: list[Round] = []

    def respond(self, line: str) -> bool:
        """Answer an input or run a command; return whether the conversation continues."""
        if not line.strip():
            return True
        if self.terminal.is_typed and line.strip().lower() in ("exit", "quit", "bye") and line != self.doubted:
            self.doubted = line
            self.terminal.say("Leave? Then type /exit. To send the word, type it again.")
            return True
        try:
            if line.startswith("/"):
                return self._run_command(line)
            self._ask(require_text(line, "the input"), self.generator.seed, self.rounds)
        except (UserError, BadRecord) as error:
            self.terminal.say(f"error: {error}")
        except torch.OutOfMemoryError:
            self.terminal.say("error: the GPU's memory is full. Shorten the conversation with /undo or /reset.")
        return True

    def _ask(self, prompt: str, seed: int, earlier: list[Round]) -> None:
        ids = self._encode(prompt, earlier)
        self._check_context(ids)
        settings = self.generator.settings
        if self.compare:
            self.terminal.say_dimly("with the adapter:")
        answer, result = self._answer(ids, settings, seed)
        self.rounds = [*earlier, Round(prompt, ids, settings, seed, answer, result.stop != "end", self.system)]
        notes = [f"seed {seed}"] if seed != self.generator.seed else []
        if not answer.strip():
            notes.append("no words: left out of the conversation")
        self._say_summary(result, len(ids), notes)
        if self.compare and result.stop != "interrupted":
            self._compare()

    def _encode(self, prompt: str, earlier: list[Round]) -> list[int]:
        if self.style != "chat":
            return self.generator.encode(prompt)
        turns = [*build_messages(earlier, self.system), {"role": "user", "content": prompt}]
        return self.generator.encoder.encode_chat(turns)

    def _check_context(self, ids: list[int]) -> None:
        context, new_tokens = self.generator.engine.context, self.generator.settings.max_new_tokens
        if not context or len(ids) + new_tokens <= context:
            return
        shorter = "/undo or /reset" if self.style == "chat" and self.rounds else "a shorter input"
        fewer = f"/set max_new_tokens {context - len(ids)}"
        remedies = [shorter] * (new_tokens < context) + [fewer] * (len(ids) < context)
        problem = f"{len(ids):,} tokens and {new_tokens:,} new tokens exceed the model's context of {context:,}"
        raise UserError("input", None, problem, f"use {', or '.join(remedies or [shorter])}")

    def _answer(self, ids: list[int], settings: GenerationSettings, seed: int) -> tuple[str, Generated]:
        """Stream an answer; return the text that was printed, and the answer as generated."""
        printed = []
        try:
            with closing(self.generator.stream(ids, settings, seed)) as stream:
                for piece in stream:
                    printed.append(piece)
                    self.terminal.print_answer(piece)
                    if self.terminal.interrupted:
                        break
        finally:
            self.terminal.print_answer("\n")
        assert self.generator.last is not None
        return "".join(printed), self.generator.last

    def _say_summary(self, result: Generated, prompt_tokens: int, notes: Iterable[str]) -> None:
        context = self.generator.engine.context
        parts = [
            count(result.tokens, "token"),
            *([f"{result.tokens_per_second:,.1f} tokens/s"] if result.seconds else []),
            f"context {prompt_tokens + result.tokens:,}" + (f" of {context:,}" if context else ""),
            *{"length": ["cut at max_new_tokens"], "interrupted": ["cut by Ctrl+C"]}.get(result.stop, []),
            *notes,
        ]
        self.terminal.say_dimly(", ".join(parts))

    def _run_command(self, line: str) -> bool:
        name, given = [*line.split(maxsplit=1), ""][:2]
        name = name.lower()
        given = require_text(given.strip(), name)
        if name not in COMMANDS:
            guess = OTHER_NAMES.get(name) or closest(name, COMMANDS)
            raise UserError(name, None, "is not a command" + did_you_mean(guess), "use /help for the list")
        argument = COMMANDS[name][0]
        if given and not argument:
            raise UserError(name, given, "takes no argument", f"use {name}")
        if not given and argument and not argument.startswith("["):
            raise UserError(name, None, f"needs {argument}", f"use {name} {argument}")
        if name != "/exit":
            getattr(self, f"_{name[1:]}")(*[given] if argument else [])
        return name != "/exit"

    def _show(self) -> None:
        for line in self.describe():
            self.terminal.say(line)

    def describe(self) -> list[str]:
        """Return lines that say who answers, and how."""
        settings = ", ".join(f"{key} {value}" for key, value in self.generator.settings)
        system = [f"System      {self.system}"] if self.system else []
        return [*self.about, f"Settings    {settings}, seed {self.generator.seed}", *system]

    def _reset(self) -> None:
        self.rounds = []
        self.terminal.say_dimly("the conversation is empty")

    def _help(self) -> None:
        for name, (argument, effect) in COMMANDS.items():
            self.terminal.say(f"{name} {argument}".ljust(18) + effect)
        self.terminal.say(TYPING_HELP)

    def _system(self, text: str) -> None:
        if self.style != "chat":
            raise UserError("/system", None, "needs an adapter trained on chats", "put the text into the input")
        before, self.system = self.system, text
        try:
            self._encode("Hi", self.rounds)  # some templates refuse a system message
        except BadRecord:
            self.system = before
            raise
        self.terminal.say_dimly("system message set" if text else "no system message")

    def _set(self, given: str) -> None:
        if given:
            key, value = [*given.split(maxsplit=1), ""][:2]
            if key not in GenerationSettings.model_fields:
                known = GenerationSettings.model_fields
                problem = "is not a setting" + did_you_mean(closest(key, known))
                raise UserError(f"/set {key}", None, problem, f"use one of {', '.join(known)}")
            if not value:
                raise UserError(f"/set {key}", None, "needs a value", f"use /set {key} {getattr(GenerationSettings(), key)}")
            self.generator.settings = replace_settings(self.generator.settings, {key: value}, "/set ")
        self.terminal.say_dimly(", ".join(f"{key} {value}" for key, value in self.generator.settings))

    def _last_round(self, command: str) -> Round:
        if not self.rounds:
            raise UserError(command, None, "needs an answer", "type an input first")
        return self.rounds[-1]

    def _retry(self) -> None:
        last = self._last_round("/retry")
        if self.generator.settings.temperature == 0:
            raise UserError("/retry", None, "gives the same answer at temperature 0", "use /set temperature 0.7 first")
        self._ask(last.prompt, last.seed + 1, self.rounds[:-1])

    def _undo(self) -> None:
        last = self._last_round("/undo")
        self.rounds = self.rounds[:-1]
        prompt = " ".join(last.prompt.split())
        self.terminal.say_dimly(f"removed: {prompt[:59] + '…' if len(prompt) > 60 else prompt}")

    def _compare(self) -> None:
        if flag := self.generator.fixed:
            raise UserError("/compare", None, f"cannot be used with {flag}", f"start again without {flag}")
        last = self._last_round("/compare")
        self.terminal.say_dimly("without the adapter:")
        with self.generator.adapter_off():
            answer, result = self._answer(last.ids, last.settings, last.seed)
        self._say_summary(result, len(last.ids), ["the same answer"] if answer == last.answer else [])

    def _save(self, name: str) -> None:
        file = Path(os.path.expanduser(name))
        if file.suffix != ".jsonl":
            raise UserError("/save", file, "is not a .jsonl file, which training reads", "use a name that ends in .jsonl")
        rounds = [one for one in self.rounds if one.is_complete]
        left_out = len(self.rounds) - len(rounds)
        if not rounds:
            problem = "needs an answer" + (" that ends by itself and has words" if left_out else "")
            raise UserError("/save", file, problem, "use /set max_new_tokens" if left_out else "type an input first")
        records = build_records(rounds, self.style)
        try:
            with file.open("x", encoding="utf-8") as saved:
                saved.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        except FileExistsError:
            raise UserError("/save", file, "exists already", "use another name") from None
        except OSError as error:
            raise UserError("/save", file, f"cannot be written ({error.strerror})", "use another name") from None
        note = f"; {count(left_out, 'round')} left out: cut or empty answers are not trained" if left_out else ""
        self.terminal.say_dimly(f"saved {count(len(rounds), 'round')} in {file}{note}")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
