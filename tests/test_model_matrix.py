"""Test models of other architectures against plain transformers and peft, the matrices that do so, and the page of their results.

Ten models by default, one for each way in which an architecture may differ; all of them under the marker slow.
"""

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qlora_kit.data.tokenizing import EncodedRecord

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # scripts, which import one another by their names

import matrix_run  # noqa: E402
import model_matrix  # noqa: E402
import template_matrix  # noqa: E402
from tiny_models import MODELS, TOKENIZER, build  # noqa: E402

SELECTION = [
    "llama3",  # the fast path
    "gemma3_text",  # layers with a window, layers without
    "gemma3",  # a vision tower, and files that name tensors otherwise
    "qwen3_5_text",  # linear attention
    "lfm2",  # convolutions
    "gpt2",  # Conv1D
    "bloom",  # ALiBi
    "falcon",  # linear layers of a class of their own
    "mixtral",  # experts
    "gpt_oss",  # experts, a window, sinks
]


@pytest.mark.parametrize("name", SELECTION)
def test_a_model_trains_answers_and_merges_as_plain_libraries_do(name, tmp_path):
    build(name, tmp_path / "model")
    row = model_matrix.check_model(name, tmp_path / "model", tmp_path, quick=True)
    assert (row["wrong"], row["refused"]) == ([], row["refused"] if name == "mixtral" else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_right_or_refused_in_one_line(name, tmp_path):
    build(name, tmp_path / "model")
    row = model_matrix.check_model(name, tmp_path / "model", tmp_path)
    assert row["wrong"] == []


def test_records_of_a_block_are_computed_apart_and_without_padding():
    import torch
    from model_checks import records_of

    ids = torch.arange(1, 9)
    labels, starts = ids.clone(), torch.tensor([0, 0, 0, 3, 3, 3, 6, 6])
    labels[6:] = -100  # padding
    blocks = [{"input_ids": ids, "labels": labels, "starts": starts}]
    assert [record[0].tolist() for record, _ in records_of(blocks)] == [[1, 2, 3], [4, 5, 6]]


def test_figures_beyond_the_limit_and_nan_are_wrong():
    row = {"figures": {}, "wrong": []}
    model_matrix._note(row, "chats", {"base": 1e-6, "adapter": 1e-3, "gradient": float("nan")})
    assert row["wrong"] == ["chats: adapter differs by 1.0e-03", "chats: gradient differs by nan"]


def test_a_crash_and_a_hang_are_rows(tmp_path):
    checks = {"right": lambda: {"wrong": []}, "crashes": lambda: 1 / 0, "hangs": lambda: time.sleep(60)}
    rows = matrix_run.run_rows(checks, tmp_path, limit_seconds=1, jobs=3)
    assert [row["wrong"] for row in rows.values()] == [
        [], ["crash: ZeroDivisionError: division by zero"], ["not done after 1 s, or killed"],
    ]  # fmt: skip


@pytest.fixture
def chats(tmp_path):
    """Return the encoded records of a conversation of each kind, with the embedded model's template."""
    public = template_matrix.Public("", None, "<|im_end|>")
    template = (TOKENIZER / "chat_template.jinja").read_text(encoding="utf-8")
    return public, template_matrix.build_tokenizer(template, public)


def test_the_embedded_template_trains_exactly_its_answers(chats, tmp_path):
    public, tokenizer = chats
    for kind, record in template_matrix.conversations().items():
        outcome = template_matrix.check_record(kind, record, tokenizer, public, tmp_path)
        assert outcome == "ok" if kind in ("single turn", "several turns", "system") else outcome.startswith("refused")


def test_wrong_labels_and_tokens_are_seen(chats):
    public, tokenizer = chats
    record = template_matrix.conversations()["single turn"]
    ids = np.array(template_matrix.render(tokenizer, record, tokenize=True))
    at = len(template_matrix.render(tokenizer, record, 1, add_generation_prompt=True, tokenize=True))
    stop = ids.tolist().index(tokenizer.eos_token_id, at) + 1
    place = np.arange(len(ids))

    def faults(ids, start, stop):
        encoded = EncodedRecord(ids, (place >= start) & (place < stop))
        return list(template_matrix.Check(record, tokenizer, public, "assistant").find_faults([encoded]))

    assert faults(ids, at, stop) == []
    assert "expected 'The tower by the sea.<|im_end|>'" in faults(ids, at, stop - 1)[0]
    assert faults(ids, at - 1, stop)[0].startswith("trained behind no prompt")
    assert faults(np.where(place == 3, 9, ids), at, stop)[0].startswith("another text than apply_chat_template")
    assert "trains answers [], expected [1]" in faults(ids, 0, 0)


PAGE = matrix_run.PAGE.read_text(encoding="utf-8")


def rows_of(marker: str) -> list[list[str]]:
    text = PAGE[PAGE.index(f"{marker}: begin") : PAGE.index(f"{marker}: end")]
    return [re.split(r" (?<!\\)\| ", line.strip("| \n")) for line in text.splitlines() if line.startswith("| ")][1:]


def test_the_page_has_a_row_for_each_model_and_none_is_wrong():
    rows = rows_of("model matrix")
    assert {row[1] for row in rows} == MODELS.keys()
    assert [row[1] for row in rows if "**" in row[-1]] == []
    refused = [row[1] for row in rows if row[-1].startswith("refused")]
    assert len(refused) <= len(rows) * 8 / 60
    assert len({tiny.kind for tiny in MODELS.values()}) >= 60


def test_the_page_has_forty_templates_and_none_is_wrong():
    rows = rows_of("template matrix")
    assert len({row[0] for row in rows}) >= 40
    assert [row[0] for row in rows if "**" in " ".join(row)] == []
