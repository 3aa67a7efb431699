"""Build sources, blocks and chat templates for the tests of data/."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from qlora_kit.config import DataSettings
from qlora_kit.data.blocks import RecordBlocks, TextBlocks, build_text_blocks
from qlora_kit.data.encoding import Fragment
from qlora_kit.data.formats import Chat
from qlora_kit.data.packing import build_record_blocks
from qlora_kit.data.rendering import CUT, Piece, Rendering, render_chat
from qlora_kit.data.source import Source, open_source
from qlora_kit.data.token_cache import Tokens
from qlora_kit.errors import UserError

# As Qwen2.5's: a system turn of its own if the conversation has none.
DEFAULT_SYSTEM = """\
{% if messages[0].role != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ALPACA = {"instruction": "Say hi", "input": "", "output": "Hi"}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAD = 9


def as_jsonl(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def data_settings(path: Path | str, **changes) -> DataSettings:
    return DataSettings(**{"dataset": str(path), "subset": None, "eval_split": None, **changes})


def source_of(path: Path | str, **changes) -> Source:
    return open_source(data_settings(path, **changes), [str(path)], "train", "data.dataset")


def pieces_of(rendering: Rendering) -> list[Piece]:
    """Return the pieces as a person reads them, without the marks inside control tokens that someone typed."""
    return [Piece(text.replace(CUT, ""), trained) for text, trained in rendering.pieces]


def render_pieces(messages: list[dict], tokenizer, train_on: str = "assistant") -> list[Piece]:
    return pieces_of(render_chat(Chat(messages), tokenizer, train_on))


def join_fragments(fragments: Iterable[Fragment]) -> list[str]:
    documents = [""]
    for text, ends in fragments:
        documents[-1] += text
        documents += [""] * ends
    assert documents.pop() == ""  # the last one ended
    return documents


def documents_of(path: Path | str, **changes) -> list[str]:
    source = source_of(path, **changes)
    assert source.is_text
    return join_fragments(source.documents())


def records_of(path: Path | str, **changes) -> list[tuple[str, str, dict]]:
    """Place, format and fields of each record."""
    return [(place, file.format, record) for file, place, record in source_of(path, **changes).records()]


def problem_of(path: Path | str, **changes) -> str:
    """The one line of the error that reading a source as text ends with."""
    with pytest.raises(UserError) as caught:
        documents_of(path, **changes)
    (problem,) = caught.value.problems
    assert "\n" not in str(problem) and problem.remedy
    return str(problem)


def text_blocks(stream: Iterable[int], length: int, lengths: Iterable[int] | None = None) -> TextBlocks:
    """Blocks of a stream of ids, which is one document or documents of these lengths."""
    ids = np.asarray(stream, dtype=np.int32)
    ends = np.cumsum([len(ids)] if lengths is None else lengths, dtype=np.int64)
    return build_text_blocks(Tokens(ids, np.empty(0, bool), ends, {"join_rule": "one document a row"}), length, "data.dataset")


def stored_records(*records: str) -> Tokens:
    """Records as strings of p (prompt) and a (answer); ids count up from 100 within each record."""
    ids = np.array([100 + at for record in records for at in range(len(record))], dtype=np.int32)
    trained = np.array([letter == "a" for letter in "".join(records)])
    about = {"formats": ["alpaca"], "end_ids": [0]}
    return Tokens(ids, trained, np.cumsum([len(record) for record in records], dtype=np.int64), about)


def record_blocks(*records: str, numbers=None, **data) -> RecordBlocks:
    """Blocks of 8 tokens, unless `data` says otherwise."""
    tokens = stored_records(*records)
    numbers = range(len(tokens)) if numbers is None else numbers
    return build_record_blocks(tokens, numbers, DataSettings(**{"max_length": 8, **data}), PAD, "data.dataset")
