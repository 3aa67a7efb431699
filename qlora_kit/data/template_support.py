"""Give a chat template what it writes of tools, calls and thoughts, in the form it needs; refuse what it leaves out.

Templates differ: some write a call's arguments as an object, some as JSON text; thoughts have three names; and a key that a
template does not know is left out without a word. So each template is tried with made-up turns of the same keys: a key whose
value changes nothing in the rendering is not written.
"""

import json
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_kit.data.apply_template import OTHER_TEMPLATE, Message, Tools, apply_chat_template
from qlora_kit.data.turns import GIVEN, OWN_KEYS, THOUGHT_KEYS
from qlora_kit.errors import BadRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_KEYS = {"role", "content", "weight"}
USER: Message = {"role": "user", "content": "qz0words"}


class CallForm(NamedTuple):
    """The form in which a template takes calls."""

    as_text: bool  # arguments as JSON text
    content: str | None  # of an answer without words


def fit_to_template(
    messages: list[Message], tools: Tools, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[Message], frozenset[str]]:
    """Return the messages in the form that the template needs, and the keys of turns that it leaves out without harm.

    Raises:
        BadRecord: the template leaves out tools, calls, thoughts, or a tool turn.
    """
    if tools is None and not any(message["role"] == "tool" or not message.keys() <= PLAIN_KEYS for message in messages):
        return messages, frozenset()
    if tools and not writes_tools(tokenizer):
        raise refuse_unwritten("tools")
    turns: list[Message] = []
    unused: set[str] = set()
    for number, message in enumerate(messages, 1):
        turns.append(_fit_turn(message, number, tools is not None, tokenizer, unused))
        for key in OWN_KEYS:
            without = [*turns[:-1], {name: value for name, value in turns[-1].items() if name != key}]
            if key in turns[-1] and apply_chat_template(turns, tokenizer, tools=tools) == apply_chat_template(
                without, tokenizer, tools=tools
            ):
                raise refuse_unwritten(f"{key} of turn {number}")
    return turns, frozenset(unused)


def _fit_turn(message: Message, number: int, has_tools: bool, tokenizer: "PreTrainedTokenizerBase", unused: set[str]) -> Message:
    turn, role = dict(message), message["role"]
    written = [key for key in turn if key not in PLAIN_KEYS and key not in OWN_KEYS]
    if thought := next((key for key in THOUGHT_KEYS if key in turn), None):
        others = frozenset(written) - {*THOUGHT_KEYS} | ({"content"} if turn["content"] else set())
        names = [thought, *(key for key in THOUGHT_KEYS if key != thought)]
        known = next((name for name in names if name not in find_unwritten(tokenizer, role, others | {name}, has_tools)), thought)
        turn[known] = turn.pop(thought)
        written = [key for key in turn if key not in PLAIN_KEYS and key not in OWN_KEYS]
    keys = frozenset(written) | ({"content"} if turn["content"] else set())
    if written or role == "tool":
        left_out = find_unwritten(tokenizer, role, keys, has_tools)
        for key in sorted(left_out):
            if key in GIVEN:
                unused.add(f"turn.{key}")
            elif key == "content" and role != "assistant":
                raise refuse_unwritten(f"turn {number} ({role})")
            elif key != "content":
                raise refuse_unwritten(f"{thought if key in THOUGHT_KEYS else key} of turn {number}")
    return _fit_calls(turn, find_call_form(tokenizer, has_tools)) if "tool_calls" in turn else turn


def refuse_unwritten(what: str) -> BadRecord:
    """Return the error for a record of which the template leaves something out."""
    return BadRecord(f"the chat template does not write {what}", f"{OTHER_TEMPLATE}, or remove the record")


def _fit_calls(turn: Message, form: CallForm) -> Message:
    calls = turn["tool_calls"]
    if form.as_text:
        calls = [call | {"function": call["function"] | {"arguments": _as_json(call["function"]["arguments"])}} for call in calls]
    return turn | {"tool_calls": calls, "content": turn["content"] or form.content}


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# What a template writes of made-up turns


def sample_answer(number: int, tokenizer: "PreTrainedTokenizerBase", has_tools: bool = False) -> Message:
    """Return an answer that makes a call which no record has, in the form that the template needs."""
    return _sample_turn("assistant", {"tool_calls": number}, tokenizer, has_tools)


