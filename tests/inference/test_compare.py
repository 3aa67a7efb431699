"""Check perplexities against the library's loss, and which data they are measured on."""

import json
import math
from pathlib import Path

import pytest
import torch

import inference_example
from qlora_kit.config_file import load_config, override
from qlora_kit.data.dataset import load_blocks
from qlora_kit.errors import UserError
from qlora_kit.inference import compare
from qlora_kit.inference.compare import evaluation_blocks, judge_difference
from qlora_kit.model.perplexity import Difference

PROMPT = "The river"


def library_loss(model, blocks) -> torch.Tensor:
    """Return transformers' own loss of each block, (blocks,)."""
    with torch.no_grad():
        return torch.stack([model(ids[None], labels=ids[None]).loss for ids in (row["input_ids"] for row in blocks)]).double()


def test_both_perplexities_agree_with_the_librarys_loss(adapter, greedy, capsys):
    name = "samples/README.md"
    inference_example.main(["--adapter", str(adapter), "--device", "cpu", "--perplexity", name, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)["perplexity"]
    tokens = greedy.encoder.tokenizer(Path(name).read_text(encoding="utf-8"))["input_ids"]
    blocks = [{"input_ids": torch.tensor(tokens[at : at + 64])} for at in range(0, len(tokens) - 63, 64)]
    after = library_loss(greedy.engine.model, blocks)
    with greedy.adapter_off():
        before = library_loss(greedy.engine.model, blocks)
    count = len(blocks)
    assert found["base"]["blocks"] == count > 5
    assert found["base"]["loss"] == pytest.approx(before.mean().item(), rel=1e-4)
    assert found["adapter"]["perplexity"] == pytest.approx(after.mean().exp().item(), rel=1e-3)
    assert found["difference"]["loss"] == pytest.approx((after - before).mean().item(), abs=1e-4)
    assert found["difference"]["standard_error"] == pytest.approx((after - before).std().item() / count**0.5, rel=1e-2)
    assert f"{count} blocks of 64 tokens" in found["definition"] and name in err


def test_with_a_mode_perplexities_go_to_standard_error(adapter, capsys):
    flags = ["--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "4", "--prompt", PROMPT]
    inference_example.main(flags)
    expected = capsys.readouterr().out
    inference_example.main([*flags, "--perplexity", "samples/alpaca.jsonl"])
    out, err = capsys.readouterr()
    assert out == expected
    assert "base " in err and "adapter " in err and "the adapter is better" in err
    assert "alpaca records" in err and "without overlap" in err


def test_the_data_of_training_means_its_held_out_blocks(greedy):
    config = override(load_config(Path("configs/tiny.yaml")), {"data.max_length": 64})
    _, held_out = load_blocks(config, greedy.encoder.tokenizer)
    blocks, what = evaluation_blocks(config.data.dataset, config, greedy.encoder.tokenizer)
    assert blocks.fingerprint() == held_out.fingerprint() and "held out" in what


def test_base_only_measures_the_base_model_alone(adapter, capsys):
    flags = ["--adapter", str(adapter), "--device", "cpu", "--base_only", "--perplexity", "samples/alpaca.jsonl", "--json"]
    inference_example.main(flags)
    assert set(json.loads(capsys.readouterr().out)["perplexity"]) == {"data", "base", "definition"}


def test_a_text_is_measured_after_a_run_on_records_that_could_stop_early(greedy):
    config = override(load_config(Path("configs/tiny.yaml")), {
        "data.max_length": 64, "data.format": "alpaca", "training.early_stopping_patience": 2, "training.save_steps": 10,
        "training.eval_steps": 10,
    })  # fmt: skip
    blocks, what = evaluation_blocks("samples/README.md", config, greedy.encoder.tokenizer)
    assert what == "samples/README.md" and len(blocks) > 5


def test_an_unreachable_data_set_is_named_by_the_flag(greedy):
    config = override(load_config(Path("configs/tiny.yaml")), {"data.max_length": 64})
    trained = override(config, {"data.dataset": "nobody/has-this", "data.eval_split": "validation"})
    for found_in in (config, trained):
        with pytest.raises(UserError) as error:
            evaluation_blocks("nobody/has-this", found_in, greedy.encoder.tokenizer)
        (problem,) = error.value.lines
        assert problem.startswith("--perplexity: nobody/has-this: is not on this machine")
        assert problem.endswith("--perplexity FILE.") and "data.dataset" not in problem


def test_a_subset_may_follow_the_name_of_a_data_set(greedy, monkeypatch):
    opened = []
    untouched = compare.open_source

    def open_source(data, names, split, flag):
        opened.append((data.subset, names, split))
        return untouched(data.model_copy(update={"subset": None}), ["samples/articles.txt"], "", flag)

    monkeypatch.setattr(compare, "open_source", open_source)
    config = override(load_config(Path("configs/tiny.yaml")), {"data.max_length": 64})
    _, what = evaluation_blocks("Salesforce/wikitext:wikitext-2-raw-v1", config, greedy.encoder.tokenizer)
    assert opened == [("wikitext-2-raw-v1", ["Salesforce/wikitext"], "test")]
    assert what.startswith("Salesforce/wikitext:wikitext-2-raw-v1, split test")


@pytest.mark.parametrize("loss, error, words", [
    (-0.5, 0.1, "better"), (0.5, 0.1, "worse"), (0.1, 0.1, "no difference"), (0.0, 0.0, "nothing"), (1.0, math.nan, "one block"),
])  # fmt: skip
def test_a_verdict_needs_two_standard_errors(loss, error, words):
    assert words in judge_difference(Difference(loss, error))
