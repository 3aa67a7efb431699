"""How a run ends in one line: UserError, Failed, Stopped, BadRecord."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Problem:
    """One mistake of the user's.

    Attributes:
        key: the flag, the dotted key of the config, or the path that is wrong.
        value: what it holds; None where there is nothing to show.
        problem: what is wrong with it: a clause with a finite verb, without a capital and without a full stop.
        remedy: what to do: an imperative clause, likewise.
        place: the file and line that hold the key, or "command line"; empty where the key says it.
    """

    key: str
    value: object
    problem: str
    remedy: str
    place: str = ""

    def __str__(self) -> str:
        """Write `PLACE: KEY: VALUE: problem. Remedy.` in one line, with every control character spelled out."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        parts = [part for part in (self.place, self.key, value, self.problem) if part not in (None, "")]
        text = f"{': '.join(map(str, parts))}. {self.remedy[:1].upper()}{self.remedy[1:]}."
        return spell_out(text)


def spell_out(text: str, kept: str = "") -> str:
    """Return a text in which a terminal obeys nothing: every control character is spelled out but those that are `kept`.

    Nothing of a file may reach a terminal or a log otherwise; without `kept` the text is one line.
    """
    return CONTROL.sub(lambda match: match.group() if match.group() in kept else repr(match.group())[1:-1], text)


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is spelled most like `name`, or None where no name is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def did_you_mean(guess: str | None) -> str:
    """Return ` (did you mean GUESS?)`, for the end of a message about an unknown name; empty without a guess."""
    return f" (did you mean {guess}?)" if guess else ""


def describe(error: BaseException) -> str:
    """Return the kind of an error and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def abbreviate(text: str) -> str:
    """Return a text of at most 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."


class UserError(Exception):
    """A mistake that the user can mend: exit status 2, and one line for each problem."""

    def __init__(self, key: object, value: object, problem: str, remedy: str):
        self._set([Problem(str(key), value, problem, remedy)])

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> "UserError":
        """Return one error for several problems."""
        error = cls.__new__(cls)
        error._set(list(problems))
        return error

    def __reduce__(self) -> tuple[object, ...]:  # another process may raise it
        return UserError.of, (self.problems,)

    @property
    def lines(self) -> list[str]:
        """The problems as they are printed, one line each."""
        return [str(problem) for problem in self.problems]

    def _set(self, problems: list[Problem]) -> None:
        self.problems = problems
        Exception.__init__(self, "\n".join(map(str, problems)))

    def under(self, key: str, value: object = None, remedy: str | None = None) -> "UserError":
        """Return the same problems under another key: that of the flag which the user typed.

        Args:
            remedy: what to do instead; None keeps each problem's own.
        """
        return self.of(replace(one, key=key, value=value, place="", remedy=remedy or one.remedy) for one in self.problems)


def unsupported(key: str, reason: str, alternative: str) -> Problem:
    """Return the problem of a switch that is true where it cannot work."""
    return Problem(key, True, f"cannot work here ({reason})", f"use {alternative}")


class Stopped(Exception):
    """The run was asked to stop; `status` is the exit status, and `can_resume` says whether there is a checkpoint."""

    def __init__(self, status: int, message: str, can_resume: bool = True):
        super().__init__(message)
        self.status, self.can_resume = status, can_resume


class Failed(Exception):
    """The run ends through neither the user's mistake nor a bug, such as a full GPU: one line, exit status 1."""


class BadRecord(ValueError):
    """A record is wrong: the message says how and what was expected; the reader of the file adds the place.

    Attributes:
        remedy: what to do: an imperative clause.
    """

    def __init__(self, problem: str, remedy: str = "correct the record, or remove it"):
        super().__init__(problem, remedy)
        self.remedy = remedy

    def __str__(self) -> str:
        return str(self.args[0])
