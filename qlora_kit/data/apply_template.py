"""Render messages with a tokenizer's chat template, and try a template with made-up turns.

A tokenizer without a template gets `Role: content` lines, with the end-of-sequence token after each answer. A template is a
program that anyone may have written: it runs in a process of its own, with limits of time, memory and length. A process serves
a tokenizer, and several prepare a data set. What renders many records calls call_limited with all of them, because a call takes
as long as rendering one or two.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_kit.data.files import LONGEST_RECORD
from qlora_kit.errors import BadRecord, UserError
from qlora_kit.limited_worker import LimitedWorker, LimitExceeded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# role: system, user, assistant or tool; content: text, or None beside calls; weight: 0 if an answer is context only; and what
# turns.py adds, such as tool_calls.
Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Result = TypeVar("Result")

SECONDS = 20.0  # of a call
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
        UserError: as call_limited.
    """
    return call_limited(_render, tokenizer, messages, add_generation_prompt, tools)


def call_limited(
    function: Callable[..., Result], tokenizer: "PreTrainedTokenizerBase", *arguments: Any, worker: int = 0
) -> Result:
    """Return `function(tokenizer, *arguments)`, which renders with the tokenizer's chat template, within limits.

    Args:
        function: of a module's top level; it, `arguments` and its result are pickled.
        worker: number of the process; threads that call at the same time take different ones.

    Raises:
        UserError: it takes too much time or memory, or the system allows no other process.
    """
    if not tokenizer.chat_template:
        return function(tokenizer, *arguments)
    try:
        return _start_worker(tokenizer, str(tokenizer.chat_template), worker).call((function, arguments))
    except LimitExceeded as limit:
        raise UserError("chat template", None, f"cannot be rendered ({limit})", OTHER_TEMPLATE) from None


@lru_cache(maxsize=8)
def _start_worker(tokenizer: "PreTrainedTokenizerBase", template: str, number: int) -> LimitedWorker[Any, Any]:
    """Return a worker of a tokenizer with this template: it keeps the tokenizer as it was with its first call."""
    return LimitedWorker(lambda call: call[0](tokenizer, *call[1]), SECONDS)


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], add_generation_prompt: bool, tools: Tools) -> str:
    if not tokenizer.chat_template:
        return _render_plain(messages, tokenizer.eos_token or "", add_generation_prompt)
    options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        text = str(tokenizer.apply_chat_template(messages, **options))
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: it may fail with anything
        kind = "" if isinstance(error, ValueError) or "TemplateError" in type(error).__name__ else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:300]
        raise BadRecord(f"the chat template refuses the turns ({reason})", f"correct the record, or {OTHER_TEMPLATE}") from None
    if len(text) > LONGEST_RECORD:
        raise BadRecord(f"the chat template makes more than {LONGEST_RECORD:,} characters of the turns", OTHER_TEMPLATE)
    return text


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
