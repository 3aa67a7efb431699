"""Each format against hand-written messages; each mistake against its reason."""

import pytest

from qlora_kit.data import formats
from qlora_kit.data.formats import recognise_format
from qlora_kit.errors import BadRecord
from tests.data.builders import render_pieces

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
SYSTEM, FOUR = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "4"}

RECORDS = {
    "alpaca": {"instruction": "Translate", "input": "你好", "output": "Hello"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "messages": {"messages": [SYSTEM, USER, ASSISTANT]},
    "completion": {"prompt": "2 + 2 =", "completion": "4"},
    "instruction": {"text": "### Instruction:\nSay hi\n\n### Response:\nhi"},
    "text": {"text": "A lighthouse is a tower."},
}


def trained(pieces):
    return [piece.text for piece in pieces if piece.trained]


@pytest.mark.parametrize("kind", RECORDS)
def test_each_format_is_recognised_by_its_keys(kind):
    assert recognise_format(RECORDS[kind]) == kind
    assert recognise_format(RECORDS[kind] | {"id": 7, "source": "somewhere"}) == kind


def test_a_column_of_another_name_is_text():
    assert recognise_format({"body": "words"}, text_field="body") == "text"


def test_an_unknown_record_names_its_keys_and_what_was_expected():
    with pytest.raises(BadRecord, match=r"the keys are question, answer, expected messages, .* or text"):
        recognise_format({"question": "?", "answer": "!"})


# Records -> messages


@pytest.mark.parametrize(
    ("record", "user"),
    [
        ({"instruction": "Translate", "input": "你好", "output": "Hello"}, "Translate\n\n你好"),
        ({"instruction": "Say hi", "input": "", "output": "Hello"}, "Say hi"),
        ({"instruction": "Say hi", "input": None, "output": "Hello"}, "Say hi"),
        ({"instruction": "Say hi", "output": "Hello"}, "Say hi"),
    ],
    ids=["input", "empty input", "null input", "no input"],
)
def test_an_alpaca_record_is_one_round(record, user):
    assert formats.from_alpaca(record) == [{"role": "user", "content": user}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(("human", "gpt"), [("human", "gpt"), ("user", "assistant")])
def test_sharegpt_has_two_names_for_each_role(human, gpt):
    turns = [("system", "Be brief."), (human, "Hi"), (gpt, "Hello!"), (human, "2+2?"), (gpt, "4")]
    messages = formats.from_sharegpt({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages] == [text for _, text in turns]


def test_a_completion_is_one_round():
    assert formats.from_completion(RECORDS["completion"]) == [
        {"role": "user", "content": "2 + 2 ="},
        {"role": "assistant", "content": "4"},
    ]


def test_completion_of_messages_trains_no_answer_of_its_prompt(tokenizer):
    record = {"prompt": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "2+2?"}], "completion": [FOUR]}
    messages = formats.from_completion(record)
    assert [message["content"] for message in messages] == ["Be brief.", "Hi", "Hello!", "2+2?", "4"]
    assert trained(render_pieces(messages, tokenizer)) == ["4<|im_end|>"]


def test_an_answer_of_weight_0_is_context_only(tokenizer):
    turns = [USER, ASSISTANT | {"weight": 0}, {"role": "user", "content": "2+2?"}, FOUR | {"weight": 1}]
    assert trained(render_pieces(formats.from_messages({"messages": turns}), tokenizer)) == ["4<|im_end|>"]


def test_unknown_keys_are_ignored():
    turns = [USER | {"name": "Ada", "weight": None}, ASSISTANT | {"tool_calls": None, "refusal": None}]
    assert formats.from_messages({"messages": turns, "tools": None}) == [USER, ASSISTANT]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_system_role_has_two_names(role):
    assert formats.from_messages({"messages": [SYSTEM | {"role": role}, USER, ASSISTANT]})[0] == SYSTEM


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("alpaca", {"instruction": "x"}, "output is missing, expected text"),
        ("alpaca", {"instruction": 7, "output": "x"}, "instruction holds int, expected text"),
        ("alpaca", {"instruction": "x", "output": " \n"}, "an answer is empty"),
        ("completion", {"prompt": "x", "completion": ["y"]}, "prompt holds str, expected a list of turns"),
        ("completion", {"prompt": "x", "completion": 4}, "completion holds int, expected text"),
        ("completion", {"prompt": [USER], "completion": []}, "completion holds no turn"),
        ("completion", {"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}, "turn 3 is assistant, expected user"),
        ("alpaca", {"instruction": "a\0b", "output": "x"}, "instruction holds NUL at character 2"),
        (
            "alpaca",
            {"instruction": "x", "output": "so \ud83d"},
            "output holds half a character (a lone surrogate) at character 4",
        ),
        ("messages", {"messages": "Hi"}, "messages holds str, expected a list of turns"),
        ("messages", {"messages": []}, "messages holds no turn"),
        ("messages", {"messages": ["Hi"]}, "turn 1 of messages is str, expected role and content"),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "content of turn 2 of messages holds NoneType"),
        ("messages", {"messages": [USER, {"role": "tool", "content": "x"}]}, "turn 2 of messages has role 'tool'"),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "turn 1 of messages has role ['user']"),
        ("messages", {"messages": [USER | {"weight": 0.5}]}, "turn 1 of messages has weight 0.5, expected 0 or 1"),
        ("messages", {"messages": [USER | {"content": [{"type": "text"}]}]}, "content of turn 1 of messages holds list"),
        ("messages", {"messages": [ASSISTANT, USER]}, "turn 1 is assistant, expected user"),
        ("messages", {"messages": [SYSTEM, USER, USER]}, "turn 3 is user, expected assistant"),
        ("messages", {"messages": [USER, ASSISTANT, SYSTEM]}, "turn 3 is system, expected user"),
        ("messages", {"messages": [USER, ASSISTANT, USER]}, "the last turn is no answer"),
        ("messages", {"messages": [SYSTEM]}, "the last turn is no answer"),
        ("sharegpt", {"conversations": [{"from": "human", "text": "Hi"}]}, "value of turn 1 of conversations holds NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_record_is_one_line(kind, record, reason):
    with pytest.raises(BadRecord) as error:
        formats.READERS[kind](record)
    assert reason in str(error.value) and "\n" not in str(error.value)


# Text without a chat template


def test_alpaca_as_text_with_its_default_templates():
    assert (
        formats.alpaca_to_text(RECORDS["alpaca"])
        == "### Instruction:\nTranslate\n\n### Input:\n你好\n\n### Response:\nHello"
    )  # fmt: skip
    assert formats.alpaca_to_text({"instruction": "x", "input": "", "output": "y"}) == "### Instruction:\nx\n\n### Response:\ny"
    assert formats.alpaca_to_text(RECORDS["alpaca"], "{instruction}: ", "{input} -> ", "{output}") == "Translate: 你好 -> Hello"


def test_sharegpt_as_text_with_its_default_templates():
    assert formats.sharegpt_to_text(RECORDS["sharegpt"]) == "User: Hi\nAssistant: Hello!"