def _sample_turn(role: str, numbers: dict[str, int], tokenizer: "PreTrainedTokenizerBase", has_tools: bool) -> Message:
    """Return a made-up turn with these keys, whose values differ for different numbers."""
    turn: Message = {"role": role, "content": ""} | {key: f"qz{number}{key}" for key, number in numbers.items()}
    if number := numbers.get("tool_call_id"):
        turn["tool_call_id"] = f"call0000{number}"  # Mistral's templates accept nine letters and digits only
    if number := numbers.get("tool_calls"):
        turn["tool_calls"] = [_sample_call(number)]
        return _fit_calls(turn, find_call_form(tokenizer, has_tools))
    return turn


def _sample_call(number: int) -> dict[str, Any]:
    function = {"name": f"qz{number}name", "arguments": {f"qz{number}key": f"qz{number}value"}}
    return {"id": "call00001", "type": "function", "function": function}


def _sample_tools(number: int) -> Tools:
    properties = {f"qz{number}key": {"type": "string", "description": "qz"}}
    parameters = {"type": "object", "properties": properties, "required": [f"qz{number}key"]}
    return [{"type": "function", "function": {"name": f"qz{number}name", "description": "qz", "parameters": parameters}}]


def _render(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", tools: int = 0) -> str | None:
    """Return the rendering with a made-up tool of this number, or none for 0; None if the template refuses it."""
    try:
        return apply_chat_template(messages, tokenizer, tools=_sample_tools(tools) if tools else None)
    except BadRecord:
        return None


@lru_cache(maxsize=16)
def find_call_form(tokenizer: "PreTrainedTokenizerBase", has_tools: bool) -> CallForm:
    """Return the first form of a call that the template writes as JSON would be written; objects and empty text if there is none.

    If it can be, the form is one that also works when a tool's result and an answer follow.
    """
    following: list[Message] = [
        {"role": "tool", "content": "qz", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "qz"},
    ]
    for after, as_text, content in product((following, []), (False, True), (None, "")):
        form = CallForm(as_text, content)
        answer = _fit_calls({"role": "assistant", "content": None, "tool_calls": [_sample_call(1)]}, form)
        texts = [_render([USER, answer, *then], tokenizer, has_tools) or "" for then in (after, [])]
        if all(map(_has_sample_call, texts)):
            return form
    return CallForm(False, "")


def _has_sample_call(text: str) -> bool:
    """Return whether a call is written, without Python's notation of an object, JSON within JSON, or the word None."""
    text = text.rpartition(USER["content"])[2]
    wrong = ("'qz1key'", '\\"qz1key', "None")
    return all(f"qz1{part}" in text for part in ("name", "key", "value")) and not any(one in text for one in wrong)


@lru_cache(maxsize=16)
def writes_tools(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the template writes the tools that the assistant may call; True if it refuses the made-up ones."""
    turns = [USER, {"role": "assistant", "content": "qz1words"}]
    first, second = (_render(turns, tokenizer, tools) for tools in (1, 2))
    return first is None or first != second


@lru_cache(maxsize=16)
def writes_calls(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the template writes the calls of an answer; False if it refuses the made-up ones."""
    first, second = (_render([USER, sample_answer(number, tokenizer)], tokenizer) for number in (1, 2))
    return first != second


@lru_cache(maxsize=256)
def find_unwritten(tokenizer: "PreTrainedTokenizerBase", role: str, keys: frozenset[str], has_tools: bool) -> frozenset[str]:
    """Return those keys of a turn that the template does not write; none if it refuses the made-up turns.

    Args:
        keys: all that the turn has, because a template may write a key only beside another.
    """
    return frozenset(key for key in keys if not _is_written(key, role, keys, tokenizer, has_tools))


def _is_written(key: str, role: str, keys: frozenset[str], tokenizer: "PreTrainedTokenizerBase", has_tools: bool) -> bool:
    words = _sample_turn("assistant", {"content": 1}, tokenizer, has_tools)
    before: list[list[Message]] = [[USER]] if role == "assistant" else [[]]
    if role == "tool":  # after a call, or after a call that the words make
        before = [[USER, sample_answer(1, tokenizer, has_tools)], [USER, words]]
    after = {"assistant": [], "system": [USER, words]}.get(role, [words])
    for earlier in before:
        turns = [_sample_turn(role, dict.fromkeys(keys, 1) | {key: number}, tokenizer, has_tools) for number in (1, 2)]
        first, second = (_render([*earlier, turn, *after], tokenizer, has_tools) for turn in turns)
        if first is not None and second is not None:
            return first != second
    return True
