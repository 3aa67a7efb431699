"""A conversation at the terminal: what is said is answered, what begins with a slash is a command.

An adapter of chats gets the whole conversation with each message. One of running text continues each input, and one of
instructions follows each, without what was said before: so they were trained.
"""

import difflib
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_kit.config import GenerationSettings
from qlora_kit.data.chat_template import Message
from qlora_kit.data.formats import checked_text
from qlora_kit.errors import BadRecord, UserError
from qlora_kit.inference.generator import Generated, Generator, replace_settings
from qlora_kit.inference.terminal import Terminal

FIRST_LINES = {
    "chat": "Chat: the whole conversation is sent with each message.",
    "text": "Text: each input is continued; what was said before is not sent.",
    "instruction": "Instructions: each input is one; what was said before is not sent.",
}
COMMANDS = {  # name: its argument, what it does
    "/help": ("", "this list"),
    "/reset": ("", "forget the conversation; the system turn stays"),
    "/system": ("[TEXT]", "what the conversation begins with; without TEXT, nothing"),
    "/set": ("[KEY VALUE]", "such as /set temperature 0.8; alone, shows all"),
    "/retry": ("", "answer the last input again, with another seed"),
    "/undo": ("", "take back the last input and its answer"),
    "/compare": ("", "the last answer again without the adapter, same seed"),
    "/save": ("FILE", "write the conversation to a new .jsonl file to train on"),
    "/exit": ("", "leave, as Ctrl+D does"),
}
HOW_TO_TYPE = (
    "A line that ends with \\ goes on in the next. A space before / makes it text.\n"
    "Ctrl+C stops an answer; at an empty prompt, twice leaves."
)


@dataclass(frozen=True)
class Round:
    """An input and its answer, with all that it takes to ask again."""

    prompt: str
    ids: list[int]
    settings: GenerationSettings
    seed: int
    answer: str
    cut: bool  # by Ctrl+C or at max_new_tokens


def messages(rounds: list[Round], system: str) -> list[Message]:
    """Rounds as training reads them: an answer that was cut is context only, since its end would be no end."""
    said: list[Message] = [{"role": "system", "content": system}] if system else []
    for one in worded(rounds):
        answer = {"role": "assistant", "content": one.answer}
        said += [{"role": "user", "content": one.prompt}, answer | {"weight": 0} if one.cut else answer]
    return said


def worded(rounds: list[Round]) -> list[Round]:
    """Those whose answer has words: training knows no empty answers."""
    return [said for said in rounds if said.answer.strip()]


def run_interactive(generator: Generator, compare: bool = False) -> None:
    """Answer inputs until their end, /exit, or Ctrl+C twice.

    Args:
        compare: give each answer without the adapter, too, as /compare does.
    """
    terminal = Terminal()
    conversation = Conversation(generator, terminal, compare)
    terminal.say(f"{FIRST_LINES[generator.style]} /help lists commands, Ctrl+D leaves.")
    interrupted = False
    while True:
        try:
            line = terminal.read()
            interrupted = False
            with terminal.noting_interrupts():
                if not conversation.take(line):
                    return
        except EOFError:
            if terminal.typed:
                terminal.say("")
            return
        except KeyboardInterrupt:
            if not terminal.typed:
                raise
            if interrupted and not terminal.half_typed():
                terminal.say("")
                return
            interrupted = not terminal.half_typed()
            terminal.say("\nCtrl+C again leaves, as /exit and Ctrl+D do." if interrupted else "")


