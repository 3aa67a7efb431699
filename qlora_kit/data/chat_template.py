"""A tokenizer's chat template: messages -> one text, where each answer stands in it, and the token that ends a turn.

A tokenizer without a template gets `Role: content` lines, the end-of-sequence token behind each answer. The template is asked and
not read: what it writes for all turns is compared with what it writes for fewer. Imports no torch.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_kit.errors import BadRecord
from qlora_kit.model.tokenizer import token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Message = dict[str, Any]  # role: system, user or assistant; content; weight: 0 where an answer is context only
Span = tuple[int, int]  # characters of a rendering: from, up to


def apply_chat_template(messages: list[Message], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """Messages through the tokenizer's own chat template, else as `Role: content` lines.

    Args:
        add_generation_prompt: with the beginning of an answer behind them, for the model to continue.

    Raises:
        BadRecord: the template refuses them, as some do a system turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _render_plain(messages, getattr(tokenizer, "eos_token", None) or "", add_generation_prompt)
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError) as error:
        raise BadRecord(f"the chat template refuses the turns ({' '.join(str(error).split())})") from None


def _render_plain(messages: list[Message], end: str, prompting: bool) -> str:
    lines = [
        f"{message['role'].capitalize()}: {message['content']}{end if message['role'] == 'assistant' else ''}\n"
        for message in messages
    ]
    return "".join(lines) + ("Assistant: " if prompting else "")


@lru_cache(maxsize=8)
def build_control_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds the texts that the tokenizer turns into its special tokens."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) is never found


@lru_cache(maxsize=8)
def find_end_of_turn(tokenizer: Any) -> str:
    """The control token written behind each answer.

    It need not be the tokenizer's `eos_token`: for Qwen's base models that is `<|endoftext|>`, but turns end with `<|im_end|>`.

    Raises:
        BadRecord: there is none.
    """
    turns = _create_placeholders(["user", "assistant"])
    behind = apply_chat_template(turns, tokenizer).rpartition(turns[-1]["content"])[2]
    token = build_control_token_pattern(tokenizer).search(behind)
    if not token:
        raise BadRecord(
            f"the chat template ends an answer with {behind!r}, expected an end-of-sequence or other control token, "
            "without which the model would not learn to stop"
        )
    return token[0]


def find_answer_spans(turns: list[Message], whole: str, wanted: Iterable[int], tokenizer: Any) -> list[Span]:
    """Where the wanted answers are in the rendering of all turns, each with the token that ends it.

    An answer is what follows the prompt that the model would be given. The template is asked for that prompt only where it does
    more than to write something around the words, as to strip them or to leave out thoughts.

    Args:
        whole: the turns as apply_chat_template renders them.
        wanted: numbers of assistant turns, from 0.

    Raises:
        BadRecord: the template ends an answer with no control token, or writes a wanted one otherwise once more turns follow.
    """
    end = find_end_of_turn(tokenizer)
    known = _find_by_outline(turns, whole, tokenizer)
    return [known[number] if known else _find_by_prompt(turns, number, whole, tokenizer, end) for number in wanted]


def _find_by_prompt(turns: list[Message], number: int, whole: str, tokenizer: Any, end: str) -> Span:
    """From the end of the answer's prompt to the last end of turn that is written when no turn follows it."""
    prompt = apply_chat_template(turns[:number], tokenizer, add_generation_prompt=True)
    answered = apply_chat_template(turns[: number + 1], tokenizer)
    at = answered.rfind(end, len(prompt))
    if at < 0 or not whole.startswith(prompt) or not whole.startswith(answered[: at + len(end)]):
        remedy = " (data.train_on: last trains the last answer only)" if number < len(turns) - 1 else ""
        raise BadRecord(f"the chat template does not render turn {number + 1} as the model would generate it{remedy}")
    return len(prompt), at + len(end)


class _Outline(NamedTuple):
    """What a template writes around the words, where that is the same in each round of user and assistant."""

    start: list[str]  # before the system's words, if there are any, and before the first user's
    answer: str  # before an answer's words
    user: str  # before the words of a user who speaks again
    finish: str  # behind the last words
    lead: int  # characters of the answer that stand before its words
    tail: int  # and behind them: the end of the turn


@lru_cache(maxsize=8)
def _read_outline(tokenizer: Any, system: bool) -> _Outline | None:
    """From two rounds of placeholders; None where the rounds are rendered differently."""
    turns = _create_placeholders(["system"] * system + ["user", "assistant"] * 2)
    words = [turn["content"] for turn in turns]
    try:
        whole, end = apply_chat_template(turns, tokenizer), find_end_of_turn(tokenizer)
        spans = [_find_by_prompt(turns, number, whole, tokenizer, end) for number in (len(turns) - 3, len(turns) - 1)]
    except BadRecord:
        return None
    if re.findall("|".join(words), whole) != words:
        return None
    *start, answer, user, _, finish = re.split("|".join(words), whole)
    first, last = whole.index(words[-3]), whole.index(words[-1])
    lead, tail = last - spans[1][0], spans[1][1] - last - len(words[-1])
    if spans[0] != (first - lead, first + len(words[-3]) + tail):
        return None
    return _Outline(start, answer, user, finish, lead, tail)


def _find_by_outline(turns: list[Message], whole: str, tokenizer: Any) -> dict[int, Span]:
    """Every answer's place by its number, if the rendering is the outline with the words filled in; else nothing."""
    outline = _read_outline(tokenizer, turns[0]["role"] == "system")
    if outline is None:
        return {}
    gaps = outline.start + [outline.answer, outline.user] * (len(turns) // 2)
    filled = [part for gap, turn in zip(gaps, turns, strict=False) for part in (gap, turn["content"])] + [outline.finish]
    if "".join(filled) != whole:
        return {}
    ends = list(accumulate(map(len, filled)))  # of gap, words, gap, words, ...
    first = len(outline.start)  # the first answer's number
    return {n: (ends[2 * n] - outline.lead, ends[2 * n + 1] + outline.tail) for n in range(first, len(turns), 2)}


def _create_placeholders(roles: list[str]) -> list[Message]:
    """Turns to try a template with. Their words are of Unicode's private use, so that the template does not hold them too."""
    return [{"role": role, "content": f"\ue000{number}\ue000"} for number, role in enumerate(roles)]


def find_stop_ids(tokenizer: "PreTrainedTokenizerBase", style: str) -> list[int]:
    """Tokens that end an answer: the separator of texts, the tokenizer's own end, and what the chat template ends a turn with."""
    found = {token_id("<|endoftext|>", tokenizer), tokenizer.eos_token_id}
    if style == "chat":
        try:
            found.add(tokenizer.convert_tokens_to_ids(find_end_of_turn(tokenizer)))
        except BadRecord:
            pass  # then turns end as the tokenizer says
    return sorted(token for token in found if token is not None)
