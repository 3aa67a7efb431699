"""Render chats and ready-made instructions as one text each, in pieces that are trained or not.

The content of a turn is never read as control tokens: a `<|im_end|>` in it ends no turn and is encoded with ordinary tokens.
Ready-made text keeps its control tokens.
"""

from contextlib import suppress
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
    """A piece of a text: an answer with its end, or what stands before, between or after answers."""

    text: str  # may hold CUT
    trained: bool


class Rendering(NamedTuple):
    """A record, or a prompt, as one text. It is tokenized as a whole; where pieces meet, no token is part of both."""

    pieces: list[Piece]
    is_plain: bool  # no chat template wrote it, which would write the token that begins a text itself


def render_chat(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn = "assistant") -> Rendering:
    """Render a conversation for training, in pieces that begin and end with its answers.

    Each answer is trained together with the token that ends its turn, so that the model learns to stop; what the template writes
    after that token is not trained. The pieces joined are the whole rendering.

    Args:
        train_on: `assistant` trains every answer, `last` the last answer, `all` the whole rendering.

    Raises:
        BadRecord: as apply_chat_template and find_answer_spans.
    """
    turns = _split_control_tokens(messages, tokenizer)
    whole = apply_chat_template(turns, tokenizer)
    answers = _number_answers(turns)[-1:] if train_on == "last" else _number_answers(turns)
    wanted = [number for number in answers if messages[number].get("weight") != 0]
    spans = _find_spans(turns, whole, answers, [] if train_on == "all" else wanted, tokenizer)
    trained = {span: messages[number].get("weight") != 0 for number, span in spans.items()}
    return Rendering(_cut_into_pieces(whole, trained, train_on == "all"), not tokenizer.chat_template)


def render_prompt(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn = "assistant") -> Rendering:
    """Render a conversation that waits for an answer, with the same pieces that render_chat gives up to that answer.

    Raises:
        BadRecord: as apply_chat_template.
    """
    turns = _split_control_tokens(messages, tokenizer)
    whole = apply_chat_template(turns, tokenizer, add_generation_prompt=True)
    spans = _find_spans(turns, whole, [] if train_on == "last" else _number_answers(turns), [], tokenizer)
    return Rendering(_cut_into_pieces(whole, dict.fromkeys(spans.values(), False)), not tokenizer.chat_template)


def _split_control_tokens(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> list[Message]:
    """Return the messages with each control token in their content cut in two, so that ordinary tokens encode it."""
    control = build_control_token_pattern(tokenizer)
    return [
        {"role": message["role"], "content": control.sub(lambda token: token[0][0] + CUT + token[0][1:], message["content"])}
        for message in messages
    ]


def _number_answers(turns: list[Message]) -> list[int]:
    return [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]


def _find_spans(
    turns: list[Message], whole: str, answers: list[int], wanted: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> dict[int, Span]:
    """Return the spans of answers by their number, without those answers that are not wanted and that the template changes."""
    with suppress(BadRecord):
        return dict(zip(answers, find_answer_spans(turns, whole, answers, tokenizer), strict=True))
    spans = dict(zip(wanted, find_answer_spans(turns, whole, wanted, tokenizer), strict=True))
    for number in set(answers) - spans.keys():
        with suppress(BadRecord):  # the template drops its thoughts, or a token that ends it is missing
            (spans[number],) = find_answer_spans(turns, whole, [number], tokenizer)
    return dict(sorted(spans.items()))


def render_instruction(text: str, end: str, train_on: TrainOn = "assistant") -> Rendering:
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
    trained = {span: train_on != "last" or span == spans[-1] for span in spans}
    return Rendering(_cut_into_pieces(whole, trained, train_on == "all"), is_plain=True)


def _cut_into_pieces(whole: str, answers: dict[Span, bool], everything: bool = False) -> list[Piece]:
    """Cut a text where its answers begin and end.

    Args:
        answers: whether each is trained.
        everything: train all of the text.
    """
    pieces, at = [], 0
    for (start, stop), trained in [*answers.items(), ((len(whole), len(whole)), False)]:
        pieces += [Piece(whole[at:start], everything), Piece(whole[start:stop], everything or trained)]
        at = stop
    return [piece for piece in pieces if piece.text]
