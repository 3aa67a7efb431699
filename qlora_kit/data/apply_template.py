"""Render messages with a tokenizer's chat template, and try a template with made-up turns.

A tokenizer without a template gets `Role: content` lines, with the end-of-sequence token after each answer.
"""

import re
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import BadRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# role: system, user, assistant or tool; content: text, or None beside calls; weight: 0 if an answer is context only; and what
# turns.py adds, such as tool_calls.
Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

LONGEST_TOKEN = 40  # characters of a control token
OTHER_TEMPLATE = "use another template (data.chat_template=FILE)"


def apply_chat_template(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase", add_generation_prompt: bool = False, tools: Tools = None
) -> str:
    """Return the messages as one text: through the tokenizer's chat template, or as `Role: content` lines if it has none.

    Args:
        add_generation_prompt: add the beginning of an answer, which the model continues.
        tools: that the assistant may call.

    Raises:
        BadRecord: the template refuses the messages, as some refuse a system turn, or fails.
    """
    if not tokenizer.chat_template:
        return _render_plain(messages, tokenizer.eos_token or "", add_generation_prompt)
    options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # a template is a program: it may fail with anything
        kind = "" if isinstance(error, ValueError) or "TemplateError" in type(error).__name__ else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:300]
        raise BadRecord(f"the chat template refuses the turns ({reason})", f"correct the record, or {OTHER_TEMPLATE}") from None


def _render_plain(messages: list[Message], end: str, add_generation_prompt: bool) -> str:
    lines = [
        f"{message['role'].capitalize()}: {message['content'] or ''}{end if message['role'] == 'assistant' else ''}\n"
        for message in messages
    ]
    return "".join(lines) + ("Assistant: " if add_generation_prompt else "")


def count_shared(first: str, second: str) -> int:
    """Return the number of characters with which both renderings begin, up to a token such as `<|end|>` in which they differ."""
    differing = (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    shared = next(differing, min(len(first), len(second)))
    opened = max(first.rfind(bracket, max(shared - LONGEST_TOKEN, 0), shared) for bracket in "<[")
    return opened if opened >= 0 and not re.search(r"[>\]\s]", first[opened:shared]) else shared


def create_placeholders(roles: list[str]) -> list[Message]:
    """Return turns to try a template with; their contents are of Unicode's private use area, which no template contains."""
    return [{"role": role, "content": f"\ue000{number}\ue000"} for number, role in enumerate(roles)]
