"""Each sample file -> records -> messages -> rendering -> tokens -> labels: some in full, all by the text they decode to.

With the embedded tokenizer, and with Qwen2.5's own if QLORA_QWEN_TOKENIZER names its folder.
"""

import csv
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_kit.data.formats import READERS, Chat, recognise_format
from qlora_kit.data.rendering import Rendering, render_chat, render_instruction
from qlora_kit.data.tokenizing import encode_records

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples"
FORMATS = {
    "alpaca.jsonl": "alpaca", "sharegpt.json": "sharegpt", "messages.jsonl": "messages", "completion.jsonl": "completion",
    "instruction.jsonl": "instruction", "notes.csv": "text",
}  # fmt: skip
CHATS = [name for name, kind in FORMATS.items() if kind in READERS]
DEFAULT_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module", params=["tiny", "Qwen2.5"])
def tokenizer(request, tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir if request.param == "tiny" else request.getfixturevalue("qwen_tokenizer_dir"))


def records(name: str) -> list[dict]:
    text = (SAMPLES / name).read_text(encoding="utf-8")
    if name.endswith(".csv"):
        return list(csv.DictReader(text.splitlines(keepends=True)))
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def render(record: dict, tokenizer) -> Rendering:
    kind = recognise_format(record)
    if kind == "instruction":
        return render_instruction(record["text"], tokenizer.eos_token)
    return render_chat(READERS[kind](record), tokenizer)


def labelled(rendering: Rendering, tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels, -100 where nothing is trained."""
    (record,) = encode_records([rendering], tokenizer)
    return record.ids.tolist(), record.labels().tolist()


def trained_spans(labels, tokenizer) -> list[str]:
    spans, ids = [], []
    for label in [*labels, -100]:
        if label != -100:
            ids.append(label)
        elif ids:
            spans.append(tokenizer.decode(ids))
            ids = []
    return spans


def answers(record: dict) -> list[str]:
    """The answers in a record, read directly from its keys."""
    match record:
        case {"output": text} | {"completion": text}:
            return [text]
        case {"conversations": turns}:
            return [turn["value"] for turn in turns if turn["from"] == "gpt"]
        case {"messages": turns}:
            return [turn["content"] for turn in turns if turn["role"] == "assistant"]
        case {"text": text}:
            return [part.split("\n\n### Instruction:")[0] for part in text.split("### Response:\n")[1:]]
    raise AssertionError(record)


@pytest.mark.parametrize("name", FORMATS)
def test_every_record_is_of_the_format_that_the_file_shows(name):
    assert {recognise_format(record) for record in records(name)} == {FORMATS[name]}


def test_the_table_of_samples_is_complete_and_counts_right():
    table = (SAMPLES / "README.md").read_text(encoding="utf-8")
    for path in SAMPLES.iterdir():
        assert path.name == "README.md" or f"| `{path.name}` |" in table
    for name in FORMATS:
        row = next(line for line in table.splitlines() if f"`{name}`" in line)
        assert f"| {len(records(name))} " in row
    assert f"{sum(bool(record['input']) for record in records('alpaca.jsonl'))} of them with an input" in table


@pytest.mark.parametrize("name", [*CHATS, "instruction.jsonl"])
def test_the_answers_and_their_ends_are_trained(name, tokenizer):
    for record in records(name):
        ids, labels = labelled(render(record, tokenizer), tokenizer)
        assert trained_spans(labels, tokenizer) == [f"{answer}<|im_end|>" for answer in answers(record)]
        assert [label for label in labels if label != -100][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert all(label in (-100, number) for number, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("name", CHATS)
def test_no_token_is_lost_and_none_added(name, tokenizer):
    for record in records(name):
        ids, _ = labelled(render(record, tokenizer), tokenizer)
        messages = READERS[recognise_format(record)](record).messages
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)  # in this text no token joins prompt and answer


# In full: the text before the answer, the trained text, and the text after it.
EXPECTED = {
    "alpaca.jsonl": [
        ("<|im_start|>user\nWhat is the sqlite3 module for?<|im_end|>\n<|im_start|>assistant\n", False),
        ("The sqlite3 module is for using a database in a file.<|im_end|>", True),
        ("\n", False),
    ],
    "sharegpt.json": [
        ("<|im_start|>system\nAnswer in one sentence.<|im_end|>\n<|im_start|>user\nHow do I boil an egg?<|im_end|>\n"
         "<|im_start|>assistant\n", False),
        ("Put it into boiling water for seven to ten minutes, then cool it in cold water.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd if I want it soft?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Take it out after five or six minutes.<|im_end|>", True),
        ("\n", False),
    ],
    "messages.jsonl": [
        ("<|im_start|>user\n請用一句話介紹燈塔。<|im_end|>\n<|im_start|>assistant\n", False),
        ("燈塔是建在海岸或島上的塔，用燈光為船隻指引方向。<|im_end|>", True),
        ("\n", False),
    ],
    "completion.jsonl": [
        ("<|im_start|>user\nEnglish: water\nFrench:<|im_end|>\n<|im_start|>assistant\n", False),
        ("eau<|im_end|>", True),
        ("\n", False),
    ],
    "instruction.jsonl": [
        ("### Instruction:\nName the longest side of a right triangle.\n\n### Response:\n", False),
        ("It is the hypotenuse.<|im_end|>", True),
        ("\n\n### Instruction:\nWhich angle is it opposite to?\n\n### Response:\n", False),
        ("It is opposite to the right angle.<|im_end|>", True),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_pieces_of_a_record_in_full(name, tokenizer):
    expected = list(EXPECTED[name])
    (record,) = (record for record in records(name) if answers(record)[0] + "<|im_end|>" == expected[1][0])
    if name in CHATS and tokenizer.vocab_size > 100_000 and "system\n" not in expected[0][0]:
        expected[0] = (DEFAULT_SYSTEM + expected[0][0], False)
    assert render(record, tokenizer).pieces == expected
    ids, labels = labelled(render(record, tokenizer), tokenizer)
    places = [place for text, trained in expected for place in [trained] * len(tokenizer.tokenize(text))]
    assert [label != -100 for label in labels] == places and len(ids) == len(places)


def test_labels_of_the_real_tokenizer_are_the_published_ids(qwen_tokenizer_dir):
    """`Hi` is 13048, `Hello` 9707, `!` 0; 151644 and 151645 begin and end a turn, 198 is a line's end."""
    qwen = AutoTokenizer.from_pretrained(qwen_tokenizer_dir)
    turns = [{"role": "system", "content": "!"}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    ids, labels = labelled(render_chat(Chat(turns), qwen), qwen)
    assert ids == [
        151644,
        8948,
        198,
        0,
        151645,
        198,
        151644,
        872,
        198,
        13048,
        151645,
        198,
        151644,
        77091,
        198,
        9707,
        0,
        151645,
        198,
    ]
    assert labels == [-100] * 15 + [9707, 0, 151645, -100]
