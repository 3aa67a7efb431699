"""Find the answers of a conversation in its rendering.

An answer begins where the prompt that the model would be given ends. Rendering that prompt for every answer would take time that
grows with the square of the turns, so it is done only for templates that change content, by stripping it or dropping thoughts,
and for conversations with tools.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from qlora_kit.data.apply_template import OTHER_TEMPLATE, Message, Tools, count_shared, create_placeholders
from qlora_kit.data.chat_template import read_ending, render_conversation, render_generation_prompt
from qlora_kit.data.fields import shorten
from qlora_kit.data.turns import makes_calls
from qlora_kit.errors import BadRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # begin and end in characters of a rendering
SHORT = 60  # characters


def find_answer_spans(
    turns: list[Message], whole: str, wanted: Iterable[int], tokenizer: "PreTrainedTokenizerBase", tools: Tools = None
) -> list[Span]:
    """Return the spans of the wanted answers in the rendering of all turns, each with the token that ends it.

    Args:
        whole: the turns as render_conversation renders them, or as a prompt.
        wanted: numbers of assistant turns, from 0.

    Raises:
        BadRecord: no token could end an answer, or the template renders a wanted answer otherwise than the model would generate
            it, or otherwise once more turns follow.
    """
    known = _find_by_outline(turns, whole, tokenizer)
    return [known[number] if known else _find_by_prompt(turns, number, whole, tokenizer, tools) for number in wanted]


def _find_by_prompt(
    turns: list[Message], number: int, whole: str, tokenizer: "PreTrainedTokenizerBase", tools: Tools = None
) -> Span:
    """Return the span from the end of the answer's prompt to the last end of turn, rendered without the turns that follow."""
    end = read_ending(tokenizer, makes_calls(turns[number])).token
    prompt = render_generation_prompt(turns[:number], tokenizer, tools)
    answered = render_conversation(turns[: number + 1], tokenizer, tools)
    at = answered.rfind(end, len(prompt))
    answered = answered[: at + len(end)] if at >= 0 else answered
    if at >= 0 and whole.startswith(prompt) and whole.startswith(answered):
        return len(prompt), len(answered)
    problem = f"the chat template does not render turn {number + 1} as the model would generate it"
    reason = _explain(prompt, answered) if not answered.startswith(prompt) else _explain_change(answered, whole)
    raise BadRecord(f"{problem}: {reason}", _find_remedy(turns, number, whole, tokenizer, tools))


def _explain(prompt: str, answered: str) -> str:
    """Say how a prompt differs from the same turns before their answer."""
    shared = count_shared(prompt, answered)
    rest, other = (_show(text[shared:]) for text in (prompt, answered))
    if len(prompt) - shared <= SHORT:
        return f"the prompt ends with {rest}, the answer begins {other}"
    return f"the prompt goes on with {rest}, the conversation with {other}"


def _explain_change(answered: str, whole: str) -> str:
    shared = count_shared(answered, whole)
    return f"{_show(answered[shared:])} becomes {_show(whole[shared:])} once later turns follow"


def _show(text: str) -> str:
    return shorten(text.encode(errors="ignore").decode())  # without the marks in control tokens that someone typed


def _find_remedy(turns: list[Message], number: int, whole: str, tokenizer: "PreTrainedTokenizerBase", tools: Tools) -> str:
    last = len(turns) - 1
    try:
        if number < last and turns[last]["role"] == "assistant":
            _find_by_prompt(turns, last, whole, tokenizer, tools)
            return f"train the last answers only (data.train_on=last), or {OTHER_TEMPLATE}"
    except BadRecord:
        pass
    return OTHER_TEMPLATE


class _Outline(NamedTuple):
    """The text that a template writes around contents, if it is the same in every round of user and assistant."""

    start: list[str]  # before the system's content, if there is any, and before the first user's content
    answer: str  # before an answer's content
    user: str  # before the content of each later user turn
    finish: str  # after the last content
    lead: int  # trained characters before an answer's content
    tail: int  # trained characters after it: the end of the turn


@lru_cache(maxsize=8)
def _read_outline(tokenizer: "PreTrainedTokenizerBase", system: bool) -> _Outline | None:
    """Return the outline, read from two rounds of placeholders; None if the rounds are rendered differently."""
    turns = create_placeholders(["system"] * system + ["user", "assistant"] * 2)
    contents = [turn["content"] for turn in turns]
    try:
        whole = render_conversation(turns, tokenizer)
        spans = [_find_by_prompt(turns, number, whole, tokenizer) for number in (len(turns) - 3, len(turns) - 1)]
    except BadRecord:
        return None
    if re.findall("|".join(contents), whole) != contents:
        return None
    *start, answer, user, _, finish = re.split("|".join(contents), whole)
    first, last = whole.index(contents[-3]), whole.index(contents[-1])
    lead, tail = last - spans[1][0], spans[1][1] - last - len(contents[-1])
    if spans[0] != (first - lead, first + len(contents[-3]) + tail):
        return None
    return _Outline(start, answer, user, finish, lead, tail)


def _find_by_outline(turns: list[Message], whole: str, tokenizer: "PreTrainedTokenizerBase") -> dict[int, Span]:
    """Return the span of every answer by its number, if the rendering is the outline filled with the contents; else nothing."""
    outline = _read_outline(tokenizer, turns[0]["role"] == "system")
    if outline is None:
        return {}
    gaps = outline.start + [outline.answer, outline.user] * (len(turns) // 2)
    filled = [part for gap, turn in zip(gaps, turns, strict=False) for part in (gap, turn["content"] or "")] + [outline.finish]
    if "".join(filled) != whole:
        return {}
    ends = list(accumulate(map(len, filled)))  # of gap, content, gap, content, ...
    first = len(outline.start)  # the number of the first answer
    return {n: (ends[2 * n] - outline.lead, ends[2 * n + 1] + outline.tail) for n in range(first, len(turns), 2)}
