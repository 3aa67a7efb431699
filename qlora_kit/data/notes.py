"""Collect what a preview and a log say of the data beside their tokens: what of them is not trained, and what was changed."""

from typing import Any

from qlora_kit.data.fields import LONGEST_KEY
from qlora_kit.data.rendering import Rendering
from qlora_kit.errors import spell_out

MOST_KEYS, KEYS_SHOWN = 1000, 20  # kept, since every record may have others
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
        if rendering.unused and len(self.unused) < MOST_KEYS:
            self.unused |= {key[:LONGEST_KEY] for key in rendering.unused}
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
        about: what as_json returned; `left_out_thought`, the end of a prompt that chat_template.py leaves out; and
            `damaged_cache`, why the tokens that were stored had to be made anew.
    """
    rows: Rows = []
    if damage := about.get("damaged_cache"):
        rows.append(("cache", f"was damaged, so the data were tokenized anew ({damage})"))
    if records := about.get("with_tools"):
        rows.append(("tools", f"in {records:,} records"))
    if keys := about.get("unused_keys"):
        rows.append(("not used", _list_keys(keys)))
    if changed := about.get("changed"):
        problem = f"the chat template leaves out or changes words of {changed['turns']:,} turns"
        rows.append(("changed", f"{problem}, first in {changed['first']}"))
    if thought := about.get("left_out_thought"):
        rows.append(("left out", f"{thought!r} at the end of prompts: the chat template begins no given answer with it"))
    return rows


def _list_keys(keys: list[str]) -> str:
    names = [spell_out(key)[:LONGEST_KEY] or "(a column without a name)" for key in keys[:KEYS_SHOWN]]
    return ", ".join(names) + (" and more" if len(keys) > KEYS_SHOWN else "")
