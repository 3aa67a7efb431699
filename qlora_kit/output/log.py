"""training_log.txt and metrics.jsonl.

metrics.jsonl holds one JSON object for each logged step; training_curves.png is drawn from it. Imports no torch.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from qlora_kit.errors import spell_out
from qlora_kit.output.folder import LOG, METRICS
from qlora_kit.secrets import redact
from qlora_kit.wrapping import say


class RunLog:
    """Lines for people, on standard error and in training_log.txt; numbers for programs, in metrics.jsonl.

    Nothing is written to disk before `open`, so that a run that fails earlier leaves the files of an earlier run as they are.

    Args:
        enabled: False on every rank but 0: nothing is printed or written.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._waiting: list[str] = []
        self._folder: Path | None = None
        self._may_fail = False

    def open(self, folder: Path, checkpoint: Path | None) -> None:
        """Start both files in `folder`, empty or as a checkpoint holds them, so that a resumed run logs each step once."""
        self._folder = folder
        for name in (LOG, METRICS):
            staged = folder / f".{name}"
            staged.unlink(missing_ok=True)
            if checkpoint:
                shutil.copyfile(checkpoint / name, staged)
            staged.touch()  # a short run may have nothing to log
            os.replace(staged, folder / name)
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            self.write_to_file(text)

    def settle(self, folder: Path) -> None:
        """Go on in `folder`, where both files are now with the finished adapter, which a full disk must not cost any more."""
        self._folder, self._may_fail = folder, True

    def copy_to(self, checkpoint: Path) -> None:
        """Copy both files into a checkpoint."""
        assert self._folder is not None, "a checkpoint before the log was opened"
        for name in (LOG, METRICS):
            (self._folder / name).touch()  # someone may have deleted it
            shutil.copyfile(self._folder / name, checkpoint / name)

    def write(self, text: str = "") -> None:
        """Write a line to standard error and to training_log.txt."""
        self.show(text)
        self.write_to_file(text)

    def show(self, text: str) -> None:
        """Write a line to standard error alone; any thread may."""
        if self.enabled:
            say(clean(text))

    def write_to_file(self, text: str) -> None:
        """Write a line to training_log.txt, or keep it until `open`."""
        if self.enabled and self._folder is None:
            self._waiting.append(text)
        elif self.enabled and self._folder:
            try:
                _append(self._folder / LOG, clean(text))
            except OSError:
                if not self._may_fail:
                    raise

    def write_metrics(self, values: dict[str, Any]) -> None:
        """Write an object to metrics.jsonl, with null for NaN and infinity, which JSON does not have."""
        if not self.enabled:
            return
        assert self._folder is not None, "metrics before the log was opened"
        values = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        _append(self._folder / METRICS, json.dumps(values))


def clean(text: str) -> str:
    """Return lines without secrets, and with the control characters spelled out that the names in a file may hold."""
    return "\n".join(spell_out(line) for line in redact(text).split("\n"))


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text + "\n")
