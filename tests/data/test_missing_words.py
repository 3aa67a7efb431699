"""Turns whose words a template leaves out or changes: counted, or refused."""

import pytest

from qlora_kit.errors import BadRecord
from tests.data.tool_templates import OBJECT, TURN, template

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CALL = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}

CUTS_THOUGHTS = template("{{ (m.content or '').split('</think>')[-1].strip() }}")


def test_turns_whose_words_are_left_out_are_counted(render):
    thought = {"role": "assistant", "content": "<think>Hm.</think> Hello!"}
    assert render(CUTS_THOUGHTS, USER, ANSWER)[1].changed_turns == 0
    assert render(CUTS_THOUGHTS, USER, thought, USER, thought)[1].changed_turns == 2
    first_only = template("{{ m.content if loop.first else '' }}", call="{{ call.function.name }}")
    assert render(first_only, USER, ANSWER)[1].changed_turns == 1


@pytest.mark.parametrize("content", [" Hello!\n", "Hello!\n\n\nBye", '"Hello"\n\tBye'])
def test_white_space_may_change(render, content):
    squeezed = template("{{ (m.content or '').split() | join(' ') }}")
    assert render(squeezed, USER, {"role": "assistant", "content": content})[1].changed_turns == 0


def test_a_template_that_leaves_out_a_call_beside_words_is_refused(render):
    """Else the model would learn to end its turn before the call."""
    either = TURN.replace("WORDS", "{{ m.content }}").replace(
        "{% for call in m.tool_calls %}", "{% for call in (m.tool_calls if not m.content else []) %}"
    )
    either = either.replace("CALL", OBJECT)
    assert "<tool_call>weather" in render(either, USER, CALLED | {"content": ""})[0]
    with pytest.raises(BadRecord, match="the chat template does not write tool_calls of turn 2"):
        render(either, USER, CALLED | {"content": "I look it up."})
    first = (
        TURN.replace("WORDS", "{{ m.content or '' }}")
        .replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
        .replace("CALL", OBJECT)
    )
    with pytest.raises(BadRecord, match="the chat template does not write a call of turn 2"):
        render(first, USER, CALLED | {"tool_calls": [CALL, {"function": {"name": "time", "arguments": {}}}]})
