"""Each format against hand-written messages; each mistake against its reason."""

import json

import pytest

from qlora_kit.data import formats
from qlora_kit.data.formats import recognise_format
from qlora_kit.data.rendering import render_chat
from qlora_kit.errors import BadRecord
from tests.data.builders import render_pieces

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
SYSTEM, FOUR = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "4"}

CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"place": "Rome"}}}
TOOL = {"role": "tool", "content": "Founded in 753."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}

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
    assert formats.from_alpaca(record).messages == [{"role": "user", "content": user}, {"role": "assistant", "content": "Hello"}]


def test_another_key_counts_in_a_record_without_an_input_too():
    record = {"instruction": "Hi", "output": "Hello!"}
    assert formats.from_alpaca(record | {"system": "Be brief."}).messages == [SYSTEM, USER, ASSISTANT]
    assert formats.from_alpaca(record | {"note": "x"}).unused == {"note"}
    with pytest.raises(BadRecord, match="tools holds int, expected a list"):
        formats.from_alpaca(record | {"tools": 5})


@pytest.mark.parametrize(("human", "gpt"), [("human", "gpt"), ("user", "assistant")])
def test_sharegpt_has_two_names_for_each_role(human, gpt):
    turns = [("system", "Be brief."), (human, "Hi"), (gpt, "Hello!"), (human, "2+2?"), (gpt, "4")]
    messages = formats.from_sharegpt({"conversations": [{"from": role, "value": text} for role, text in turns]}).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages] == [text for _, text in turns]


def test_a_completion_is_one_round():
    assert formats.from_completion(RECORDS["completion"]).messages == [
        {"role": "user", "content": "2 + 2 ="},
        {"role": "assistant", "content": "4"},
    ]


def test_completion_of_messages_trains_no_answer_of_its_prompt(tokenizer):
    record = {"prompt": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "2+2?"}], "completion": [FOUR]}
    chat = formats.from_completion(record)
    assert [message["content"] for message in chat.messages] == ["Be brief.", "Hi", "Hello!", "2+2?", "4"]
    assert trained(render_chat(chat, tokenizer).pieces) == ["4<|im_end|>"]
    assert all(piece.trained for piece in render_chat(chat, tokenizer, "all").pieces)


