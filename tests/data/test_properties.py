"""Random conversations, in any script, of any length, with control tokens and role headers in their content.

The reference is the tokenizer's own rendering of the whole conversation, and the content itself.
"""

import copy
import unicodedata

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qlora_kit.data.chat_template import build_control_token_pattern
from qlora_kit.data.formats import READERS, Chat, from_messages, recognise_format
from qlora_kit.data.rendering import render_chat, render_instruction
from qlora_kit.data.tokenizing import encode_records
from qlora_kit.errors import BadRecord
from qlora_kit.inference.prompts import PromptEncoder
from tests.data.builders import DEFAULT_SYSTEM, render_pieces
from tests.data.made_tokenizers import TEMPLATES as KINDS
from tests.data.made_tokenizers import make_tokenizer

STRIPPING = """\
{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% elif m.role == 'system' %}\
<<SYS>>{{ m.content | trim }}<</SYS>>{% else %} {{ m.content | trim }} <|endoftext|>{% endif %}{% endfor %}"""
TEMPLATES = {"own": ..., "default system": DEFAULT_SYSTEM, "stripping": STRIPPING, "none": None}
TRAPS = ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|im_", "[/INST]", "\nAssistant: ", "{{ x }}", "\r\n",
         "\ue0000\ue000", "\u2028", "\u202e", "\ufeff", "ก็ำ", "👩\u200d👩\u200d👧", "𝔘", "नि", "e\u0301"]  # fmt: skip
SETTINGS = settings(derandomize=True, database=None, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

characters = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0")  # no surrogates, no unassigned characters
words = st.lists(st.text(characters, max_size=20) | st.sampled_from(TRAPS), max_size=5).map("".join)
long_words = st.builds(lambda text, times: text * times, words, st.sampled_from([1, 1, 1, 2000]))


@st.composite
def conversations(draw, contents=long_words, system=True) -> list[dict]:
    rounds = draw(st.integers(1, 4))
    system = [{"role": "system", "content": draw(words)}] if system and draw(st.booleans()) else []
    roles = ["user", "assistant"] * rounds
    return system + [{"role": role, "content": draw(contents)} for role in roles]


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
        pieces = render_pieces(from_messages({"messages": messages}).messages, tokenizer)
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
    (record,) = encode_records([render_chat(Chat(messages), tokenizer)], tokenizer)
    ids = record.ids.tolist()
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", whole)  # Qwen's tokenizer writes é as one character
    start, end, separator = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert [number for number in ids if number in (start, end, separator)] == [start, end] * len(messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert (record.ids[record.trained] == end).sum() == len(answers)
    trained = "".join(f"{answer}<|im_end|>" for answer in answers)
    assert tokenizer.decode(record.ids[record.trained]) == unicodedata.normalize("NFC", trained)


@pytest.mark.parametrize("name", ["tiny", *KINDS])
@settings(SETTINGS, max_examples=30)
@given(messages=conversations(words, system=False).filter(readable))
@example(messages=[{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "\nHello"}] * 2)
def test_a_record_has_the_tokens_of_transformers_and_begins_with_those_of_its_prompts(name, messages):
    """The labels are compared with the offsets of the tokens in the whole text."""
    tokenizer = make_tokenizer(name)
    (record,) = encode_records([render_chat(Chat(messages), tokenizer)], tokenizer)
    control = build_control_token_pattern(tokenizer)
    is_plain = not any(control.search(message["content"]) for message in messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.decode(record.ids) == tokenizer.decode(whole["input_ids"]) or not is_plain
    spans, joins = [], False
    for number in range(1, len(messages), 2):
        prompt = PromptEncoder(tokenizer, "chat").encode_chat(messages[:number])
        assert record.ids[: len(prompt)].tolist() == prompt
        begin = len(tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True))
        spans.append((begin, control.search(text, begin).end()))
        own = tokenizer.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=False)
        assert prompt == own or not is_plain or joins
        joins = joins or whole["input_ids"][: len(own)] != own
    if is_plain and not joins:
        assert record.ids.tolist() == whole["input_ids"]
        begins = [begin for begin, _ in whole["offset_mapping"]]
        assert record.trained.tolist() == [any(start <= begin < stop for start, stop in spans) for begin in begins]


@SETTINGS
@given(messages=conversations().filter(readable))
def test_the_last_answer_alone_or_everything_can_be_trained(tokenizers, messages):
    last = render_pieces(messages, tokenizers["own"], "last")
    assert stretches(last) == [f"{messages[-1]['content']}<|im_end|>"]
    everything = render_pieces(messages, tokenizers["own"], "all")
    assert all(piece.trained for piece in everything)
    assert "".join(piece.text for piece in everything) == "".join(piece.text for piece in last)


TURN_KEYS = ["weight", "train", "tool_calls", "function_call", "thinking", "name", "text"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", *TURN_KEYS]), inner, max_size=3)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", "tool_call"]) | inner, "content": inner},
            optional=dict.fromkeys(TURN_KEYS, inner),
        )
    ),
    max_leaves=8,
)
KEYS = ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "id"]
KEYS += ["system", "history", "tools", "weight", "mask"]


@settings(SETTINGS, max_examples=200)
@given(record=st.dictionaries(st.sampled_from(KEYS), anything, max_size=4))
def test_a_record_is_read_or_refused_in_one_line(record):
    try:
        kind = recognise_format(record)
        chat = READERS[kind](record) if kind in READERS else None
    except BadRecord as error:
        assert str(error).strip() and "\n" not in str(error)
    else:
        assert chat is None or chat.messages[-1]["role"] == "assistant"


@settings(SETTINGS, max_examples=200)
@given(rounds=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_ready_made_text_is_cut_at_its_responses(rounds):
    rounds = [tuple(text.replace("###", "#").removesuffix("</s>") for text in one) for one in rounds]
    text = "\n\n".join(f"### Instruction:\n{question}\n\n### Response:\n{answer}" for question, answer in rounds)
    if not all(answer.strip() for _, answer in rounds):
        with pytest.raises(BadRecord, match="a response is empty"):
            render_instruction(text, "</s>")
        return
    pieces = render_instruction(text, "</s>").pieces
    assert [piece.text.strip() for piece in pieces if piece.trained] == [f"{answer.rstrip()}</s>".strip() for _, answer in rounds]
    assert "".join(piece.text for piece in pieces).replace("</s>", "").rstrip() == text.replace("</s>", "").rstrip()
