"""Records as people bring them -> chat messages or text -> pieces of text, each trained on or not.

Pure functions on dicts. A record is one of

    alpaca       {"instruction": ..., "input": ... (may be empty or missing), "output": ...}
    sharegpt     {"conversations": [{"from": "human" | "gpt" | "system", "value": ...}, ...]}
    messages     {"messages": [{"role": "user" | "assistant" | "system", "content": ...}, ...]}
    completion   {"prompt": ..., "completion": ...}, both text or both lists of messages
    instruction  {"text": "### Instruction: ... ### Response: ..."}, ready made
    text         {"text": ...}, or another column named by data.text_field

Other keys, of a record or of a turn, are left alone; only `weight` counts: an answer of weight 0 is context and never trained.

Chats are rendered by chat.py. What a turn says stays words: a `<|im_end|>` in it ends no turn, ordinary tokens spell it out. Text
that is ready made is taken as it is. Imports no torch.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from qlora_kit.data.chat_template import Message, Span, apply_chat_template, build_control_token_pattern, find_answer_spans
from qlora_kit.errors import BadRecord

TrainOn = Literal["assistant", "last", "all"]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
RESPONSE = re.compile(r"### Response:[ \t]*\r?\n?")
INSTRUCTION = re.compile(r"### Instruction:")
CUT = "\ud800"  # half a character, so that no text holds it: where a control token among the words is cut in two


class Piece(NamedTuple):
    """A stretch of a rendered record. Each piece is tokenized by itself: pieces must not be joined before."""

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
    text = instruction_template.format(instruction=_read_text(record, "instruction"))
    if given := _read_text(record, "input", ""):
        text += input_template.format(input=given)
    return text + response_template.format(output=_read_text(record, "output"))


def sharegpt_to_text(
    record: dict[str, Any], human_template: str = "User: {message}\n", assistant_template: str = "Assistant: {message}\n"
) -> str:
    """A ShareGPT record as one text, its turns one after the other."""
    templates = {"user": human_template, "assistant": assistant_template, "system": "System: {message}\n"}
    turns = [templates[message["role"]].format(message=message["content"]) for message in from_sharegpt(record)]
    return "".join(turns).strip()


# Records -> messages


def recognise_format(record: dict[str, Any], text_field: str = "text") -> str:
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
        f"the keys are {', '.join(map(str, record)) or 'none'}, expected messages, conversations, instruction and output, "
        f"prompt and completion, or {text_field} (data.text_field)"
    )


def from_alpaca(record: dict[str, Any]) -> list[Message]:
    """One user turn (instruction, and input below it) and one assistant turn."""
    instruction, given, output = _read_text(record, "instruction"), _read_text(record, "input", ""), _read_text(record, "output")
    return _build_round(f"{instruction}\n\n{given}" if given.strip() else instruction, output)


def from_sharegpt(record: dict[str, Any]) -> list[Message]:
    return _check_order(_read_turns(record, "conversations", ("from", "role"), ("value", "content")))


def from_messages(record: dict[str, Any]) -> list[Message]:
    return _check_order(_read_turns(record, "messages", ("role", "from"), ("content", "value")))


def from_completion(record: dict[str, Any]) -> list[Message]:
    """Prompt and completion, both text or both lists of messages; answers within a prompt are context."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _build_round(_read_text(record, "prompt"), _read_text(record, "completion"))
    before, after = (_read_turns(record, key, ("role", "from"), ("content", "value")) for key in ("prompt", "completion"))
    return _check_order([message | {"weight": 0} for message in before] + after)


READERS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "alpaca": from_alpaca, "sharegpt": from_sharegpt, "messages": from_messages, "completion": from_completion,
}  # fmt: skip