class Conversation:
    """What was said, and what to say next. The answers' settings are those of the generator, which /set replaces."""

    def __init__(self, generator: Generator, terminal: Terminal, compare: bool):
        self.generator, self.terminal, self.compare = generator, terminal, compare
        self.system = generator.system or ""
        self.rounds: list[Round] = []

    def take(self, line: str) -> bool:
        """Answer an input or do a command; whether to go on."""
        if not line.strip():
            return True
        try:
            if line.startswith("/"):
                return self._command(line)
            self._ask(checked_text(line, "the input"), self.generator.seed, self.rounds)
        except UserError as error:
            for problem in error.lines:
                self.terminal.refuse(problem)
        except BadRecord as error:
            self.terminal.refuse(error)
        except torch.OutOfMemoryError:
            self.terminal.refuse("the GPU's memory is full; /undo or /reset makes the conversation shorter")
        return True

    # Answers

    def _ask(self, prompt: str, seed: int, before: list[Round]) -> None:
        ids = self._encode(prompt, before)
        self._check_room(ids)
        settings = self.generator.settings
        if self.compare:
            self.terminal.whisper("with the adapter:")
        answer, result = self._answer(ids, settings, seed)
        self.rounds = [*before, Round(prompt, ids, settings, seed, answer, cut=result.stop != "end")]
        retried = f", seed {seed}" if seed != self.generator.seed else ""
        silent = "" if answer.strip() else ", no words: left out of the conversation"
        self.terminal.whisper(self._summary(result, len(ids)) + retried + silent)
        if self.compare and result.stop != "interrupted":
            self._compare()

    def _encode(self, prompt: str, before: list[Round]) -> list[int]:
        if self.generator.style != "chat":
            return self.generator.encode(prompt)
        return self.generator.encode_chat([*messages(before, self.system), {"role": "user", "content": prompt}])

    def _check_room(self, ids: list[int]) -> None:
        room, wanted = self.generator.engine.context, self.generator.settings.max_new_tokens
        if not room or len(ids) + wanted <= room:
            return
        shorter = "/undo or /reset" if self.generator.style == "chat" and self.rounds else "a shorter input"
        fewer = f"/set max_new_tokens {room - len(ids)}"
        remedies = [shorter] * (wanted < room) + [fewer] * (len(ids) < room)
        raise UserError(
            f"the context is full: {len(ids):,} tokens and {wanted:,} new ones exceed the model's {room:,}; "
            f"{' or '.join(remedies or [shorter])} makes room"
        )

    def _answer(self, ids: list[int], settings: GenerationSettings, seed: int) -> tuple[str, Generated]:
        """Stream an answer; what of it was shown, and how it went."""
        own, said = (self.generator.settings, self.generator.seed), []
        self.generator.settings, self.generator.seed = settings, seed
        try:
            stream: Any = self.generator.stream(ids)
            with closing(stream):
                for piece in stream:
                    said.append(piece)
                    self.terminal.answer(piece)
                    if self.terminal.interrupted:
                        break
        finally:
            self.generator.settings, self.generator.seed = own
            self.terminal.answer("\n")
        assert self.generator.last is not None
        return "".join(said), self.generator.last

    def _summary(self, result: Generated, prompt_tokens: int) -> str:
        room = self.generator.engine.context
        parts = [
            f"{result.tokens:,} token{'' if result.tokens == 1 else 's'}",
            *([f"{result.tokens_per_second:,.1f} tokens/s"] if result.seconds else []),
            f"context {prompt_tokens + result.tokens:,}" + (f" of {room:,}" if room else ""),
            *{"length": ["cut at max_new_tokens"], "interrupted": ["cut by Ctrl+C"]}.get(result.stop, []),
        ]
        return ", ".join(parts)

    # Commands

    def _command(self, line: str) -> bool:
        name, given = [*line.split(maxsplit=1), ""][:2]
        name = name.lower()
        given = checked_text(given.strip(), name)
        if name not in COMMANDS:
            raise UserError(f"{name}: unknown command; {_closest(name, list(COMMANDS))}")
        argument = COMMANDS[name][0]
        if given and not argument:
            raise UserError(f"{line.strip()}: takes nothing behind it; use {name}")
        if not given and argument and not argument.startswith("["):
            raise UserError(f"{name}: expected {argument} behind it")
        match name:
            case "/help":
                self._help()
            case "/reset":
                self.rounds = []
                self.terminal.whisper("the conversation is empty")
            case "/system":
                self._set_system(given)
            case "/set":
                self._set(given)
            case "/retry":
                self._retry()
            case "/undo":
                self._undo()
            case "/compare":
                self._compare()
            case "/save":
                self._save(Path(given).expanduser())
        return name != "/exit"

    def _help(self) -> None:
        for name, (argument, what) in COMMANDS.items():
            self.terminal.say(f"{name} {argument}".ljust(18) + what)
        self.terminal.say(HOW_TO_TYPE)

    def _set_system(self, text: str) -> None:
        if self.generator.style != "chat":
            raise UserError("/system: only a chat has a system turn; say it in the input")
        before, self.system = self.system, text
        try:
            self._encode("Hi", self.rounds)  # the template may know no system turn
        except BadRecord:
            self.system = before
            raise
        self.terminal.whisper("system turn set" if text else "no system turn")

    def _set(self, given: str) -> None:
        if given:
            key, value = [*given.split(maxsplit=1), ""][:2]
            if key not in GenerationSettings.model_fields:
                raise UserError(f"/set {key}: unknown key; {_closest(key, list(GenerationSettings.model_fields))}")
            if not value:
                raise UserError(
                    f"/set {key}: expected a value behind it, such as /set {key} {getattr(GenerationSettings(), key)}"
                )
            self.generator.settings = replace_settings(self.generator.settings, {key: value}, "/set ", "it stays")
        self.terminal.whisper(", ".join(f"{key} {value}" for key, value in self.generator.settings))

    def _last(self, command: str) -> Round:
        if not self.rounds:
            raise UserError(f"{command}: nothing was said yet; type an input first")
        return self.rounds[-1]

    def _retry(self) -> None:
        last = self._last("/retry")
        if self.generator.settings.temperature == 0:
            raise UserError("/retry: at temperature 0 the answer is the same for each seed; /set temperature 0.7 first")
        self._ask(last.prompt, last.seed + 1, self.rounds[:-1])

    def _undo(self) -> None:
        last = self._last("/undo")
        self.rounds = self.rounds[:-1]
        shown = " ".join(last.prompt.split())
        self.terminal.whisper(f"taken back: {shown[:59] + '…' if len(shown) > 60 else shown}")

    def _compare(self) -> None:
        if self.generator.fixed:
            raise UserError(f"/compare: {self.generator.fixed} leaves nothing to compare with; start again without it")
        last = self._last("/compare")
        self.terminal.whisper("without the adapter:")
        with self.generator.adapter_off():
            answer, result = self._answer(last.ids, last.settings, last.seed)
        same = ", the same answer" if answer == last.answer else ""
        self.terminal.whisper(self._summary(result, len(last.ids)) + same)

    def _save(self, file: Path) -> None:
        if file.suffix != ".jsonl":
            raise UserError(f"/save {file}: training reads .jsonl files; name one")
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self._records())
        if not lines:
            raise UserError(f"/save {file}: nothing was said yet; type an input first")
        try:
            with file.open("x", encoding="utf-8") as writing:
                writing.write(lines)
        except FileExistsError:
            raise UserError(f"/save {file}: exists already; name another file") from None
        except OSError as error:
            raise UserError(f"/save {file}: cannot be written ({error.strerror}); name another file") from None
        cut = sum(said.cut for said in worded(self.rounds))
        self.terminal.whisper(f"saved in {file}" + (f"; answers that were cut, of weight 0: {cut}" if cut else ""))

    def _records(self) -> list[dict[str, Any]]:
        """One record of a chat, else one of each round."""
        said = worded(self.rounds)
        records = [said] if self.generator.style == "chat" else [[alone] for alone in said]
        return [{"messages": messages(record, self.system)} for record in records if record]


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
