"""Test the lesson of gradient checkpointing: bytes counted by hand, equal gradients, less kept."""

import pytest
import torch

from finetuning_lessons.gradient_checkpointing import (
    LENGTHS,
    ON_GPU_GIB,
    ON_GPU_SPEED,
    LiveBytes,
    Step,
    byte_rows,
    count_bytes,
    fixed_bytes,
    load_adapted_model,
    print_findings,
    run_backward,
    time_rows,
)


def test_bytes_by_hand():
    with LiveBytes() as live:
        x = torch.empty(1000)
        view = x.view(10, 100)
        x += 1  # in place
        assert live.now == 4000
        more = x + 1
        assert live.now == 8000
        del more
        assert live.now == 4000
        del x
        assert live.now == 4000  # the view holds it
        del view
    assert (live.now, live.peak) == (0, 8000)


def test_bytes_kept_for_the_backward_pass_by_hand():
    """exp keeps its output, 400 bytes; sum keeps none; the sum itself is 4 bytes."""
    x = torch.zeros(100, requires_grad=True)
    with LiveBytes() as live:
        total = x.exp().sum()
        assert live.now == 404
        total.backward()
    assert x.grad.tolist() == [1.0] * 100


def test_tensors_created_outside_are_not_counted():
    x = torch.empty(1000)
    with LiveBytes() as live:
        x.add_(1)
        x.view(10, 100).mul_(2)
    assert live.peak == 0


@pytest.fixture(scope="module")
def models():
    return {checkpointing: load_adapted_model(checkpointing, "cpu") for checkpointing in (False, True)}


def test_checkpointing_changes_no_gradient(models):
    ids = torch.arange(64).view(2, 32)
    for model in models.values():
        model.zero_grad()
        run_backward(model, ids)
    pairs = list(zip(models[False].parameters(), models[True].parameters(), strict=True))
    compared = [(a.grad, b.grad) for a, b in pairs if a.grad is not None]
    assert len(compared) == 6 * 7 * 2
    assert all(torch.equal(a, b) for a, b in compared)


def test_checkpointing_keeps_the_input_of_each_layer_and_the_logits(models):
    """Besides the log probabilities, one input of 192 numbers per layer and token is kept, and little else."""
    ids = torch.arange(128).view(2, 64)
    kept, peak = count_bytes(models[True], ids)
    logits, inputs = 4 * ids.numel() * 6144, 4 * ids.numel() * 6 * 192
    assert logits + inputs <= kept <= 1.1 * (logits + inputs)
    kept_without, peak_without = count_bytes(models[False], ids)
    assert kept < kept_without / 3 and peak < peak_without


def test_fixed_bytes_by_hand():
    """3,868,992 weights, and a gradient and two moments for each of LoRA's 325,632 parameters."""
    assert fixed_bytes(load_adapted_model(False, "cpu")) == 4 * 3_868_992 + 12 * 325_632


def test_rows_show_changes_in_percent_and_the_range_of_rounds():
    without, with_ = Step(4 * 2**20, 8 * 2**20, (10.0, 10.0, 20.0)), Step(2**20, 6 * 2**20, (13.0, 12.0, 28.0))
    steps = {64: {False: without, True: with_}}
    assert byte_rows(steps) == [["2 x 64", "4.0", "1.0", "-75 %", "8.0", "6.0", "-25 %"]]
    assert time_rows(steps) == [["2 x 64", "10", "13", "30 %", "20 to 40 %"]]


def test_figures_of_the_gpu_are_those_of_the_benchmarks(root):
    lines = (root / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    peaks = {cells[0]: float(cells[2]) for cells in rows if len(cells) == 5 and cells[3].endswith("%")}
    assert ON_GPU_GIB["1 x 512"] == (peaks["no recomputation"], peaks["3B, rank 16, 1 x 512"])
    capped = {cells[1]: cells for cells in rows if cells[0] == "no cap"}
    without, with_ = (
        capped["unsloth 16 x 1, no checkpointing, dropout 0"],
        capped["unsloth 16 x 1, plain checkpointing, dropout 0"],
    )
    assert ON_GPU_GIB["16 x 512"] == (float(without[4]), float(with_[4]))
    assert ON_GPU_SPEED == tuple(int(row[2].replace(",", "")) for row in (without, with_))


@pytest.mark.parametrize("longest, said", [(11.6, True), (40.0, False)])
def test_a_time_that_hardly_grows_with_the_tokens_is_explained(capsys, longest, said):
    times = dict.fromkeys(LENGTHS, (10.0,)) | {LENGTHS[-1]: (longest,)}
    steps = {length: dict.fromkeys((False, True), Step(2**20, 2**20, time)) for length, time in times.items()}
    print_findings(steps, 0)
    assert ("8 times the tokens take 1.2 times as long: a GPU waits" in " ".join(capsys.readouterr().out.split())) == said
