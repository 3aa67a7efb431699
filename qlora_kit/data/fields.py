"""Read single fields of records and turns, and know a key by each of its usual names.

Names differ between tools by capitals, hyphens and underscores, so a key is known by its letters: `systemPrompt` and
`system_prompt` are one.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from qlora_kit.data.files import DECODER, RepeatedKey
from qlora_kit.errors import BadRecord

LONGEST_KEY = 60  # characters of a key that may have a meaning
SYSTEM, HISTORY, TOOLS = "system", "history", "tools"
TRAINED, MASKED = "trained", "masked"  # switches: true trains an answer, or does not
CALLS, THOUGHTS = "tool_calls", "thoughts"
MASK, MEDIA, RENDERING = "mask", "media", "rendering"
REFUSED = {  # meanings that are refused, and what to do instead
    MASK: "say train: true or false of a turn instead",  # a mask may mark what is trained or what is not
    MEDIA: "train on text only",
    RENDERING: "write it into a template of your own (data.chat_template=FILE)",
}

_BOTH = {
    TRAINED: "train trained trainable istrainable shouldtrain weight loss losses lossweight lossscale lossmask steplossmask "
    "trainmask computeloss calculateloss useloss hasloss",
    MASKED: "masked ismasked ignoreloss skiploss notrain donttrain",
    MASK: "mask traindetail trainingdetail",
    MEDIA: "image images audio audios video videos",
    RENDERING: "documents chattemplate chattemplatekwargs templatekwargs",
}
_OF_RECORDS = _BOTH | {
    SYSTEM: "system systemprompt systemmessage systeminstruction systeminstructions systemcontent systemtext sysprompt sys "
    "developer developerprompt developermessage developerinstructions",
    HISTORY: "history chathistory conversationhistory dialoghistory dialoguehistory messagehistory previousmessages "
    "previousturns",
    TOOLS: "tools functions availabletools availablefunctions tooldefinitions functiondefinitions toolschemas",
}
_OF_TURNS = _BOTH | {
    CALLS: "toolcalls toolcall functioncall functioncalls",
    THOUGHTS: "reasoningcontent reasoning reasoningtext thinking thinkingcontent thought thoughts thoughtcontent",
}


def find_meaning(key: str, of_turn: bool) -> str | None:
    """Return the meaning of a key of a turn, or of a record: one of the constants above; None for any other key."""
    return _find_meaning(key, of_turn) if len(key) < LONGEST_KEY else None


@lru_cache(maxsize=1024)
def _find_meaning(key: str, of_turn: bool) -> str | None:
    letters = re.sub(r"[^a-z]", "", str(key).lower())
    table = _OF_TURNS if of_turn else _OF_RECORDS
    return next((meaning for meaning, names in table.items() if letters in names.split()), None)


def is_empty(value: object) -> bool:
    """Return whether a field holds nothing: null, blank text, or an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list | dict) and not value)


def require_text(value: object, name: str) -> str:
    """Return a value that must be text.

    Raises:
        BadRecord: it is not text, or holds NUL or a lone surrogate (half of an emoji, such as `\\ud83d` in JSON).
    """
    if not isinstance(value, str):
        raise BadRecord(f"{name} holds {type(value).__name__}, expected text")
    if "\0" in value:
        raise BadRecord(f"{name} holds NUL at character {value.index(chr(0)) + 1}, expected text")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{name} holds half a character (a lone surrogate) at character {error.start + 1}") from None
    return value


def check_texts(value: object, name: str) -> None:
    """Check every text within lists and objects as require_text does."""
    if isinstance(value, str):
        require_text(value, name)
    elif isinstance(value, dict):
        for key, one in value.items():
            check_texts(key, name)
            check_texts(one, name)
    elif isinstance(value, list):
        for one in value:
            check_texts(one, name)


def parse_json_text(value: object, name: str) -> Any:
    """Return what JSON text holds, and any other value as it is.

    Raises:
        BadRecord: the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return DECODER.decode(value)
    except RepeatedKey as error:
        raise BadRecord(f"{name} has the key {str(error)!r} twice in one object") from None
    except (ValueError, RecursionError):
        raise BadRecord(f"{name} is no valid JSON: {shorten(value)}") from None


def shorten(text: str, characters: int = 40) -> str:
    """Return the beginning of a text in quotes, in one line."""
    return repr(text if len(text) <= characters else text[:characters] + "…")


def read_switch(value: object, name: str) -> bool:
    """Return a value that must be true or false, or 1 or 0.

    Raises:
        BadRecord: it is another.
    """
    words = {"true": True, "1": True, "false": False, "0": False}  # as a CSV file writes them
    value = words.get(value.strip().lower(), value) if isinstance(value, str) else value
    if not isinstance(value, int | float) or value not in (0, 1):
        remedy = "write true or false, or rename the key if it does not say what is trained"
        raise BadRecord(f"{name} {value!r}, expected 0 or 1 (false or true)", remedy)
    return bool(value)


def read_weight(fields: Iterable[tuple[str, Any]], of_turn: bool, name: str) -> int | None:
    """Return 0 if the switches among these fields say that an answer is not trained, 1 if it is, None if there are none.

    Args:
        name: of the turn; empty for a record.

    Raises:
        BadRecord: a switch is neither true nor false, or two contradict each other.
    """
    found: dict[str, bool] = {}
    for key, value in fields:
        meaning = find_meaning(key, of_turn)
        if meaning in (TRAINED, MASKED) and not is_empty(value):
            found[key] = read_switch(value, f"{name} has {key}" if name else f"{key} is") == (meaning == TRAINED)
    if len(set(found.values())) > 1:
        raise BadRecord(f"{name or 'the record'} has {' and '.join(found)}, which contradict each other")
    return None if not found else int(all(found.values()))
