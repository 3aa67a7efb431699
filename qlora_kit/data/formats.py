"""Turn records of the known formats into chats.

A record is one of

    alpaca       {"instruction": ..., "input": ... (may be empty or missing), "output": ...}
    sharegpt     {"conversations": [{"from": "human" | "gpt" | "system" | "observation" ..., "value": ...}, ...]}
    messages     {"messages": [{"role": "user" | "assistant" | "system" | "tool" ..., "content": ...}, ...]}
    completion   {"prompt": ..., "completion": ...}, both text or both lists of messages
    instruction  {"text": "### Instruction: ... ### Response: ..."}, ready-made
    text         {"text": ...}, or another column named by data.text_field

Of its other keys, `system`, `history` and `tools` are used under all their usual names, and so is a switch such as `train` or
`weight`, which says whether its answers are trained. Those that would change the text otherwise are refused. The names of the
others are kept, for the preview and the log to list them. turns.py says the same of the keys of a turn.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from qlora_kit.data.apply_template import Message
from qlora_kit.data.fields import (
    HISTORY,
    REFUSED,
    SYSTEM,
    TOOLS,
    find_meaning,
    is_empty,
    parse_json_text,
    read_weight,
    require_text,
)
from qlora_kit.data.tool_calls import JsonObject, read_tools
from qlora_kit.data.turns import check_order, read_turns
from qlora_kit.errors import BadRecord

Record = dict[str, Any]  # as JSON gives it

RESPONSE = re.compile(r"### Response:[ \t]*\r?\n?")
INSTRUCTION = re.compile(r"### Instruction:")


class Chat(NamedTuple):
    """A conversation that ends with an answer."""

    messages: list[Message]
    tools: list[JsonObject] | None = None  # that the assistant may call
    unused: frozenset[str] = frozenset()  # keys of the record, and `turn.KEY` of its turns, that nothing uses
    contexts: int = 0  # the number of first turns whose answers are not trained, unless everything is


def alpaca_to_text(
    record: Record,
    instruction_template: str = "### Instruction:\n{instruction}\n\n",
    input_template: str = "### Input:\n{input}\n\n",
    response_template: str = "### Response:\n{output}",
) -> str:
    """Return an Alpaca record as one text, without a chat template; a record without input has no input section."""
    text = instruction_template.format(instruction=_read_text(record, "instruction"))
    if given := _read_text(record, "input", ""):
        text += input_template.format(input=given)
    return text + response_template.format(output=_read_text(record, "output"))


def sharegpt_to_text(
    record: Record, human_template: str = "User: {message}\n", assistant_template: str = "Assistant: {message}\n"
) -> str:
    """Return a ShareGPT record as one text, without a chat template."""
    templates = {"user": human_template, "assistant": assistant_template, "system": "System: {message}\n"}
    messages = from_sharegpt(record).messages
    if any(message["role"] not in templates or message["content"] is None for message in messages):
        raise BadRecord("tool calls need a chat template")
    return "".join(templates[message["role"]].format(message=message["content"]) for message in messages).strip()


def recognise_format(record: Record, text_field: str = "text") -> str:
    """Return the format of a record, recognised by its keys.

    Raises:
        BadRecord: the keys belong to no format.
    """
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "sharegpt"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if "prompt" in record and "completion" in record:
        return "completion"
    if text_field in record:
        text = record[text_field]
        return "instruction" if isinstance(text, str) and INSTRUCTION.search(text) and RESPONSE.search(text) else "text"
    raise BadRecord(
        f"the keys are {', '.join(map(str, record)) or 'none'}, expected messages, conversations, instruction and output, "
        f"prompt and completion, or {text_field} (data.text_field)"
    )


def from_alpaca(record: Record) -> Chat:
    """Return one user turn, the instruction with the input below it, and one assistant turn."""
    instruction, given, output = _read_text(record, "instruction"), _read_text(record, "input", ""), _read_text(record, "output")
    return _build_round(
        record, ("instruction", "input", "output"), f"{instruction}\n\n{given}" if given.strip() else instruction, output
    )


def from_sharegpt(record: Record) -> Chat:
    """Return the turns of a ShareGPT record."""
    unused: set[str] = set()
    turns = read_turns(record.get("conversations"), "conversations", unused, openai=False)
    return _build_chat(record, ("conversations",), turns, unused)


def from_messages(record: Record) -> Chat:
    """Return the turns of a record of messages."""
    unused: set[str] = set()
    return _build_chat(record, ("messages",), read_turns(record.get("messages"), "messages", unused), unused)


def from_completion(record: Record) -> Chat:
    """Return the turns of a prompt and its completion; the turns before the completion are context."""
    prompt, completion = record.get("prompt"), record.get("completion")
    keys = ("prompt", "completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        chat = _build_round(record, keys, _read_text(record, "prompt"), _read_text(record, "completion"))
        return chat._replace(contexts=len(chat.messages) - 1)
    unused: set[str] = set()
    before, answer = (read_turns(record.get(key), key, unused) for key in keys)
    chat = _build_chat(record, keys, before + answer, unused)
    return chat._replace(contexts=len(chat.messages) - len(answer))


READERS: dict[str, Callable[[Record], Chat]] = {
    "alpaca": from_alpaca, "sharegpt": from_sharegpt, "messages": from_messages, "completion": from_completion,
}  # fmt: skip


def _build_round(record: Record, keys: tuple[str, ...], user: str, assistant: str) -> Chat:
    return _build_chat(record, keys, [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], set())


def _build_chat(record: Record, keys: tuple[str, ...], turns: list[Message], unused: set[str]) -> Chat:
    """Return the turns with what the record's other keys add to them.

    Args:
        keys: those that hold the turns.

    Raises:
        BadRecord: a key is not supported, or the turns are in no order that a chat can have.
    """
    tools = None
    if others := {key: value for key, value in record.items() if key not in keys}:
        found = _sort_by_meaning(others, unused)
        for key, value in found[HISTORY].items():
            turns = _join(_read_history(value, key, unused), turns)
        turns = _begin_with_system(found[SYSTEM], turns)
        for key, value in found[TOOLS].items():
            tools = (tools or []) + read_tools(value, key)
        if read_weight(others.items(), False, "") == 0:
            for message in turns:
                message["weight"] = 0
    return Chat(check_order(turns), tools or None, frozenset(unused))


def _sort_by_meaning(others: Record, unused: set[str]) -> dict[str, Record]:
    """Return the keys that hold something by what they mean; the names of those that mean nothing here are added to `unused`."""
    found: dict[str, Record] = {SYSTEM: {}, HISTORY: {}, TOOLS: {}}
    for key, value in others.items():
        if is_empty(value):
            continue
        meaning = find_meaning(key, of_turn=False)
        if meaning in REFUSED:
            raise BadRecord(f"{key} is not supported", REFUSED[meaning])
        if meaning is None:
            unused.add(str(key))
        elif meaning in found:
            found[meaning][key] = value
    return found


def _begin_with_system(found: Record, turns: list[Message]) -> list[Message]:
    """Return the turns behind the system text that the record names, unless they begin with the same one."""
    for key, value in found.items():
        text = require_text(value, key)
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": text}, *turns]
        elif turns[0]["content"].strip() != text.strip():
            raise BadRecord(f"{key} holds another text than the system turn, expected one of them")
    return turns


def _read_history(value: object, key: str, unused: set[str]) -> list[Message]:
    """Return earlier rounds: pairs of what the user and the assistant said, or turns."""
    rounds = parse_json_text(value, key)
    if not isinstance(rounds, list) or not all(isinstance(one, list | dict) for one in rounds):
        raise BadRecord(f"{key} holds {type(rounds).__name__}, expected a list of pairs [user, assistant] or of turns")
    if all(isinstance(one, dict) for one in rounds):
        return read_turns(rounds, key, unused)
    turns: list[Message] = []
    for number, pair in enumerate(rounds, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord(f"round {number} of {key} is no pair, expected [user, assistant]")
        user, assistant = (require_text(text, f"round {number} of {key}") for text in pair)
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return turns


def _join(earlier: list[Message], turns: list[Message]) -> list[Message]:
    """Return earlier turns before the others, behind a system turn of these."""
    system = turns[:1] if turns[0]["role"] == "system" else []
    return [*system, *earlier, *turns[len(system) :]]


def _read_text(record: Record, key: str, default: str | None = None) -> str:
    value = record.get(key)
    if value is None and default is not None:
        return default
    if key not in record:
        raise BadRecord(f"{key} is missing, expected text")
    return require_text(value, key)
