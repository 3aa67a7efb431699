"""Render chats and ready-made instructions as pieces of text that are trained or not.

The content of a turn is never read as control tokens: a `<|im_end|>` in it ends no turn and is encoded with ordinary tokens.
Ready-made text keeps its control tokens.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

from qlora_kit.data.chat_template import (
    Message,
    Span,
    apply_chat_template,
    build_control_token_pattern,
    find_answer_spans,
)
from qlora_kit.data.formats import INSTRUCTION, RESPONSE
from qlora_kit.errors import BadRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]
CUT = "\ud800"  # cuts a control token in a turn's content in two; half a character, so no text holds it


class Piece(NamedTuple):
    """A piece of a rendered record. Each piece is tokenized on its own; pieces must not be joined before."""

    text: str
    trained: bool


def render_chat(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn = "assistant") -> list[Piece]:
    """Render a conversation for training, cut where trained text begins and ends.

    Each answer is trained together with the token that ends its turn, so that the model learns to stop; what the template writes
    after that token is not trained. The pieces joined are the whole rendering.

    Args:
        train_on: `assistant` trains every answer, `last` the last answer, `all` the whole rendering.

    Raises:
        BadRecord: as apply_chat_template and find_answer_spans.
    """
    turns = _split_control_tokens(messages, tokenizer)
    whole = apply_chat_template(turns, tokenizer)
    if train_on == "all":
        return _cut_into_pieces(whole, [(0, len(whole))])
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    answers = answers[-1:] if train_on == "last" else answers
    wanted = [number for number in answers if messages[number].get("weight") != 0]
    return _cut_into_pieces(whole, find_answer_spans(turns, whole, wanted, tokenizer))


def render_prompt(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn = "assistant") -> list[Piece]:
    """Render a conversation that waits for an answer, with the same pieces that render_chat gives up to that answer.

    Raises:
        BadRecord: as apply_chat_template.
    """
    turns = _split_control_tokens(messages, tokenizer)
    whole = apply_chat_template(turns, tokenizer, add_generation_prompt=True)
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    try:
        return _cut_into_pieces(whole, find_answer_spans(turns, whole, answers if train_on == "assistant" else [], tokenizer))
    except (
        BadRecord
    ):  # the template changes earlier answers (it drops their thoughts), so only a last answer can have been trained
        return _cut_into_pieces(whole, [])


def _split_control_tokens(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> list[Message]:
    """Return the messages with each control token in their content cut in two, so that ordinary tokens encode it."""
    control = build_control_token_pattern(tokenizer)
    return [
        {"role": message["role"], "content": control.sub(lambda token: token[0][0] + CUT + token[0][1:], message["content"])}
        for message in messages
    ]


def render_instruction(text: str, end: str, train_on: TrainOn = "assistant") -> list[Piece]:
    """Cut ready-made `### Instruction: ... ### Response: ...` text of one or more rounds; responses are trained with an end.

    Args:
        end: the text of the token that ends a response.

    Raises:
        BadRecord: an instruction has no response, or `end` is empty.
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
    """Cut a rendering at the spans, which are trained, and at each CUT, which is removed."""
    pieces, at = [], 0
    for start, stop in [*spans, (len(whole), len(whole))]:
        for text, trained in ((whole[at:start], False), (whole[start:stop], True)):
            pieces += [Piece(part, trained) for part in text.split(CUT) if part]
        at = stop
    return pieces
