"""Render messages with a tokenizer's chat template, and find the answers and the token that ends a turn in the rendering.

The template is never parsed: its output for all turns is compared with its output for fewer turns. A tokenizer without a template
gets `Role: content` lines, with the end-of-sequence token after each answer.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from qlora_kit.errors import BadRecord
from qlora_kit.model.tokenizer import find_text_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Message = dict[str, Any]  # role: system, user or assistant; content; weight: 0 if an answer is context only
Span = tuple[int, int]  # begin and end in characters of a rendering


def apply_chat_template(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase", add_generation_prompt: bool = False
) -> str:
    """Return the messages as one text: through the tokenizer's chat template, or as `Role: content` lines if it has none.

    Args:
        add_generation_prompt: add the beginning of an answer, which the model continues.

    Raises:
        BadRecord: the template refuses the messages, as some refuse a system turn.
    """
    if not tokenizer.chat_template:
        return _render_plain(messages, tokenizer.eos_token or "", add_generation_prompt)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, ValueError) as error:
        raise BadRecord(f"the chat template refuses the turns ({' '.join(str(error).split())})") from None


def _render_plain(messages: list[Message], end: str, add_generation_prompt: bool) -> str:
    lines = [
        f"{message['role'].capitalize()}: {message['content']}{end if message['role'] == 'assistant' else ''}\n"
        for message in messages
    ]
    return "".join(lines) + ("Assistant: " if add_generation_prompt else "")


@lru_cache(maxsize=8)
def build_control_token_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Return a pattern that finds the texts of the tokenizer's special tokens."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing


@lru_cache(maxsize=8)
def find_end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the control token that follows each answer.

    It need not be the tokenizer's `eos_token`: for Qwen's base models that is `<|endoftext|>`, but turns end with `<|im_end|>`.

    Raises:
        BadRecord: no control token follows an answer.
    """
    turns = _create_placeholders(["user", "assistant"])
    after = apply_chat_template(turns, tokenizer).rpartition(turns[-1]["content"])[2]
    token = build_control_token_pattern(tokenizer).search(after)
    if not token:
        raise BadRecord(
            f"the chat template ends an answer with {after!r}, expected an end-of-sequence or other control token, "
            "without which the model would not learn to stop"
        )
    return token[0]


def find_answer_spans(
    turns: list[Message], whole: str, wanted: Iterable[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[Span]:
    """Return the spans of the wanted answers in the rendering of all turns, each with the token that ends it.

    An answer begins where the prompt that the model would be given ends. Rendering that prompt for every answer would take time
    that grows with the square of the turns, so it is done only for templates that change content, by stripping it or dropping
    thoughts.

    Args:
        whole: the turns as apply_chat_template renders them.
        wanted: numbers of assistant turns, from 0.

    Raises:
        BadRecord: no control token ends an answer, or the template renders a wanted answer differently once more turns follow.
    """
    end = find_end_of_turn(tokenizer)
    known = _find_by_outline(turns, whole, tokenizer)
    return [known[number] if known else _find_by_prompt(turns, number, whole, tokenizer, end) for number in wanted]


def _find_by_prompt(turns: list[Message], number: int, whole: str, tokenizer: "PreTrainedTokenizerBase", end: str) -> Span:
    """Return the span from the end of the answer's prompt to the last end of turn, rendered without the turns that follow."""
    prompt = apply_chat_template(turns[:number], tokenizer, add_generation_prompt=True)
    answered = apply_chat_template(turns[: number + 1], tokenizer)
    at = answered.rfind(end, len(prompt))
    if at < 0 or not whole.startswith(prompt) or not whole.startswith(answered[: at + len(end)]):
        remedy = " (data.train_on: last trains the last answer only)" if number < len(turns) - 1 else ""
        raise BadRecord(f"the chat template does not render turn {number + 1} as the model would generate it{remedy}")
    return len(prompt), at + len(end)


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
    turns = _create_placeholders(["system"] * system + ["user", "assistant"] * 2)
    contents = [turn["content"] for turn in turns]
    try:
        whole, end = apply_chat_template(turns, tokenizer), find_end_of_turn(tokenizer)
        spans = [_find_by_prompt(turns, number, whole, tokenizer, end) for number in (len(turns) - 3, len(turns) - 1)]
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
    filled = [part for gap, turn in zip(gaps, turns, strict=False) for part in (gap, turn["content"])] + [outline.finish]
    if "".join(filled) != whole:
        return {}
    ends = list(accumulate(map(len, filled)))  # of gap, content, gap, content, ...
    first = len(outline.start)  # the number of the first answer
    return {n: (ends[2 * n] - outline.lead, ends[2 * n + 1] + outline.tail) for n in range(first, len(turns), 2)}


def _create_placeholders(roles: list[str]) -> list[Message]:
    """Return turns to try a template with; their contents are of Unicode's private use area, which no template contains."""
    return [{"role": role, "content": f"\ue000{number}\ue000"} for number, role in enumerate(roles)]


def find_stop_ids(tokenizer: "PreTrainedTokenizerBase", style: str) -> list[int]:
    """Return the ids of the tokens that end an answer.

    Args:
        style: `chat` adds the chat template's end of turn to the end of texts and the end-of-sequence token.
    """
    found = {find_text_end(tokenizer), tokenizer.eos_token_id}
    if style == "chat":
        try:
            found.add(tokenizer.convert_tokens_to_ids(find_end_of_turn(tokenizer)))
        except BadRecord:
            pass  # then turns end with the tokenizer's own end
    return sorted(token for token in found if token is not None)
