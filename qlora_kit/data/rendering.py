"""Render chats and ready-made instructions as one text each, in pieces that are trained or not.

The content of a turn is never read as control tokens: a `<|im_end|>` in it ends no turn and is encoded with ordinary tokens.
Ready-made text keeps its control tokens.
"""

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qlora_kit.data.answer_spans import Span, find_answer_spans
from qlora_kit.data.apply_template import Message, Tools
from qlora_kit.data.chat_template import build_control_token_pattern, render_conversation, render_generation_prompt
from qlora_kit.data.formats import INSTRUCTION, RESPONSE, Chat
from qlora_kit.data.missing_words import count_changed_turns
from qlora_kit.data.template_support import fit_to_template
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
    unused: frozenset[str] = frozenset()  # keys of the record that are in none of the pieces
    changed_turns: int = 0  # whose words are not all in the pieces
    has_tools: bool = False


def render_chat(chat: Chat, tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn = "assistant") -> Rendering:
    """Render a conversation for training, in pieces that begin and end with its answers.

    Each answer is trained together with the token that ends its turn, so that the model learns to stop; what the template writes
    after that token is not trained. The pieces joined are the whole rendering.

    Args:
        train_on: `assistant` trains every answer, `last` the last answer, `all` the whole rendering.

    Raises:
        BadRecord: the template refuses the turns, leaves out what they hold, or does not render an answer as it is generated; or
            `all` would train a prompt of weight 0.
    """
    messages = chat.messages
    if train_on == "all" and any(message.get("weight") == 0 and message["role"] != "assistant" for message in messages):
        problem = "a turn before an answer is not to be trained, and data.train_on: all trains it"
        raise BadRecord(problem, "set data.train_on=assistant, or correct the record")
    fitted, left_out = fit_to_template(messages, chat.tools, tokenizer)
    turns, tools = _split_control_tokens(fitted, tokenizer), _split_in(chat.tools, build_control_token_pattern(tokenizer))
    whole = render_conversation(turns, tokenizer, tools)
    answers = _number_answers(turns)[-1:] if train_on == "last" else _number_answers(turns)
    contexts = 0 if train_on == "all" else chat.contexts
    untrained = [number for number in answers if number < contexts or messages[number].get("weight") == 0]
    wanted = untrained if train_on == "all" else [number for number in answers if number not in untrained]
    spans = _find_spans(turns, whole, answers, wanted, tokenizer, tools)
    pieces = _cut_into_pieces(whole, {span: number not in untrained for number, span in spans.items()}, train_on == "all")
    changed = count_changed_turns(turns, whole, tokenizer)
    return Rendering(pieces, not tokenizer.chat_template, chat.unused | left_out, changed, chat.tools is not None)


def render_prompt(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn = "assistant") -> Rendering:
    """Render a conversation that waits for an answer, with the same pieces that render_chat gives up to that answer.

    Raises:
        BadRecord: the template refuses the turns.
    """
    turns = _split_control_tokens(messages, tokenizer)
    whole = render_generation_prompt(turns, tokenizer)
    spans = _find_spans(turns, whole, [] if train_on == "last" else _number_answers(turns), [], tokenizer)
    return Rendering(_cut_into_pieces(whole, dict.fromkeys(spans.values(), False)), not tokenizer.chat_template)


def _split_control_tokens(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> list[Message]:
    """Return the messages with each control token in what they say cut in two, so that ordinary tokens encode it."""
    control = build_control_token_pattern(tokenizer)
    return [
        {"role": message["role"], "content": control.sub(_cut_token, message["content"])}
        if len(message) == 2 and message["content"]
        else {key: value if key == "role" else _split_in(value, control) for key, value in message.items() if key != "weight"}
        for message in messages
    ]


def _cut_token(token: re.Match[str]) -> str:
    return token[0][0] + CUT + token[0][1:]


def _split_in(value: Any, control: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return control.sub(_cut_token, value)
    if isinstance(value, dict):
        return {_split_in(key, control): _split_in(one, control) for key, one in value.items()}
    return [_split_in(one, control) for one in value] if isinstance(value, list) else value


def _number_answers(turns: list[Message]) -> list[int]:
    return [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]


def _find_spans(
    turns: list[Message],
    whole: str,
    answers: list[int],
    wanted: list[int],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Tools = None,
) -> dict[int, Span]:
    """Return the spans of answers by their number, without those answers that are not wanted and that the template changes."""
    with suppress(BadRecord):
        return dict(zip(answers, find_answer_spans(turns, whole, answers, tokenizer, tools), strict=True))
    spans = dict(zip(wanted, find_answer_spans(turns, whole, wanted, tokenizer, tools), strict=True))
    for number in set(answers) - spans.keys():
        with suppress(BadRecord):  # the template drops its thoughts, or a token that ends it is missing
            (spans[number],) = find_answer_spans(turns, whole, [number], tokenizer, tools)
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
        pieces += [Piece(whole[at:start], everything), Piece(whole[start:stop], trained)]
        at = stop
    return [piece for piece in pieces if piece.text]
