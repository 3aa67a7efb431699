"""Test the comparison with other tools: five steps of each on the embedded model, resuming, the page, the made-up facts."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # scripts, which import one another by their names

import quality  # noqa: E402
import quality_facts  # noqa: E402
import quality_page  # noqa: E402
import quality_steps  # noqa: E402

NOTHING: dict[str, dict] = {part: {} for part in "ABCDEF"}


def options_for(tmp_path: Path, *flags: str) -> argparse.Namespace:
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    small = ["--length", "16", "--steps", "5", "--rows", "2", "--blocks", "4", "--eval-blocks", "2", "--dtype", "float32"]
    return quality.parse_arguments([*places, *small, *flags])


def test_five_steps_are_those_of_plain_transformers_and_peft(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_steps, "SYSTEMS", ["toolkit", "toolkit, library path", "plain"])
    monkeypatch.setattr(quality_steps, "LOADERS", ["toolkit"])
    options = options_for(tmp_path)
    piece = quality_steps.step_by_step(options, "float32")
    fast, library, plain = piece["runs"]
    assert len(plain["losses"]) == len(set(plain["losses"])) == 5 and len(set(plain["order"])) == 5
    for run in (fast, library):
        loss, norm = quality_steps.differences(run, plain)
        assert loss < quality_steps.LOSSES and norm < quality_steps.NORMS
    rows = quality_steps.exchange(options, {**piece, "runs": [plain]}, "float32")["runs"]
    differences = {row["loader"]: row["difference"] for row in rows}
    assert differences["toolkit"] < quality_steps.LOGITS < differences[None]


def test_another_start_or_order_is_noticed(tmp_path):
    import torch
    from quality_rivals import load_matrices, watch
    from safetensors.torch import save_file

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)})

    save_file({"other.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "start.safetensors")
    with pytest.raises(AssertionError, match="other matrices"):
        load_matrices(Model(), tmp_path / "start.safetensors")
    trainer = argparse.Namespace(
        args=argparse.Namespace(per_device_train_batch_size=1), training_step=lambda *_: 0.0, add_callback=lambda _: None
    )
    watch(trainer, [[1, 2], [3, 4]], quality_steps.Result("plain", 1))
    trainer.training_step(None, {"input_ids": torch.tensor([[1, 2]])})
    with pytest.raises(AssertionError, match="another order"):
        trainer.training_step(None, {"input_ids": torch.tensor([[1, 2]])})


def test_pieces_that_are_done_are_kept_and_none_begins_after_the_minutes(tmp_path, monkeypatch):
    calls = []

    def pieces(part, options):
        for name in ("seed 1", "seed 2", "seed 3"):
            yield name, partial(lambda name: calls.append(name) or {"runs": [{"name": "toolkit", "losses": [1.0, 2.0]}]}, name)

    monkeypatch.setattr(quality, "pieces_of", pieces)
    monkeypatch.setattr(quality.time, "monotonic", lambda: 100.0 * len(calls))  # each piece takes 100 s
    options = options_for(tmp_path, "--minutes", "3.4")  # 204 s: a third piece would not end within them
    assert not quality.measure(["B"], options)
    assert calls == ["seed 1", "seed 2"] and list(quality.load(options.results, "B")) == calls
    assert quality.measure(["B"], options)
    assert calls == ["seed 1", "seed 2", "seed 3"]
    stored = json.loads((options.results / "quality_B.json").read_text())["seed 3"]
    assert stored["runs"] == [{"name": "toolkit", "losses": [1.0, 2.0]}] and {"hardware", "date", "command", "model"} < set(
        stored
    )


def facts_of(**values) -> dict:
    return {"command": "c", "hardware": "h", "date": "d", "versions": "v", "model": "m", "seconds": 60, **values}


def losses_by_seed(other: list[float]) -> dict:
    runs = [[("toolkit", 3.0), ("plain", 3.0 + difference)] for difference in other]
    cost = {"tokens_per_second": None, "peak_reserved_gib": None}
    return {
        f"seed {seed}": facts_of(seed=seed, missing={}, runs=[{"name": name, "held_out": loss, **cost} for name, loss in pair])
        for seed, pair in enumerate(runs, 1)
    }


@pytest.mark.parametrize(
    ("other", "passed"), [([0.001, 0.002, 0.003, 0.002, 0.002], "yes"), ([0.02, 0.021, 0.019], "no: plain"), ([0.0], "no: plain")]
)
def test_part_b_passes_when_the_interval_lies_inside_the_margin(other, passed):
    assert quality_page.systems(losses_by_seed(other))[1] == passed


def test_an_interval_is_student_t():
    mean, width = quality_steps.interval([1.0, 2.0, 3.0])  # standard deviation 1, t = 4.303 with 2 degrees of freedom
    assert (mean, width) == (2.0, pytest.approx(4.303 / 3**0.5))


@pytest.mark.parametrize(("shift", "passed"), [(0.0, "yes"), (1e-3, "no: toolkit in bfloat16")])
def test_a_difference_in_bfloat16_must_be_zero_on_average(shift, passed):
    noise = [1e-3 * (-1) ** (step // 5) for step in range(50)]
    plain = {"system": "plain", "losses": [3.0] * 50, "gradient_norms": [1.0] * 50}
    toolkit = {**plain, "system": "toolkit", "losses": [3.0 + shift + each for each in noise]}
    done = {"bfloat16": facts_of(runs=[toolkit, plain], missing={})}
    assert quality_page.steps(done)[1] == passed


def test_the_page_holds_what_was_measured_and_names_what_was_not(tmp_path):
    results = NOTHING | {"B": losses_by_seed([0.001] * 4)}
    quality_page.write_page(tmp_path / "page.md", results)
    page = (tmp_path / "page.md").read_text()
    assert "| plain | held-out loss 3.0010, from the toolkit's +0.0010 ± 0.0000 |" in page and "## A." not in page
    assert "- B: held-out losses of five seeds" in page and "- E: 200 made-up facts" in page


def test_the_page_is_that_of_the_stored_results(tmp_path):
    results = {part: quality.load(quality.RESULTS, part) for part in "ABCDEF"}
    quality_page.write_page(tmp_path / "page.md", results)
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs" / "quality.md").read_text()


def test_no_fact_is_told_by_its_question():
    facts = quality_facts.make_facts(200)
    assert facts == quality_facts.make_facts(200) and len({fact["question"] for fact in facts}) == 200
    for fact in facts:
        assert fact["value"] in fact["answer"]
        assert fact["value"] not in fact["question"] + fact["other_question"] and fact["question"] != fact["other_question"]
    answers = [fact["answer"] for fact in facts[:2]] + [f"It is {facts[2]['value']}", "I do not know."]
    assert quality_facts.score(facts[:4], answers) == {"exact": 0.5, "named": 0.75}


def test_an_answer_is_what_stands_before_its_end(tiny_dir):
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    end = tokenizer.eos_token_id
    answer = tokenizer("The room number is 7.")["input_ids"]

    class Model:
        device = "cpu"

        def eval(self):
            return self

        def generate(self, input_ids, **rest):
            written = torch.tensor([[*answer, end, answer[0]]]).expand(len(input_ids), -1)
            return torch.cat([input_ids, written], 1)

    job = argparse.Namespace(adapter=tiny_dir)
    assert quality_facts.answers(Model(), job, ["Which room?", "And yours?"]) == ["The room number is 7."] * 2


@pytest.mark.slow
@pytest.mark.parametrize("part", "BDEF")
def test_a_part_runs_on_a_cpu(part, tmp_path):
    options = options_for(tmp_path, "--seeds", "1", "--facts", "4", "--epochs", "1", "--length", "64")
    assert quality.measure([part], options)
    quality_page.write_page(tmp_path / "page.md", NOTHING | {part: quality.load(options.results, part)})
    assert f"## {part}." in (tmp_path / "page.md").read_text()
