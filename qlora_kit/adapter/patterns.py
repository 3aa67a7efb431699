"""Match an adapter's patterns with the names of modules, in bounded time: they are regular expressions, and some never end."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from qlora_kit.adapter.settings import LITERAL, IA3File, LoraFile
from qlora_kit.errors import UserError
from qlora_kit.limited_worker import LimitedWorker, LimitExceeded
from qlora_kit.output.folder import ADAPTER_FILES

SECONDS = 5.0
MATCHES = 10**6  # of literal patterns, which take well below a second
Result = TypeVar("Result")


def match_in_time(
    match: Callable[[], Result], settings: LoraFile | IA3File, names: Collection[str], folder: Path, seconds: float = SECONDS
) -> Result:
    """Return what `match` finds, in a process of its own where the patterns may take long.

    Args:
        match: compares the patterns in `settings` with `names`; its result is pickled.
        folder: the adapter's.

    Raises:
        UserError: it takes more than `seconds`, or too much memory.
    """
    patterns = settings.patterns()
    if len(patterns) * len(names) <= MATCHES and all(LITERAL.fullmatch(pattern) for pattern in patterns):
        return match()
    worker = LimitedWorker[None, Result](lambda _: match(), seconds)
    try:
        return worker.call(None)
    except LimitExceeded as limit:
        problem = f"has patterns in {ADAPTER_FILES[1]} that cannot be matched with {len(names)} names ({limit})"
        raise UserError("--adapter", folder, problem, "name its modules without regular expressions") from None
    finally:
        worker.close()
