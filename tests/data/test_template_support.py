"""Tools, calls and thoughts in the form that each kind of template needs, or refused."""

import json

import pytest

from qlora_kit.data.rendering import CUT
from qlora_kit.data.tokenizing import encode_records
from qlora_kit.errors import BadRecord
from tests.data.tool_templates import ALWAYS_WORDS, ONLY_WORDS, QUOTED, TEXT, template

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
RESULT = {"role": "tool", "content": 'It "rains".', "name": "weather", "tool_call_id": "call00001"}
CALL = {"function": {"name": "weather", "arguments": '{"city": "Malmö", "days": 2}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOLS = [{"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object", "properties": {}}}]


@pytest.mark.parametrize(
    "template",
    [
        template(),
        template(call=TEXT),
        template(words=ALWAYS_WORDS),
        template(call="{{ call.function | tojson }}"),
        template(words=QUOTED),
    ],
    ids=["object", "text", "words are never null", "whole call", "quoted result"],
)
@pytest.mark.parametrize(
    "arguments", [CALL["function"]["arguments"], json.loads(CALL["function"]["arguments"])], ids=["text", "object"]
)
def test_a_call_is_written_as_json_whatever_form_the_template_needs(render, template, arguments):
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    text, rendering = render(template, USER, called, RESULT, ANSWER, tools=TOOLS)
    assert '{"city": "Malmö", "days": 2}' in text and "None" not in text and '\\"city' not in text
    assert [piece.text.startswith("<tool_call>") for piece in rendering.pieces if piece.trained] == [True, False]
    assert rendering.changed_turns == 0 and rendering.has_tools and rendering.unused == {"turn.name", "turn.tool_call_id"}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("known", ["reasoning_content", "thinking"])
def test_thoughts_are_given_under_the_name_that_the_template_knows(render, key, known):
    written = template().replace("reasoning_content", known)
    _, rendering = render(written, USER, ANSWER | {key: "Hm."})
    assert [piece.text for piece in rendering.pieces if piece.trained] == ["<think>Hm.</think>Hello!<|im_end|>"]
    with pytest.raises(BadRecord, match=f"the chat template does not write {key} of turn 2") as caught:
        render(ONLY_WORDS, USER, ANSWER | {key: "Hm."})
    assert "data.chat_template=FILE" in caught.value.remedy


@pytest.mark.parametrize(
    ("turns", "keys", "what"),
    [
        ([USER, ANSWER], {"tools": TOOLS}, "tools"),
        ([USER, ANSWER | {"tool_calls": [CALL]}], {}, "tool_calls of turn 2"),
        ([USER, CALLED], {}, "tool_calls of turn 2"),
        ([USER | {"reasoning_content": "Hm."}, ANSWER], {}, "reasoning_content of turn 1"),
        ([USER, ANSWER | {"functions": "f()"}], {}, "functions of turn 2"),
        ([USER, ANSWER | {"function_calls": "f()"}], {}, "function_calls of turn 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_template_does_not_write_is_refused_with_its_key(render, turns, keys, what):
    with pytest.raises(BadRecord, match=f"the chat template does not write {what}$"):
        render(ONLY_WORDS, *turns, **keys)


TWO_ROLES = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("template", [None, TWO_ROLES])
def test_calls_need_a_template_that_writes_them(render, template):
    with pytest.raises(BadRecord, match="does not write"):
        render(template, USER, CALLED, RESULT, ANSWER)


@pytest.mark.parametrize(("role", "turns"), [("system", [{"role": "system", "content": "Be brief."}, USER, ANSWER]),
                                             ("tool", [USER, ANSWER, RESULT, ANSWER])])  # fmt: skip
def test_a_turn_whose_role_the_template_does_not_know_is_refused(render, role, turns):
    with pytest.raises(BadRecord, match=rf"the chat template does not write turn \d \({role}\)"):
        render(TWO_ROLES, *turns)


def test_keys_that_a_template_reads_from_turns_are_given_to_it(render):
    own = "{% for m in messages %}{{ m.content }}{{ m.functions }}{{ m.name }}<|im_end|>{% endfor %}"
    text, rendering = render(own, USER | {"functions": "f(x)", "name": "Ada"}, ANSWER)
    assert text == "Hif(x)Ada<|im_end|>Hello!<|im_end|>" and rendering.unused == frozenset()


def test_control_tokens_in_calls_tools_and_thoughts_are_words(render, tokenizer):
    forged = "<|im_end|>"
    call = {"function": {"name": "weather", "arguments": {"city": forged, forged: 1}}}
    tools = [{"name": "weather", "description": forged, "parameters": {}}]
    turns = [USER, CALLED | {"tool_calls": [call], "reasoning_content": forged}, RESULT | {"content": forged}, ANSWER]
    text, rendering = render(template(), *turns, tools=tools)
    assert text.replace(CUT, "").count(forged) == 5 + 5  # typed, and one for the tools and each turn
    (record,) = encode_records([rendering], tokenizer)
    assert (record.ids == tokenizer.convert_tokens_to_ids(forged)).sum() == 5
