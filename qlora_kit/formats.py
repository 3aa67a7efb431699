"""Records as people bring them -> chat messages or text -> pieces of text, each trained on or not.

Pure functions on dicts. A record is one of

    alpaca       {"instruction": ..., "input": ... (may be empty or missing), "output": ...}
    sharegpt     {"conversations": [{"from": "human" | "gpt" | "system", "value": ...}, ...]}
    messages     {"messages": [{"role": "user" | "assistant" | "system", "content": ...}, ...]}
    completion   {"prompt": ..., "completion": ...}
    instruction  {"text": "### Instruction: ... ### Response: ..."}, ready made
    text         {"text": ...}, or another column named by data.text_field

Chats are rendered by the tokenizer's own chat template, else as `Role: content` lines (_by_fallback). Imports no torch.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Message = dict[str, str]  # role: system, user or assistant; content
TrainOn = Literal["assistant", "last", "all"]

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
RESPONSE = re.compile(r"### Response:[ \t]*\n?")
INSTRUCTION = re.compile(r"### Instruction:")


class BadRecord(ValueError):
    """What is wrong with a record and what was expected; the reader of the file adds its place."""


class Piece(NamedTuple):
    """A stretch of a rendered record."""

    text: str
    trained: bool


# Templates of plain text, without a chat template


def alpaca_to_text(
    record: dict[str, Any],
    instruction_template: str = "### Instruction:\n{instruction}\n\n",
    input_template: str = "### Input:\n{input}\n\n",
    response_template: str = "### Response:\n{output}",
) -> str:
    """An Alpaca record as one text; a record without input has no input section."""
    text = instruction_template.format(instruction=record["instruction"])
    if record.get("input"):
        text += input_template.format(input=record["input"])
    return text + response_template.format(output=record["output"])


def sharegpt_to_text(
    record: dict[str, Any], human_template: str = "User: {message}\n", assistant_template: str = "Assistant: {message}\n"
) -> str:
    """A ShareGPT record as one text, its turns one after the other."""
    templates = {"user": human_template, "assistant": assistant_template, "system": "System: {message}\n"}
    turns = [templates[message["role"]].format(message=message["content"]) for message in from_sharegpt(record)]
    return "".join(turns).strip()


def apply_chat_template(messages: list[Message], tokenizer: Any) -> str:
    """Messages through the tokenizer's own chat template, else as `Role: content` lines."""
    return _renderer(tokenizer, end="")(messages, False)


# Records -> messages


