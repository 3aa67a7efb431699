"""Find the turns whose words a chat template left out of its rendering, or changed.

White space may differ: templates strip contents, and some write thoughts on lines of their own. A template may also quote the
result of a tool as JSON.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlora_kit.data.apply_template import Message
from qlora_kit.data.template_support import find_unwritten, refuse_unwritten
from qlora_kit.data.turns import THOUGHT_KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def count_changed_turns(turns: list[Message], whole: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the number of turns whose words are not all in the rendering, such as answers that lost their thoughts.

    Raises:
        BadRecord: the template writes nothing of a turn that is no answer, or leaves out a call.
    """
    changed = set()
    for number, at_fault in _find_missing(turns, whole):
        role = turns[number]["role"]
        if at_fault == "call":
            raise refuse_unwritten(f"a call of turn {number + 1}")
        if role != "assistant" and "content" in find_unwritten(tokenizer, role, frozenset({"content"}), False):
            raise refuse_unwritten(f"turn {number + 1} ({role})")
        changed.add(number)
    return len(changed)


def _find_missing(turns: list[Message], whole: str) -> Iterator[tuple[int, str]]:
    """Yield the number of each turn that the rendering lacks something of, and what: words or call."""
    at = 0  # turns follow one another, so that each is searched for behind the one before
    for number, turn in enumerate(turns):
        said = [turn["content"]] if len(turn) == 2 else [turn.get(key) for key in (*THOUGHT_KEYS, "content")]
        for words in said:
            words = words.strip() if words else ""
            found = whole.find(words, at)
            if found >= 0:
                at = found + len(words)
            elif not _occurs(words, whole):
                yield number, "words"
        for call in turn.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            names = [call["function"]["name"], *(json.loads(arguments) if isinstance(arguments, str) else arguments)]
            if not all(name in whole for name in names):
                yield number, "call"


def _occurs(words: str, whole: str) -> bool:
    quoted = json.dumps(words, ensure_ascii=False)[1:-1]
    return words in whole or quoted in whole or "".join(words.split()) in "".join(whole.split())
