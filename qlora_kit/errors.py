"""How a run ends in one line: UserError, Failed, Stopped, BadRecord."""

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class UserError(Exception):
    """A mistake that the user can mend: each problem is one sentence with the key or path, the value and the remedy.

    It is one line, and nothing that a terminal obeys, whatever a file, a name or a value in it holds.
    """

    def __init__(self, *problems: str):
        self.problems = [CONTROL.sub(lambda match: repr(match.group())[1:-1], problem) for problem in problems]
        super().__init__("\n".join(self.problems))


def cannot_work(key: str, reason: str, instead: str) -> str:
    """The line for a switch that was set to true where it cannot work."""
    return f"{key}: true: cannot work here ({reason}); use {instead}"


class Stopped(Exception):
    """The run was asked to stop and has saved what it had; `status` is the exit status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Failed(Exception):
    """Ended by what is neither the user's mistake nor ours, such as a full GPU: one line, exit status 1."""


class BadRecord(ValueError):
    """What is wrong with a record and what was expected; the reader of the file adds its place."""
