"""Find what ends an answer, what begins one, and which tokens are control tokens, in the renderings of a chat template.

The template is never parsed: it is tried with made-up turns. The end of an answer is trained, so that the model learns to stop:

    the end-of-sequence token, where the template writes it after every answer: `</s>` of Mistral, `<|im_end|>` of Qwen;
    else the last control token before the next turn: `<|end|>` of Phi-3, `<|END_OF_TURN_TOKEN|>` of Command R7B;
    where it writes none, the control token that begins the next turn: `<|user|>` of GLM-4, which generates that to stop;
    and where that is none either, the end-of-sequence token.

In the last two cases the token is added to the last answer of a conversation. At inference each of them stops an answer.
"""

import re
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, cast

from qlora_kit.data.apply_template import OTHER_TEMPLATE, Message, Tools, apply_chat_template, count_shared, create_placeholders
from qlora_kit.data.template_support import sample_answer, writes_calls
from qlora_kit.data.turns import makes_calls
from qlora_kit.errors import BadRecord
from qlora_kit.model.tokenizer import find_text_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷")  # the forms in which tokens of roles and thoughts are written
OF_WORDS = re.compile("think|thought|reason|tool|function|channel", re.IGNORECASE)  # tokens that belong to what a turn says


@lru_cache(maxsize=8)
def build_control_token_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Return a pattern that finds the texts of the tokenizer's special tokens, and of its role tokens."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted({*added, *tokenizer.all_special_tokens, *_find_role_tokens(tokenizer)}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing


def _find_role_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the tokens that the template writes around turns though the tokenizer does not call them special.

    Tokens of thoughts and tools, such as `<think>`, are none of them: they are part of what a turn says.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    candidates = [token for token in added if TAG.fullmatch(token) and not OF_WORDS.search(token)]
    if not candidates or not tokenizer.chat_template:
        return []
    turns = create_placeholders(["system", *["user", "assistant"] * 2])
    called = [turns[1], sample_answer(1, tokenizer), turns[3] | {"role": "tool"}, turns[4]]
    frames = [_render(some, tokenizer, prompt) for some in (turns, turns[1:], called) for prompt in (False, True)]
    return [token for token in candidates if any(token in frame for frame in frames)]


def _render(turns: list[Message], tokenizer: "PreTrainedTokenizerBase", add_generation_prompt: bool = False) -> str:
    """Return the rendering of made-up turns; empty if the template refuses them."""
    try:
        return apply_chat_template(turns, tokenizer, add_generation_prompt)
    except BadRecord:
        return ""


class Ending(NamedTuple):
    """How answers end."""

    token: str  # ends every answer
    added: str = ""  # replaces `space` behind a conversation's last answer, if the template does not write the token there
    space: str = ""  # white space that the template writes behind a last answer


@lru_cache(maxsize=16)
def read_ending(tokenizer: "PreTrainedTokenizerBase", calls: bool = False) -> Ending:
    """Return how answers end.

    Args:
        calls: of answers that call tools.

    Raises:
        BadRecord: there is no token that could end one.
    """
    user, answer, following, final = create_placeholders(["user", "assistant", "tool" if calls else "user", "assistant"])
    words = answer["content"]
    if calls:
        answer, words = sample_answer(1, tokenizer), "qz1value"
    first = apply_chat_template([user, answer], tokenizer)
    if calls and words not in first:  # the template writes no calls
        return read_ending(tokenizer)
    last = first.rpartition(words)[2]
    middle = _render([user, answer, following, final], tokenizer).partition(words)[2].partition(following["content"])
    between = middle[0] if middle[1] else last  # from an answer to the turn that follows
    pattern, end = build_control_token_pattern(tokenizer), tokenizer.eos_token
    written, shared = list(pattern.finditer(last)), count_shared(last, between)
    if written:
        tokens = [match[0] for match in written if match.end() <= shared] or [match[0] for match in written]
        asked = _render([user], tokenizer)
        opening = _render([user], tokenizer, True).removeprefix(asked)
        if not opening and asked.endswith(last):  # the template always begins an answer, with tokens that are not known
            tokens = tokens[:1]
        tokens[1:] = takewhile(lambda token: token not in opening, tokens[1:])
        return Ending(end if end in tokens else tokens[-1])
    words_end = last.rstrip()
    space = last[len(words_end) :]
    following_token = pattern.search(between)
    if following_token and between[: following_token.start()].rstrip() == words_end:
        return Ending(following_token[0], between[len(words_end) : following_token.end()], space)
    if end:
        return Ending(end, end + space, space)
    problem = f"the chat template ends an answer with {last!r}, expected an end-of-sequence or other control token"
    raise BadRecord(f"{problem}, without which the model would not learn to stop", OTHER_TEMPLATE)


