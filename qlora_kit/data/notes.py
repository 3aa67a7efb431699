"""Collect what a preview and a log say of the data beside their tokens: what of them is not trained, and what was changed."""

from typing import Any

from qlora_kit.data.rendering import Rendering

Rows = list[tuple[str, str]]  # name and value


class NoteCollector:
    """The notes on the records of a source."""

    def __init__(self) -> None:
        self.unused: set[str] = set()
        self.with_tools = self.changed_turns = 0
        self.first_changed = ""

    def add(self, rendering: Rendering, name: str, place: str) -> None:
        """Add those of a record.

        Args:
            name: of its file.
            place: in the file.
        """
        self.unused |= rendering.unused
        self.with_tools += rendering.has_tools
        if rendering.changed_turns and not self.changed_turns:
            self.first_changed = f"{name}, {place}"
        self.changed_turns += rendering.changed_turns

    def as_json(self) -> dict[str, Any]:
        """Return them for the token cache; describe_notes reads them."""
        changed = {"turns": self.changed_turns, "first": self.first_changed} if self.changed_turns else None
        return {"unused_keys": sorted(self.unused), "with_tools": self.with_tools, "changed": changed}


def describe_notes(about: dict[str, Any]) -> Rows:
    """Return notes in words, without those that have nothing to say.

    Args:
        about: what as_json returned, and `left_out_thought`, the end of a prompt that chat_template.py leaves out.
    """
    changed = about.get("changed")
    rows = [
        ("tools", f"in {about['with_tools']:,} records" if about.get("with_tools") else ""),
        ("not used", ", ".join(about.get("unused_keys", ()))),
        (
            "changed",
            f"the chat template leaves out or changes words of {changed['turns']:,} turns, first in {changed['first']}"
            if changed
            else "",
        ),
        (
            "left out",
            f"{about['left_out_thought']!r}, with which the chat template ends a prompt, but begins no given answer"
            if about.get("left_out_thought")
            else "",
        ),
    ]
    return [row for row in rows if row[1]]
