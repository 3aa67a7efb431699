"""Turn records of the known formats into chat messages.

A record is one of

    alpaca       {"instruction": ..., "input": ... (may be empty or missing), "output": ...}
    sharegpt     {"conversations": [{"from": "human" | "gpt" | "system", "value": ...}, ...]}
    messages     {"messages": [{"role": "user" | "assistant" | "system", "content": ...}, ...]}
    completion   {"prompt": ..., "completion": ...}, both text or both lists of messages
    instruction  {"text": "### Instruction: ... ### Response: ..."}, ready-made
    text         {"text": ...}, or another column named by data.text_field

Other keys of a record or turn are ignored, except `weight`: an answer of weight 0 is context and never trained.
"""

import re
from collections.abc import Callable
from typing import Any

from qlora_kit.data.chat_template import Message
from qlora_kit.errors import BadRecord

Record = dict[str, Any]  # as JSON gives it

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
RESPONSE = re.compile(r"### Response:[ \t]*\r?\n?")
INSTRUCTION = re.compile(r"### Instruction:")


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
    turns = [templates[message["role"]].format(message=message["content"]) for message in from_sharegpt(record)]
    return "".join(turns).strip()


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


def from_alpaca(record: Record) -> list[Message]:
    """Return one user turn, the instruction with the input below it, and one assistant turn."""
    instruction, given, output = _read_text(record, "instruction"), _read_text(record, "input", ""), _read_text(record, "output")
    return _build_round(f"{instruction}\n\n{given}" if given.strip() else instruction, output)


def from_sharegpt(record: Record) -> list[Message]:
    """Return the turns of a ShareGPT record."""
    return _check_order(_read_turns(record, "conversations", ("from", "role"), ("value", "content")))


def from_messages(record: Record) -> list[Message]:
    """Return the turns of a record of messages."""
    return _check_order(_read_turns(record, "messages", ("role", "from"), ("content", "value")))


def from_completion(record: Record) -> list[Message]:
    """Return the turns of a prompt and its completion; answers in the prompt have weight 0."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _build_round(_read_text(record, "prompt"), _read_text(record, "completion"))
    before, after = (_read_turns(record, key, ("role", "from"), ("content", "value")) for key in ("prompt", "completion"))
    return _check_order([message | {"weight": 0} for message in before] + after)


READERS: dict[str, Callable[[Record], list[Message]]] = {
    "alpaca": from_alpaca, "sharegpt": from_sharegpt, "messages": from_messages, "completion": from_completion,
}  # fmt: skip


def _build_round(user: str, assistant: str) -> list[Message]:
    return _check_order([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


def _read_text(record: Record, key: str, default: str | None = None) -> str:
    value = record.get(key)
    if value is None and default is not None:
        return default
    if key not in record:
        raise BadRecord(f"{key} is missing, expected text")
    return require_text(value, key)


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


def _read_turns(record: Record, key: str, role_keys: tuple[str, str], content_keys: tuple[str, str]) -> list[Message]:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        found = "no turn" if isinstance(turns, list) else type(turns).__name__
        raise BadRecord(f"{key} holds {found}, expected a list of turns")
    return [_read_turn(turn, f"turn {number} of {key}", role_keys, content_keys) for number, turn in enumerate(turns, 1)]


def _read_turn(turn: object, name: str, role_keys: tuple[str, str], content_keys: tuple[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise BadRecord(f"{name} is {type(turn).__name__}, expected {role_keys[0]} and {content_keys[0]}")
    role_key = next((key for key in role_keys if key in turn), role_keys[0])
    content_key = next((key for key in content_keys if key in turn), content_keys[0])
    role, weight = turn.get(role_key), turn.get("weight")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(f"{name} has {role_key} {role!r}, expected {', '.join(ROLES)}")
    if weight not in (None, 0, 1):
        raise BadRecord(f"{name} has weight {weight!r}, expected 0 or 1")
    message = {"role": ROLES[role], "content": require_text(turn.get(content_key), f"{content_key} of {name}")}
    return message | {"weight": 0} if weight == 0 else message


def _check_order(messages: list[Message]) -> list[Message]:
    """Return messages that begin with at most one system turn, then alternate between user and assistant, and end with an answer.

    Raises:
        BadRecord: the order is another, or an answer is empty.
    """
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            turn = number + 1 + len(messages) - len(turns)
            raise BadRecord(
                f"turn {turn} is {message['role']}, expected {expected}: user and assistant take turns, system only first"
            )
        if expected == "assistant" and not message["content"].strip():
            raise BadRecord("an answer is empty, expected text to train on")
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRecord("the last turn is no answer, expected an assistant turn")
    return messages
