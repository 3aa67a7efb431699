"""A chat template is a program of anyone's: whatever it does ends in one line, in bounded time and memory."""

import copy
import os

import pytest

from qlora_kit.data import apply_template, dataset
from qlora_kit.data.apply_template import apply_chat_template, call_limited
from qlora_kit.data.formats import from_messages
from qlora_kit.data.rendering import render_chat
from qlora_kit.errors import BadRecord, UserError
from tests.data.builders import MESSAGES, as_jsonl, data_settings, source_of

TURNS = MESSAGES["messages"]
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def with_template(tokenizer):
    """Return a function that gives the tokenizer another template; its workers are ended."""

    def build(template: str):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    yield build
    apply_template._start_worker.cache_clear()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "0.5 seconds"),
        ("{{ 1|round(-99999999999) }}", "0.5 seconds"),
        ("{{ 'a' * 9000000000 }}", "GiB of memory"),
        ("{{ '%2000000000d' % 1 }}", "GiB of memory"),
    ],
)
def test_what_takes_too_much_is_not_tried_again(with_template, template, reason, monkeypatch):
    monkeypatch.setattr(apply_template, "SECONDS", 0.5)
    with pytest.raises(UserError, match=f"chat template: cannot be rendered .*{reason}.*another template"):
        render_chat(from_messages(MESSAGES), with_template(template))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages|length|tojson }}{{ range|tojson }}", "not JSON serializable"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ nobody.knows }}", "undefined"),
        ("{% for m in messages %}", "end of template|endfor"),
        ("{{ " + "(" * 5000, "RecursionError|nested|template"),
        ("{{ raise_exception('no system turn') }}", r"turns \(no system turn\)"),
        ("{{ 'a' * 17000000 }}", "more than 16,777,216 characters"),
    ],
)
def test_what_fails_is_a_bad_record(with_template, template, reason):
    with pytest.raises(BadRecord, match=reason) as error:
        apply_chat_template(TURNS, with_template(template))
    assert "\n" not in str(error.value)


def process_of(tokenizer) -> int:
    return os.getpid()


def test_one_other_process_serves_a_tokenizer_and_a_call_within_it_stays_there(with_template):
    tokenizer = with_template(PLAIN)
    process = call_limited(process_of, tokenizer)
    assert call_limited(nested, tokenizer) == process != os.getpid()
    tokenizer.chat_template = None  # nothing to run
    assert call_limited(process_of, tokenizer) == os.getpid()


def nested(tokenizer) -> int:
    return call_limited(process_of, tokenizer)


def test_records_are_prepared_in_order_by_several_processes(with_template, write, monkeypatch):
    source = source_of(write("chats.jsonl", as_jsonl(*({"prompt": f"Hi {n}", "completion": f"Hello {n}"} for n in range(10)))))
    tokenizer = with_template(PLAIN)
    monkeypatch.setattr(dataset, "RECORDS_AT_ONCE", 2)
    monkeypatch.setattr(dataset, "CHARACTERS_AT_ONCE", 100)
    found = list(dataset._prepare_records(source, data_settings("x"), tokenizer))
    assert [place for _, place, _ in found] == [f"line {n}" for n in range(1, 11)]
    own = [[{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"Hello {n}"}] for n in range(10)]
    assert [prepared.record.ids.tolist() for *_, prepared in found] == [
        tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False) for turns in own
    ]


def test_a_record_that_a_template_refuses_is_named(with_template, write):
    template = PLAIN + "{% if 'bad' in messages[0].content %}{{ 1 / 0 }}{% endif %}"
    file = write("chats.jsonl", as_jsonl(*({"prompt": words, "completion": "x"} for words in ("good", "good", "bad", "good"))))
    with pytest.raises(UserError, match=r"chats.jsonl: line 3: the chat template refuses the turns \(ZeroDivisionError"):
        list(dataset._prepare_records(source_of(file), data_settings("x"), with_template(template)))


def test_the_first_mistake_is_named_although_a_later_line_cannot_be_read(with_template, write, monkeypatch):
    monkeypatch.setattr(dataset, "RECORDS_AT_ONCE", 1)
    template = PLAIN + "{% if 'bad' in messages[0].content %}{{ 1 / 0 }}{% endif %}"
    file = write("chats.jsonl", as_jsonl({"prompt": "bad", "completion": "x"}) + "{no JSON\n")
    with pytest.raises(UserError, match=r"chats.jsonl: line 1: the chat template refuses the turns"):
        list(dataset._prepare_records(source_of(file), data_settings("x"), with_template(template)))
