"""TensorBoard and Weights & Biases report a run: what fails in them costs their pictures, and not the run."""

from collections.abc import Callable
from typing import Any

from transformers import Trainer

from qlora_kit.errors import describe

INTEGRATIONS = "transformers.integrations"  # the module of the library's callbacks that report


class Reporter:
    """One of the library's callbacks; after its first error it is left out.

    Args:
        warn: prints a line.
    """

    def __init__(self, callback: Any, warn: Callable[[str], None]):
        self.callback, self.warn, self.has_failed = callback, warn, False

    def __getattr__(self, event: str) -> Callable[..., Any]:
        report = getattr(self.callback, event)

        def try_to_report(*arguments: Any, **named: Any) -> Any:
            if self.has_failed:
                return None
            try:
                return report(*arguments, **named)
            except Exception as error:
                self.has_failed = True
                self.warn(f"{type(self.callback).__name__} failed ({describe(error)}): going on without it")

        return try_to_report


def guard_reporters(trainer: Trainer, warn: Callable[[str], None]) -> None:
    """Wrap the callbacks of a Trainer that only report."""
    handler = trainer.callback_handler
    handler.callbacks = [
        Reporter(callback, warn) if type(callback).__module__.startswith(INTEGRATIONS) else callback
        for callback in handler.callbacks
    ]