def find_end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the control token that ends each answer.

    It need not be the tokenizer's `eos_token`: for Qwen's base models that is `<|endoftext|>`, but turns end with `<|im_end|>`.

    Raises:
        BadRecord: no token could end one.
    """
    return read_ending(tokenizer).token


@lru_cache(maxsize=8)
def find_end_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the ids of the tokens that end answers: those of words, and those of calls if the template writes calls.

    Raises:
        BadRecord: no token could end one.
    """
    tokens = {read_ending(tokenizer, calls).token for calls in (False, True) if not calls or writes_calls(tokenizer)}
    return tuple(sorted(cast(list[int], tokenizer.convert_tokens_to_ids(list(tokens)))))


def find_stop_ids(tokenizer: "PreTrainedTokenizerBase", style: str) -> list[int]:
    """Return the ids of the tokens that end an answer.

    Args:
        style: `chat` adds the chat template's ends of turns to the end of texts and the end-of-sequence token.
    """
    found = {find_text_end(tokenizer), tokenizer.eos_token_id}
    if style == "chat":
        try:
            found.update(find_end_ids(tokenizer))
        except BadRecord:
            pass  # then turns end with the tokenizer's own end
    return sorted(token for token in found if token is not None)


def render_conversation(turns: list[Message], tokenizer: "PreTrainedTokenizerBase", tools: Tools = None) -> str:
    """Return turns as one text, in which the last answer has its end.

    Raises:
        BadRecord: as apply_chat_template and read_ending.
    """
    text = apply_chat_template(turns, tokenizer, tools=tools)
    ending = read_ending(tokenizer, makes_calls(turns[-1])) if turns[-1]["role"] == "assistant" else Ending("")
    return text.removesuffix(ending.space) + ending.added if ending.added else text


def render_generation_prompt(turns: list[Message], tokenizer: "PreTrainedTokenizerBase", tools: Tools = None) -> str:
    """Return turns as one text that ends where an answer begins in training.

    Raises:
        BadRecord: as apply_chat_template.
    """
    prompt = apply_chat_template(turns, tokenizer, add_generation_prompt=True, tools=tools)
    return prompt.removesuffix(find_left_out_thought(tokenizer))


@lru_cache(maxsize=8)
def find_left_out_thought(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the end of a prompt that the template does not write before a given answer; usually empty.

    It is an empty thought, as `<|channel>thought\\n<channel|>` of Gemma 4, or opens one that a given answer closes at once, as
    `<think>` of GLM-4.7, or is white space. Answers are trained without it, so prompts are given without it. A thought that is
    opened and left open is none: an answer without thoughts does not follow it.
    """
    user, answer = create_placeholders(["user", "assistant"])
    prompt, whole = _render([user], tokenizer, True), _render([user, answer], tokenizer)
    shared = count_shared(prompt, whole)
    left_out, before = prompt[shared:], whole[shared:].partition(answer["content"])[0]
    return left_out if not left_out.strip() or _is_empty_thought(left_out + before) else ""


def _is_empty_thought(text: str) -> bool:
    """Return whether a text is two tokens that open and close the same, with no more than a word between them."""
    text, tags = text.strip(), TAG.findall(text)
    if len(tags) != 2 or tags[0] == tags[1] or not text.startswith(tags[0]) or not text.endswith(tags[1]):
        return False
    first, second = (re.sub("[^a-z]|start|begin|end", "", tag.lower()) for tag in tags)
    return first == second and len(text[len(tags[0]) : -len(tags[1])].split()) < 2