def test_an_answer_of_weight_0_is_context_only(tokenizer):
    turns = [USER, ASSISTANT | {"weight": 0}, {"role": "user", "content": "2+2?"}, FOUR | {"weight": 1}]
    assert trained(render_pieces(formats.from_messages({"messages": turns}).messages, tokenizer)) == ["4<|im_end|>"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_system_role_has_two_names(role):
    assert formats.from_messages({"messages": [SYSTEM | {"role": role}, USER, ASSISTANT]}).messages[0] == SYSTEM


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
        ("messages", {"messages": [USER, {"role": "critic", "content": "x"}]}, "turn 2 of messages has role 'critic'"),
        ("messages", {"messages": [USER, {"role": "tool", "content": "x"}]}, "turn 2 is tool, expected assistant"),
        ("messages", {"messages": [USER, ASSISTANT, TOOL, USER]}, "turn 4 is user, expected assistant"),
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


# The other keys of a record

ROUND = {"messages": [USER, ASSISTANT]}
EARLIER = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Ha."}]


@pytest.mark.parametrize("key", ["system", "system_prompt", "systemPrompt", "system_message", "System-Instruction"])
@pytest.mark.parametrize("kind", ["alpaca", "sharegpt", "completion", "messages"])
def test_a_system_text_of_the_record_is_the_first_turn(kind, key):
    record = ROUND if kind == "messages" else RECORDS[kind]
    plain = formats.READERS[kind](record).messages
    chat = formats.READERS[kind](record | {key: "Be brief."})
    assert (chat.messages, chat.tools, chat.unused) == ([SYSTEM, *plain], None, set())
    assert formats.READERS[kind](record | {key: " "}).messages == plain


def test_a_system_text_that_is_the_first_turn_already_is_not_repeated():
    assert formats.from_messages(RECORDS["messages"] | {"system": "Be brief."}).messages == RECORDS["messages"]["messages"]
    with pytest.raises(BadRecord, match="system holds another text than the system turn"):
        formats.from_messages(RECORDS["messages"] | {"system": "Be long."})


@pytest.mark.parametrize("history", [[["Hm?", "Ha."]], '[["Hm?", "Ha."]]', EARLIER], ids=["pairs", "JSON text", "turns"])
@pytest.mark.parametrize(("kind", "contexts"), [("alpaca", 0), ("messages", 0), ("completion", 4)])
def test_earlier_rounds_come_first_and_are_context_of_a_completion(kind, contexts, history):
    record = ROUND if kind == "messages" else RECORDS[kind]
    chat = formats.READERS[kind](record | {"history": history, "system": "Be brief."})
    assert chat.messages == [SYSTEM, *EARLIER, *formats.READERS[kind](record).messages] and chat.contexts == contexts


@pytest.mark.parametrize(
    "given",
    [
        {"train": False},
        {"trainable": 0},
        {"trained": False},
        {"loss": False},
        {"loss_mask": 0},
        {"weight": 0.0},
        {"masked": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_an_answer_that_is_not_to_be_trained_has_weight_0(given):
    assert formats.from_messages({"messages": [USER, ASSISTANT | given]}).messages == [USER, ASSISTANT | {"weight": 0}]
    opposite = {key: not value for key, value in given.items()}
    assert formats.from_messages({"messages": [USER | given, ASSISTANT | opposite]}).messages[1] == ASSISTANT
    assert formats.from_messages(ROUND | given).messages == [turn | {"weight": 0} for turn in (USER, ASSISTANT)]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"train": "no"}, "turn 2 of messages has train 'no', expected 0 or 1 (false or true)"),
        ({"weight": [0]}, "turn 2 of messages has weight [0], expected 0 or 1 (false or true)"),
        ({"train": False, "weight": 1}, "turn 2 of messages has train and weight, which contradict each other"),
        ({"mask": 0}, "mask of turn 2 of messages is not supported"),
        ({"images": ["a.png"]}, "images of turn 2 of messages is not supported"),
        ({"name": 7}, "name of turn 2 of messages holds int, expected text"),
        ({"thinking": ["a"]}, "thinking of turn 2 of messages holds list, expected text"),
        ({"thinking": "a", "reasoning": "b"}, "turn 2 of messages has different values of reasoning_content under several names"),
        ({"tool_calls": [CALL], "function_call": {"name": "f"}}, "turn 2 of messages has different values of tool_calls"),
        ({"tool_calls": "look_up"}, "tool_calls of turn 2 of messages is no valid JSON: 'look_up'"),
        ({"tool_calls": [{"type": "function"}]}, "call 1 of tool_calls of turn 2 of messages has no name"),
        (
            {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]},
            "arguments of call 1 of tool_calls of turn 2 of messages hold list, expected an object",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_key_of_a_turn_is_one_line(turn, reason):
    with pytest.raises(BadRecord) as error:
        formats.from_messages({"messages": [USER, ASSISTANT | turn]})
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"system": ["a"]}, "system holds list, expected text"),
        ({"history": "Hm?"}, "history is no valid JSON: 'Hm?'"),
        ({"history": [["Hm?"]]}, "round 1 of history is no pair"),
        ({"tools": {"a": 1}}, "tools holds dict, expected a list of tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tool 1 of tools has no name"),
        ({"tools": '[{"name": "f", "name": "g"}]'}, "tools has the key 'name' twice in one object"),
        ({"tools": [{"name": "f", "description": "\ud83d"}]}, "tools holds half a character"),
        ({"weight": 0.5}, "weight is 0.5, expected 0 or 1 (false or true)"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs is not supported"),
        ({"image": "a.png"}, "image is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_key_of_a_record_is_one_line(keys, reason):
    with pytest.raises(BadRecord) as error:
        formats.from_messages(ROUND | keys)
    assert reason in str(error.value)


def test_keys_that_nothing_uses_are_named_and_empty_ones_are_not():
    record = {
        "messages": [USER | {"when": 7, "images": []}, ASSISTANT | {"tool_calls": None, "refusal": ""}],
        "id": 0,
        "tags": [],
    }
    assert formats.from_messages(record) == ([USER, ASSISTANT], None, {"id", "turn.when"}, 0)
    # That the words of a user are trained is no setting of a turn.
    assert formats.from_messages({"messages": [USER | {"train": True}, ASSISTANT]}).unused == {"turn.train"}


# Tools

FUNCTION = {"name": "look_up", "description": "Looks up a place.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    "frame", [lambda tool: tool, lambda tool: {"type": "function", "function": tool}], ids=["bare", "framed"]
)
@pytest.mark.parametrize("write", [lambda tool: [tool], lambda tool: json.dumps([tool]), lambda tool: [json.dumps(tool)]])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_objects_or_json_text(key, write, frame):
    chat = formats.from_alpaca(RECORDS["alpaca"] | {key: write(frame(FUNCTION))})
    assert chat.tools == [{"type": "function", "function": FUNCTION}]


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"function": {"name": "look_up", "arguments": '{"place": "Rome"}'}}]},
        {"tool_calls": json.dumps([{"name": "look_up", "arguments": {"place": "Rome"}}])},
        {"function_call": {"name": "look_up", "arguments": '{"place": "Rome"}'}},
    ],
)
def test_calls_have_one_form_and_need_no_words(given):
    answer = {"role": "assistant", "content": None} | given
    assert formats.from_messages({"messages": [USER, answer, TOOL, TOOL, ASSISTANT]}).messages == [
        USER,
        CALLED,
        TOOL,
        TOOL,
        ASSISTANT,
    ]


def test_calls_and_results_as_sharegpt_turns():
    call = json.dumps({"name": "look_up", "arguments": {"place": "Rome"}})
    turns = [
        ("human", "Hi"),
        ("function_call", call),
        ("function_call", f"[{call}]"),
        ("observation", TOOL["content"]),
        ("gpt", "Hello!"),
    ]
    messages = formats.from_sharegpt({"conversations": [{"from": role, "value": text} for role, text in turns]}).messages
    assert messages == [USER, CALLED | {"tool_calls": [CALL, CALL]}, TOOL, ASSISTANT]
    turns[1:3] = [("gpt", "I look it up."), ("function_call", call)]
    messages = formats.from_sharegpt({"conversations": [{"from": role, "value": text} for role, text in turns]}).messages
    assert messages == [USER, CALLED | {"content": "I look it up."}, TOOL, ASSISTANT]
    turns[2] = ("function_call", call, "Hm.")
    thought = [{"from": turn[0], "value": turn[1], "thinking": "".join(turn[2:])} for turn in turns]
    with pytest.raises(BadRecord, match="turn 3 is assistant, expected user"):  # not one answer: its thoughts would be lost
        formats.from_sharegpt({"conversations": thought})
    with pytest.raises(BadRecord, match="value of turn 2 of conversations is no valid JSON: 'Rome'"):
        formats.from_sharegpt({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "Rome"}]})


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