def _build_round(user: str, assistant: str) -> list[Message]:
    return _check_order([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


def _read_text(record: dict[str, Any], key: str, missing: str | None = None) -> str:
    value = record.get(key)
    if value is None and missing is not None:
        return missing
    if key not in record:
        raise BadRecord(f"{key} is missing, expected text")
    return require_text(value, key)


def require_text(value: Any, what: str) -> str:
    """The text itself.

    Raises:
        BadRecord: it is not text, or holds what text cannot: NUL, or half a character (an emoji's `\\ud83d` alone, in JSON).
    """
    if not isinstance(value, str):
        raise BadRecord(f"{what} holds {type(value).__name__}, expected text")
    if "\0" in value:
        raise BadRecord(f"{what} holds NUL at character {value.index(chr(0)) + 1}, expected text")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{what} holds half a character (a lone surrogate) at character {error.start + 1}") from None
    return value


def _read_turns(record: dict[str, Any], key: str, role_keys: tuple[str, str], content_keys: tuple[str, str]) -> list[Message]:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        what = "no turn" if isinstance(turns, list) else type(turns).__name__
        raise BadRecord(f"{key} holds {what}, expected a list of turns")
    return [_read_turn(turn, f"turn {number} of {key}", role_keys, content_keys) for number, turn in enumerate(turns, 1)]


def _read_turn(turn: Any, where: str, role_keys: tuple[str, str], content_keys: tuple[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise BadRecord(f"{where} is {type(turn).__name__}, expected {role_keys[0]} and {content_keys[0]}")
    role_key = next((name for name in role_keys if name in turn), role_keys[0])
    content_key = next((name for name in content_keys if name in turn), content_keys[0])
    role, weight = turn.get(role_key), turn.get("weight")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(f"{where} has {role_key} {role!r}, expected {', '.join(ROLES)}")
    if weight not in (None, 0, 1):
        raise BadRecord(f"{where} has weight {weight!r}, expected 0 or 1")
    message = {"role": ROLES[role], "content": require_text(turn.get(content_key), f"{content_key} of {where}")}
    return message | {"weight": 0} if weight == 0 else message


def _check_order(messages: list[Message]) -> list[Message]:
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
                f"turn {place} is {message['role']}, expected {expected}: user and assistant take turns, system only first"
            )
        if expected == "assistant" and not message["content"].strip():
            raise BadRecord("an answer is empty, expected text to train on")
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRecord("the last turn is no answer, expected an assistant turn")
    return messages


# Messages -> pieces


def render_chat(messages: list[Message], tokenizer: Any, train_on: TrainOn = "assistant") -> list[Piece]:
    """A conversation as it is rendered for training, cut where what is trained begins and ends.

    Each answer is trained together with the token that ends its turn, so that the model learns to stop; what the template puts
    behind that token is not. The pieces joined are the whole rendering.

    Args:
        train_on: the answers of `assistant`, the `last` one only, or `all`: the whole rendering.

    Raises:
        BadRecord: as apply_chat_template and find_answer_spans do.
    """
    turns = _split_control_tokens(messages, tokenizer)
    whole = apply_chat_template(turns, tokenizer)
    if train_on == "all":
        return _cut_into_pieces(whole, [(0, len(whole))])
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    answers = answers[-1:] if train_on == "last" else answers
    wanted = [number for number in answers if messages[number].get("weight") != 0]
    return _cut_into_pieces(whole, find_answer_spans(turns, whole, wanted, tokenizer))


def render_prompt(messages: list[Message], tokenizer: Any, train_on: TrainOn = "assistant") -> list[Piece]:
    """A conversation that waits for an answer: the pieces that render_chat would give up to that answer.

    Raises:
        BadRecord: as apply_chat_template does.
    """
    turns = _split_control_tokens(messages, tokenizer)
    whole = apply_chat_template(turns, tokenizer, add_generation_prompt=True)
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    try:
        return _cut_into_pieces(whole, find_answer_spans(turns, whole, answers if train_on == "assistant" else [], tokenizer))
    except BadRecord:  # earlier answers are written otherwise, as without their thoughts: only a last one could be trained
        return _cut_into_pieces(whole, [])


def _split_control_tokens(messages: list[Message], tokenizer: Any) -> list[Message]:
    """Each control token among the words cut in two, so that ordinary tokens spell it out."""
    control = build_control_token_pattern(tokenizer)
    return [
        {"role": message["role"], "content": control.sub(lambda token: token[0][0] + CUT + token[0][1:], message["content"])}
        for message in messages
    ]


def render_instruction(text: str, end: str, train_on: TrainOn = "assistant") -> list[Piece]:
    """Ready-made `### Instruction: ... ### Response: ...` text of one or more rounds: responses are trained, each with an end.

    Args:
        end: the text of the token that ends a response.

    Raises:
        BadRecord: an instruction without a response, or no `end`.
    """
    if not end:
        raise BadRecord("the tokenizer has no end-of-sequence token, so the model would not learn to stop")
    whole, spans, at = "", [], 0
    while response := RESPONSE.search(text, at):
        following = INSTRUCTION.search(text, response.end())
        stop = following.start() if following else len(text)
        answer = text[response.end() : stop].rstrip()
        words = answer.removesuffix(end)
        if not words.strip():
            raise BadRecord("a response is empty, expected text to train on")
        whole += text[at : response.end()] + words + end
        spans.append((len(whole) - len(words + end), len(whole)))
        whole += text[response.end() + len(answer) : stop] if following else ""
        at = stop
    if not spans or at < len(text):
        raise BadRecord("the text ends with an instruction, expected ### Response: after it")
    if train_on == "all":
        spans = [(0, len(whole))]
    return _cut_into_pieces(whole, spans[-1:] if train_on == "last" else spans)


def _cut_into_pieces(whole: str, spans: list[Span]) -> list[Piece]:
    """A rendering cut at the spans, which are trained, and at each CUT, which is left out."""
    pieces, at = [], 0
    for start, stop in [*spans, (len(whole), len(whole))]:
        for stretch, trained in ((whole[at:start], False), (whole[start:stop], True)):
            pieces += [Piece(text, trained) for text in stretch.split(CUT) if text]
        at = stop
    return pieces