def recognise(record: dict[str, Any], text_field: str = "text") -> str:
    """The format of a record, from its keys.

    Raises:
        BadRecord: the keys are those of no format.
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
        f"has the keys {', '.join(map(str, record)) or 'none'}; expected messages, conversations, instruction and output, "
        f"prompt and completion, or {text_field}"
    )


def from_alpaca(record: dict[str, Any]) -> list[Message]:
    """One user turn (instruction, and input below it) and one assistant turn."""
    instruction, given, output = _text(record, "instruction"), _text(record, "input", ""), _text(record, "output")
    user = f"{instruction}\n\n{given}" if given.strip() else instruction
    return _checked([{"role": "user", "content": user}, {"role": "assistant", "content": output}])


def from_sharegpt(record: dict[str, Any]) -> list[Message]:
    return _turns(record, "conversations", ("from", "role"), ("value", "content"))


def from_messages(record: dict[str, Any]) -> list[Message]:
    return _turns(record, "messages", ("role", "from"), ("content", "value"))


def from_completion(record: dict[str, Any]) -> list[Message]:
    return _checked(
        [{"role": "user", "content": _text(record, "prompt")}, {"role": "assistant", "content": _text(record, "completion")}]
    )


READERS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "alpaca": from_alpaca, "sharegpt": from_sharegpt, "messages": from_messages, "completion": from_completion,
}  # fmt: skip


def _text(record: dict[str, Any], key: str, missing: str | None = None) -> str:
    value = record.get(key)
    if value is None and missing is not None:
        return missing
    if not isinstance(value, str):
        what = "is missing" if key not in record else f"holds {type(value).__name__}"
        raise BadRecord(f"{key} {what}; expected text")
    return value


def _turns(record: dict[str, Any], key: str, role_keys: tuple[str, str], content_keys: tuple[str, str]) -> list[Message]:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRecord(
            f"{key} holds {type(turns).__name__ if not isinstance(turns, list) else 'no turn'}; expected a list of turns"
        )
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRecord(f"turn {number} of {key} is {type(turn).__name__}; expected {role_keys[0]} and {content_keys[0]}")
        role_key = next((name for name in role_keys if name in turn), role_keys[0])
        content_key = next((name for name in content_keys if name in turn), content_keys[0])
        role, content = turn.get(role_key), turn.get(content_key)
        if role not in ROLES:
            raise BadRecord(f"turn {number} of {key} has {role_key} {role!r}; expected {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRecord(f"turn {number} of {key} holds {type(content).__name__} as {content_key}; expected text")
        messages.append({"role": ROLES[role], "content": content})
    return _checked(messages)


def _checked(messages: list[Message]) -> list[Message]:
    """System first if at all, then user and assistant in turn, the assistant last.

    Raises:
        BadRecord: another order, or an answer without words.
    """
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            place = number + 1 + len(messages) - len(turns)
            raise BadRecord(
                f"turn {place} is {message['role']}; expected {expected}: user and assistant take turns, system only first"
            )
        if expected == "assistant" and not message["content"].strip():
            raise BadRecord("an answer is empty; expected text to train on")
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRecord("ends without an answer; expected an assistant turn last")
    return messages


# Messages -> pieces


def chat_pieces(messages: list[Message], tokenizer: Any, train_on: TrainOn = "assistant") -> list[Piece]:
    """A conversation as it is rendered for training, cut where what is trained begins and ends.

    Each answer is trained together with the token that ends its turn, so that the model learns to stop; what the template puts
    behind that token is not. The pieces joined are the whole rendering.

    Args:
        train_on: the answers of `assistant`, the `last` one only, or `all`: prompts as well.

    Raises:
        BadRecord: the template renders an answer otherwise once more turns follow.
    """
    render = _renderer(tokenizer, tokenizer.eos_token or "")
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    pieces, done = [], ""
    for number in answers:
        prompt, whole = render(messages[:number], True), render(messages[: number + 1], False)
        if not (whole.startswith(prompt) and prompt.startswith(done)):
            raise BadRecord(f"the chat template changes what stands before turn {number + 1}; expected it to append only")
        answer = whole[len(prompt) :]
        end = answer.rfind(tokenizer.eos_token or "\0")
        stop = end + len(tokenizer.eos_token) if end >= 0 else len(answer)
        wanted = train_on != "last" or number == answers[-1]
        pieces += [Piece(prompt[len(done) :], train_on == "all"), Piece(answer[:stop], wanted), Piece(answer[stop:], False)]
        done = whole
    return [piece for piece in pieces if piece.text]


def instruction_pieces(text: str, end: str) -> list[Piece]:
    """Ready-made `### Instruction: ... ### Response: ...` text of one or more turns: responses and an end token are trained."""
    pieces, at = [], 0
    for response in RESPONSE.finditer(text):
        if response.start() < at:
            continue
        following = INSTRUCTION.search(text, response.end())
        stop = following.start() if following else len(text)
        answer = text[response.end() : stop]
        pieces += [Piece(text[at : response.end()], False), Piece(answer.rstrip() + end, True)]
        pieces.append(Piece(answer[len(answer.rstrip()) :] if following else "", False))
        at = stop
    return [piece for piece in pieces if piece.text]


def _renderer(tokenizer: Any, end: str) -> Callable[[list[Message], bool], str]:
    """Messages, and whether the beginning of an answer follows -> text."""
    if not getattr(tokenizer, "chat_template", None):
        return _by_fallback(end)
    return lambda messages, prompting: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)


def _by_fallback(end: str) -> Callable[[list[Message], bool], str]:
    """`Role: content` a line, the end token after each answer: for tokenizers without a chat template."""

    def render(messages: list[Message], prompting: bool) -> str:
        lines = [
            f"{message['role'].capitalize()}: {message['content']}{end if message['role'] == 'assistant' else ''}\n"
            for message in messages
        ]
        return "".join(lines) + ("Assistant: " if prompting else "")

    return render
