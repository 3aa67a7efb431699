"""What a run leaves to read: training_log.txt, metrics.jsonl, training_curves.png, run.json.

metrics.jsonl holds one object a logged step and is the source of the picture. Imports no torch.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from qlora_kit.output.folder import LOG, METRICS
from qlora_kit.secrets import redact


class RunLog:
    """Lines for the reader, on standard error and in training_log.txt; numbers for programs, in metrics.jsonl.

    Nothing is written to disk before `open`: a run that fails while it gets ready leaves an earlier run's files alone.

    Args:
        speaks: False in a process that leaves this to another: it says and writes nothing.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self._waiting: list[str] = []
        self._folder: Path | None = None

    def open(self, folder: Path, checkpoint: Path | None) -> None:
        """Start the files in `folder` afresh, or go on from those that a checkpoint holds: no step is missing, none twice."""
        self._folder = folder
        for name in (LOG, METRICS):
            (folder / name).unlink(missing_ok=True)  # a run that failed before its first checkpoint may have left both
            if checkpoint:
                shutil.copyfile(checkpoint / name, folder / name)
            (folder / name).touch()  # a short run may have nothing to log
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            self.file_only(text)

    def copy_to(self, checkpoint: Path) -> None:
        """Both files as they are now."""
        assert self._folder is not None, "a checkpoint before the log was opened"
        for name in (LOG, METRICS):
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, checkpoint / name)
            else:
                (checkpoint / name).touch()

    def line(self, text: str = "") -> None:
        if self.speaks:
            print(redact(text), file=sys.stderr)
        self.file_only(text)

    def file_only(self, text: str) -> None:
        text = redact(text)
        if not self.speaks:
            return
        if self._folder is None:
            self._waiting.append(text)
        else:
            _append(self._folder / LOG, text)

    def metrics(self, values: dict[str, Any]) -> None:
        if not self.speaks:
            return
        assert self._folder is not None, "metrics before the log was opened"
        _append(self._folder / METRICS, json.dumps(finite(values)))


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """With null for what JSON has no word for, such as the standard error of a single block."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
