"""Read the turns of a conversation into chat messages, and check their order.

A turn is {"role": ..., "content": ...} or {"from": ..., "value": ...}. Its other keys are used, refused, or named as not used:

    weight, train, trained, loss ... : false or 0     an answer that is context and never trained (`masked`: true)
    tool_calls, function_call                         calls, and roles of that name, whose content is the JSON of calls
    reasoning_content, thinking, reasoning            thoughts before an answer
    name, tool_call_id                                given to the chat template; named as not used if it does not write them
"""

from collections.abc import Sequence
from typing import Any

from qlora_kit.data.apply_template import Message
from qlora_kit.data.fields import CALLS, REFUSED, THOUGHTS, check_texts, find_meaning, is_empty, read_weight, require_text
from qlora_kit.data.tool_calls import read_calls
from qlora_kit.errors import BadRecord

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool", "environment": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # by which chat templates know thoughts
GIVEN = ("name", "tool_call_id")  # to the chat template, as they are
OWN_KEYS = ("tools", "functions", "function_calls", "tool_responses")  # that some templates read from a turn
FOLLOWING = {None: ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def read_turns(turns: object, key: str, unused: set[str], openai: bool = True) -> list[Message]:
    """Return the turns of a field as messages; names of keys that nothing uses are added to `unused`.

    Args:
        key: of the field, for messages.
        openai: role and content are the usual keys, else from and value; the other two are known too.

    Raises:
        BadRecord: it holds no list of turns, or a turn is wrong.
    """
    if not isinstance(turns, list) or not turns:
        found = "no turn" if isinstance(turns, list) else type(turns).__name__
        raise BadRecord(f"{key} holds {found}, expected a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        message = _read_turn(turn, f"turn {number} of {key}", unused, 1 if openai else -1)
        if message["role"] == "call":
            message["role"] = "assistant"
            before = messages[-1] if messages else {}
            if before.get("role") == "assistant" and _is_part(message, before):
                before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
                continue
        messages.append(message)
    return messages


def _is_part(calls: Message, answer: Message) -> bool:
    """Return whether calls in a turn of their own are those of the answer before them, and say nothing else."""
    return calls.get("weight") == answer.get("weight") and calls.keys() <= {"role", "content", "tool_calls", "weight"}


def _read_turn(turn: object, name: str, unused: set[str], order: int) -> Message:
    role_key, content_key = ROLE_KEYS[::order][0], CONTENT_KEYS[::order][0]
    if not isinstance(turn, dict):
        raise BadRecord(f"{name} is {type(turn).__name__}, expected {role_key} and {content_key}")
    if turn.get(role_key) is None and turn.get(other := ROLE_KEYS[::order][1]) is not None:
        role_key = other
    if turn.get(content_key) is None and turn.get(other := CONTENT_KEYS[::order][1]) is not None:
        content_key = other
    written = turn.get(role_key)
    if not isinstance(written, str) or written not in ROLES:
        raise BadRecord(f"{name} has {role_key} {written!r}, expected {', '.join(ROLES)}")
    message: Message = {"role": ROLES[written], "content": turn.get(content_key)}
    if len(turn) > 2:
        others = {one: value for one, value in turn.items() if one not in (role_key, content_key)}
        _read_other_keys(message, others, name, unused)
    if message["role"] == "call":
        if calls := read_calls(message["content"], f"{content_key} of {name}"):
            return message | {"content": None, "tool_calls": calls}
        raise BadRecord(f"{content_key} of {name} holds no call")
    if not (message["content"] is None and ("tool_calls" in message or "function_calls" in message)):
        require_text(message["content"], f"{content_key} of {name}")
    return message


def _read_other_keys(message: Message, others: dict[str, Any], name: str, unused: set[str]) -> None:
    """Add to a message what the other keys of its turn mean."""
    weight, answers = read_weight(others.items(), True, name), message["role"] in ("assistant", "call")
    if weight == 0:
        message["weight"] = 0
    for one, value in others.items():
        if is_empty(value):
            continue
        meaning = find_meaning(one, of_turn=True)
        place = f"{one} of {name}"
        if meaning in REFUSED:
            raise BadRecord(f"{place} is not supported", REFUSED[meaning])
        if one in OWN_KEYS and (meaning != CALLS or (isinstance(value, str) and not value.lstrip().startswith(("[", "{")))):
            check_texts(value, place)
            message[one] = value
        elif meaning == CALLS:
            if calls := read_calls(value, place):
                _set_once(message, "tool_calls", calls, ["tool_calls"], name)
        elif meaning == THOUGHTS:
            key = one if one in THOUGHT_KEYS else THOUGHT_KEYS[0]
            _set_once(message, key, require_text(value, place), THOUGHT_KEYS, name)
        elif one in GIVEN:
            message[one] = require_text(value, place)
        elif meaning is None or (weight == 1 and not answers):  # the words of users are trained by data.train_on: all only
            unused.add(f"turn.{one}")


def _set_once(message: Message, key: str, value: object, names: Sequence[str], turn: str) -> None:
    """Set a key that stands for all of `names`, unless one of them has the same value already."""
    before = [message[name] for name in names if name in message]
    if before and before[0] != value:
        raise BadRecord(f"{turn} has different values of {names[0]} under several names, expected one")
    if not before:
        message[key] = value


def check_order(messages: list[Message]) -> list[Message]:
    """Return messages that begin with at most one system turn, then alternate between user and assistant, and end with an answer.

    Tool turns may stand between two turns of the assistant.

    Raises:
        BadRecord: the order is another, or an answer is empty.
    """
    begin = messages[0]["role"] == "system"
    before = None
    for number, message in enumerate(messages[begin:], 1 + begin):
        role = message["role"]
        if role not in FOLLOWING[before]:
            raise BadRecord(
                f"turn {number} is {role}, expected {FOLLOWING[before][0]}: user and assistant take turns, system only first, "
                "tool after an answer"
            )
        if role == "assistant" and not (message["content"] or "").strip() and not makes_calls(message):
            raise BadRecord("an answer is empty, expected text to train on")
        before = role
    if before != "assistant":
        raise BadRecord("the last turn is no answer, expected an assistant turn")
    return messages


def makes_calls(message: Message) -> bool:
    """Return whether a message calls tools."""
    return "tool_calls" in message or "function_calls" in message
