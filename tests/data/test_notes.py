"""What a preview and a log say of the data beside their tokens, also when these come from the cache."""

import copy

import pytest

from qlora_kit.data.dataset import source_blocks
from qlora_kit.data.notes import describe_notes
from tests.data.builders import as_jsonl, data_settings, source_of
from tests.data.tool_templates import template

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
TOOLS = [{"name": "weather", "parameters": {}}]
CHATS = [
    {"messages": [USER, ANSWER], "id": 7, "source": "web", "license": None},
    {"messages": [USER | {"when": "now"}, ANSWER], "tools": TOOLS, "tags": []},
    {"messages": [USER, {"role": "assistant", "content": "<think>Hm.</think>Hello!"}]},
]


@pytest.fixture
def notes_of(write, tokenizer):
    """Return a function that gives the notes on records in a file of this name."""

    def notes_of(name: str, content: str, chat_template: str | None = None):
        other = copy.deepcopy(tokenizer)
        other.chat_template = chat_template or tokenizer.chat_template
        path = write(name, content)
        return source_blocks(source_of(path), data_settings(path, max_length=64), other, "data.dataset").notes, path

    return notes_of


def test_what_of_chats_is_not_used_or_changed_is_said_also_from_the_cache(notes_of):
    cuts_thoughts = template("{{ m.content.split('</think>')[-1] }}")
    for _ in range(2):
        notes, path = notes_of("chats.jsonl", as_jsonl(*CHATS), cuts_thoughts)
        assert notes == [
            ("tools", "in 1 records"),
            ("not used", "id, source, turn.when"),
            ("changed", f"the chat template leaves out or changes words of 1 turns, first in {path}, line 3"),
        ]


def test_a_thought_that_prompts_are_given_without_is_said(notes_of):
    thinks = template().replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    assert notes_of("chats.jsonl", as_jsonl(CHATS[0]), thinks)[0][1:] == [
        ("left out", "'<think></think>' at the end of prompts: the chat template begins no given answer with it")
    ]


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        ("text.csv", ",text,title\n1," + "word " * 70 + ",\x1b[2J\n2,more,\n", "(a column without a name), title"),
        ("text.jsonl", as_jsonl({"text": "word " * 80, "id": 0, "tags": []}), "id"),
        ("ready.jsonl", as_jsonl({"text": "### Instruction:\nHi\n### Response:\nHo", "id": 0, "tags": []}), "id"),
    ],
)
def test_columns_beside_the_text_are_named(notes_of, name, content, keys):
    assert notes_of(name, content)[0] == [("not used", keys)]


def test_many_keys_are_cut_short_and_none_is_obeyed_by_a_terminal():
    keys = ["\x1b[2J", "k" * 100, *map(str, range(30))]
    ((_, text),) = describe_notes({"unused_keys": keys})
    assert text.startswith(f"\\x1b[2J, {'k' * 60}, 0, ") and text.endswith(", 17 and more")
    assert describe_notes({"unused_keys": [], "with_tools": 0, "changed": None, "left_out_thought": ""}) == []
