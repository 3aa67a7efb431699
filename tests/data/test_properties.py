"""Random conversations, in any script, of any length, with control tokens and role headers in their content.

The reference is the tokenizer's own rendering of the whole conversation, and the content itself.
"""

import copy
import unicodedata

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qlora_kit.data.formats import READERS, from_messages, recognise_format
from qlora_kit.data.rendering import render_chat, render_instruction
from qlora_kit.errors import BadRecord
from tests.data.builders import DEFAULT_SYSTEM

STRIPPING = """\
{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% elif m.role == 'system' %}\
<<SYS>>{{ m.content | trim }}<</SYS>>{% else %} {{ m.content | trim }} <|endoftext|>{% endif %}{% endfor %}"""
TEMPLATES = {"own": ..., "default system": DEFAULT_SYSTEM, "stripping": STRIPPING, "none": None}
TRAPS = ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|im_", "[/INST]", "\nAssistant: ", "{{ x }}", "\r\n",
         "\ue0000\ue000", "\u2028", "\u202e", "\ufeff", "ก็ำ", "👩\u200d👩\u200d👧", "𝔘", "नि", "e\u0301"]  # fmt: skip
SETTINGS = settings(
    derandomize=True, database=None, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

characters = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0")  # no surrogates, no unassigned characters
words = st.lists(st.text(characters, max_size=20) | st.sampled_from(TRAPS), max_size=5).map("".join)
long_words = st.builds(lambda text, times: text * times, words, st.sampled_from([1, 1, 1, 2000]))


@st.composite
def conversations(draw) -> list[dict]:
    rounds = draw(st.integers(1, 4))
    system = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    roles = ["user", "assistant"] * rounds
    return system + [{"role": role, "content": draw(long_words)} for role in roles]


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    """Return the tiny tokenizer with each of TEMPLATES, by its name."""
    made = {name: copy.deepcopy(tokenizer) for name in TEMPLATES}
    for name, template in TEMPLATES.items():
        made[name].chat_template = tokenizer.chat_template if template is ... else template
    return made


def readable(messages) -> bool:
    return all(message["content"].strip() for message in messages if message["role"] == "assistant")


def as_text(messages) -> str:
    """The rendering of a tokenizer without a template."""
    end = {"system": "", "user": "", "assistant": "<|im_end|>"}
    return "".join(f"{turn['role'].capitalize()}: {turn['content']}{end[turn['role']]}\n" for turn in messages)


def stretches(pieces) -> list[str]:
    """Trained text, with consecutive trained pieces joined."""
    joined = [""]
    for piece in pieces:
        if piece.trained:
            joined[-1] += piece.text
        elif joined[-1]:
            joined.append("")
    return [text for text in joined if text]


@pytest.mark.parametrize("name", TEMPLATES)
@SETTINGS
@given(messages=conversations())
@example(messages=[{"role": "user", "content": ""}, {"role": "assistant", "content": "\u3000x"}])
@example(
    messages=[{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\n"}, {"role": "assistant", "content": "<|im_end|>"}]
)
def test_every_answer_and_its_end_and_nothing_else_is_trained(tokenizers, name, messages):
    tokenizer = tokenizers[name]
    try:
        pieces = render_chat(from_messages({"messages": messages}), tokenizer)
    except BadRecord as error:
        assert not readable(messages) and "an answer is empty" in str(error)
        return
    whole = as_text(messages) if name == "none" else tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(piece.text for piece in pieces) == whole
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if name == "stripping":
        assert stretches(pieces) == [f" {answer.strip()} <|endoftext|>" for answer in answers]
    else:
        assert stretches(pieces) == [f"{answer}<|im_end|>" for answer in answers]


@SETTINGS
@given(messages=conversations().filter(readable))
def test_no_token_is_lost_and_the_only_control_tokens_are_the_templates(tokenizers, messages):
    tokenizer = tokenizers["own"]
    pieces = render_chat(messages, tokenizer)
    parts = tokenizer([piece.text for piece in pieces], add_special_tokens=False)["input_ids"]
    ids = [number for part in parts for number in part]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", whole)  # Qwen's tokenizer writes é as one character
    start, end, separator = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert [number for number in ids if number in (start, end, separator)] == [start, end] * len(messages)
    trained = [number for part, piece in zip(parts, pieces, strict=True) if piece.trained for number in part]
    assert trained.count(end) == sum(message["role"] == "assistant" for message in messages)


@SETTINGS
@given(messages=conversations().filter(readable))
def test_the_last_answer_alone_or_everything_can_be_trained(tokenizers, messages):
    last = render_chat(messages, tokenizers["own"], "last")
    assert stretches(last) == [f"{messages[-1]['content']}<|im_end|>"]
    everything = render_chat(messages, tokenizers["own"], "all")
    assert all(piece.trained for piece in everything)
    assert "".join(piece.text for piece in everything) == "".join(piece.text for piece in last)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "weight", "text"]), inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | inner, "content": inner})
    ),
    max_leaves=8,
)
KEYS = ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "id"]


@settings(SETTINGS, max_examples=200)
@given(record=st.dictionaries(st.sampled_from(KEYS), anything, max_size=4))
def test_a_record_is_read_or_refused_in_one_line(record):
    try:
        kind = recognise_format(record)
        messages = READERS[kind](record) if kind in READERS else None
    except BadRecord as error:
        assert str(error).strip() and "\n" not in str(error)
    else:
        assert messages is None or messages[-1]["role"] == "assistant"


@settings(SETTINGS, max_examples=200)
@given(rounds=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_ready_made_text_is_cut_at_its_responses(rounds):
    rounds = [tuple(text.replace("###", "#").removesuffix("</s>") for text in one) for one in rounds]
    text = "\n\n".join(f"### Instruction:\n{question}\n\n### Response:\n{answer}" for question, answer in rounds)
    if not all(answer.strip() for _, answer in rounds):
        with pytest.raises(BadRecord, match="a response is empty"):
            render_instruction(text, "</s>")
        return
    pieces = render_instruction(text, "</s>")
    assert [piece.text.strip() for piece in pieces if piece.trained] == [f"{answer.rstrip()}</s>".strip() for _, answer in rounds]
    assert "".join(piece.text for piece in pieces).replace("</s>", "").rstrip() == text.replace("</s>", "").rstrip()
