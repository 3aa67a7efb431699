"""Test the spread over seeds: by hand, paired, stored and read; and what the committed results hold."""

import argparse
import importlib
import json
import math

import pytest

from finetuning_lessons import seeds
from finetuning_lessons.seeds import RESULTS, Results, Spread, load_results, measure_seeds, time_in_turns
from qlora_kit.errors import UserError

LOSS = "loss, nats a token"
STORED = sorted(path.stem for path in RESULTS.glob("*.json"))


def loss_results(**losses: list[float]) -> Results:
    count = len(next(iter(losses.values())))
    return Results(tuple(range(1, count + 1)), tuple({LOSS: {name: losses[name][i] for name in losses}} for i in range(count)))


def test_mean_and_standard_error_by_hand():
    """1, 2, 3: their standard deviation is 1."""
    assert f"{Spread((1.0, 2.0, 3.0)):.3f}" == "2.000 ± 0.577"
    assert f"{Spread((1.0, 2.0, 3.0)):+.1f}" == "+2.0 ± 0.6"
    assert f"{Spread((2.0,)):.3f}" == "2.000"


@pytest.mark.parametrize(
    ("values", "noise"),
    [
        ((1.0, 1.2, 1.1), False),
        ((-1.0, -1.2, -1.1), False),
        ((0.1, 2.0, 0.1), True),  # 0.73 ± 0.63
        ((1.0, 1.0, 1.0, 1.0, 1.0, -0.1), True),  # 0.82 ± 0.18, but one seed says the opposite
        ((0.0, 0.0, 0.0), True),
        ((5.0,), True),
    ],
)
def test_a_difference_is_noise_unless_it_exceeds_twice_its_error_in_every_seed(values, noise):
    assert Spread(values).is_noise == noise


def test_what_the_runs_of_a_seed_share_cancels():
    """The seeds are 10 apart; a is 0.1 below b in each."""
    results = loss_results(a=[1.0, 11.0, 21.0], b=[1.1, 11.1, 21.2])
    assert results.of(LOSS, "a").error > 5
    assert results.gap(LOSS, "b", "a").compared("+.2f", " nats") == "+0.13 ± 0.03 nats"
    assert results.gap(LOSS, "a", "a").compared("+.1f") == "+0.0 ± 0.0 (within noise)"


def test_only_what_no_run_reverses_is_ranked():
    results = loss_results(a=[1.0, 1.1, 1.2], b=[1.05, 1.0, 1.3], c=[2.0, 2.1, 2.2])
    assert results.order(LOSS, {name: name for name in "cba"}) == "a ≈ b < c (≈: within noise)"
    assert loss_results(a=[1.0], b=[2.0]).order(LOSS, {"a": "a", "b": "b"}) == "a ? b (one seed: no ranking)"


def test_times_are_medians_of_turns(monkeypatch):
    clock = iter([0, 1, 1, 3, 3, 104, 104, 106, 106, 109, 109, 111])  # a: 1, 101 and 3 seconds; b: 2, 2 and 2
    monkeypatch.setattr("time.process_time", lambda: next(clock))
    turns: list[str] = []
    assert time_in_turns({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3) == {"a": 3000, "b": 2000}
    assert turns == list("ababab")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def run(count: int | None, steps: int = 3):
    arguments = argparse.Namespace(seeds=count, name="lesson")
    measure = lambda seed: {LOSS: {"a": 1.0 + seed}, "step, ms": {"a": 10.0 * seed}}  # noqa: E731
    return measure_seeds(arguments, measure, {"steps": steps})


def test_seeds_are_stored_and_a_plain_run_stands_beside_them(folder):
    one, results = run(3)
    assert one == {LOSS: {"a": 2.0}, "step, ms": {"a": 10.0}}
    stored = json.loads((folder / "lesson.json").read_text())
    assert stored["command"] == "python -m finetuning_lessons.lesson --seeds 3"
    assert stored["versions"]["torch"] and stored["hardware"] and stored["settings"] == {"steps": 3}
    assert stored["quantities"][LOSS]["a"] == {"values": [2, 3, 4], "mean": 3, "standard_error": pytest.approx(3**-0.5, rel=1e-5)}
    assert stored["quantities"]["step, ms"]["a"] == {"values": [10, 20, 30], "median": 20, "range": [10, 30]}
    assert results.median_range("step, ms", "a", 1) == "20.0 (10.0-30.0)"
    one, again = run(None)
    assert one[LOSS]["a"] == 1.0 and again == results  # seed 0 is none of those that are stored


def test_without_stored_results_of_these_settings_one_seed_stands_alone(folder, capsys):
    assert run(None)[1].seeds == (0,)
    run(3)
    capsys.readouterr()
    assert run(None, steps=4)[1].seeds == (0,)
    assert capsys.readouterr().out == "The stored results are of other settings.\n"


def test_too_few_seeds_and_a_folder_that_cannot_be_written_are_one_line(folder):
    with pytest.raises(UserError, match="--seeds: 2: says nothing about noise"):
        run(2)
    folder.touch()
    with pytest.raises(UserError, match=r"--seeds: .*results: cannot be written"):
        run(3)


@pytest.mark.parametrize("name", STORED)
def test_committed_results_are_of_todays_settings_and_say_where_they_are_from(name):
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    lesson = importlib.import_module(f"finetuning_lessons.{name}")
    assert stored["command"] == f"python -m finetuning_lessons.{name} --seeds {len(stored['seeds'])}"
    assert len(stored["seeds"]) >= 3 and stored["date"] and stored["hardware"] and set(stored["versions"]) >= {"torch", "peft"}
    assert stored["settings"]["steps"] == lesson.STEPS
    results = load_results(name, stored["settings"])
    for quantity, items in stored["quantities"].items():
        for item, one in items.items():
            spread = results.of(quantity, item)
            if "mean" in one:
                assert (one["mean"], one["standard_error"]) == pytest.approx((spread.mean, spread.error), rel=1e-2, abs=1e-4)
            else:
                assert one["median"] == spread.median and all(math.isfinite(value) and value > 0 for value in spread.values)


def test_every_lesson_that_repeats_seeds_has_committed_results():
    folder = RESULTS.parent
    repeating = {path.stem for path in folder.glob("*.py") if "measure_seeds(arguments" in path.read_text(encoding="utf-8")}
    assert repeating - {"seeds"} == set(STORED)
