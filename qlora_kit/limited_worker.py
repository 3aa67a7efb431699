"""Run a function in a process of its own, within limits of time and memory.

Chat templates are programs, and patterns of an adapter may never end. A sandbox keeps templates from files and modules, not from
loops without an end or texts that fill the memory, and Python cannot interrupt one of its own operations. A process can be ended.
"""

import multiprocessing
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from qlora_kit.config import GIB

SECONDS, BYTES = 20.0, GIB  # of a call, and beyond what this process has
Argument = TypeVar("Argument")
Result = TypeVar("Result")


class LimitExceeded(Exception):
    """The limit that a call exceeded, in words."""


class LimitedWorker(Generic[Argument, Result]):
    """A forked process that answers calls of one function; it starts with the first call and again after an exceeded limit.

    Args:
        function: called in the process with each argument. Argument, result and exceptions are pickled.
    """

    def __init__(self, function: Callable[[Argument], Result], seconds: float = SECONDS, extra_bytes: int = BYTES):
        self.function, self.seconds, self.extra_bytes = function, seconds, extra_bytes
        self.process: Any = None
        self.connection: Connection | None = None

    def call(self, argument: Argument) -> Result:
        """Return the function's result.

        Raises:
            LimitExceeded: it took more than `seconds`, or more than `extra_bytes` of memory.
            Exception: what the function raises.
        """
        if self.connection is None:
            self._start()
        assert self.connection is not None
        try:
            self.connection.send(argument)
            if not self.connection.poll(self.seconds):
                raise LimitExceeded(f"it takes more than {self.seconds:g} seconds")
            succeeded, result = self.connection.recv()
        except (EOFError, OSError):
            self.close()
            raise LimitExceeded(f"it takes more than {self.extra_bytes / GIB:g} GiB of memory") from None
        except BaseException:
            self.close()
            raise
        if isinstance(result, MemoryError):
            raise LimitExceeded(f"it takes more than {self.extra_bytes / GIB:g} GiB of memory") from None
        if not succeeded:
            raise result
        return result

    def close(self) -> None:
        """End the process."""
        if self.connection is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
        self.process = self.connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # the libraries are imported already
        self.connection, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.function, end, self.connection, self.extra_bytes), daemon=True)
        self.process.start()
        end.close()


def _serve(function: Callable[[Any], Any], connection: Connection, other_end: Connection, extra_bytes: int) -> None:
    other_end.close()  # so that the end of the parent ends this process
    limit = _address_space() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C goes to the parent too, which ends this process
    with suppress(EOFError):
        while True:
            argument = connection.recv()
            try:
                answer = (True, function(argument))
            except Exception as error:
                answer = (False, error)
            connection.send(answer)


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
