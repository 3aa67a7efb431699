"""Test the checks of the exercises: every correct form is accepted, and each usual mistake is named in both languages."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from finetuning_lessons import exercises, words
from finetuning_lessons.layers import LoRALayer


def verdict(capsys, check, answer):
    check(answer)
    return " ".join(capsys.readouterr().out.split())


def ranks(sizes=sum, share=100, error=lambda s, r: (s[r:].square().sum() / s.square().sum()).sqrt()):
    """Write an answer to exercise 1, with one of its numbers replaced."""

    def compare_ranks(matrix, ranks):
        values = torch.linalg.svdvals(matrix)
        for rank in ranks:
            count = rank * sizes(matrix.shape)
            yield {
                "trainable_params": count,
                "param_ratio": share * count / matrix.numel(),
                "approximation_error": error(values, rank),
            }

    return compare_ranks


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ranks(), "✓"),
        (lambda m, rs: [{name: np.float32(n) for name, n in row.items()} | {"rank": 1} for row in ranks()(m, rs)], "✓"),
        (ranks(sizes=lambda shape: 2 * shape[0]), "when the matrix is not square"),
        (ranks(sizes=lambda shape: shape[1]), "trains both"),
        (ranks(share=1), "no percentage"),
        (ranks(error=lambda s, r: s[r:].square().sum() / s.square().sum()), "its square"),
        (ranks(error=lambda s, r: (s[:r].square().sum() / s.square().sum()).sqrt()), "what the copy keeps"),
        (ranks(error=lambda s, r: s[r] / s[0]), "not one"),
        (ranks(error=lambda s, r: 0.5), "another number"),
        (lambda m, rs: [{"rank": r} for r in rs], "has no trainable_params"),
        (lambda m, rs: list(ranks()(m, rs))[:2], "not 2"),
        (lambda m, rs: None, "… Not answered yet"),
        (lambda m, rs: m.nothing, "AttributeError"),
    ],
)
def test_ranks(answer, said, capsys):
    assert said in verdict(capsys, exercises.check_1, answer)


def loop(order="zero backward step", result=lambda losses: losses, loss=lambda model, batch: model(**batch).loss):
    """Write an answer to exercise 2 whose three calls come in an order, or are missing."""

    def train_epoch(model, batches, optimizer):
        losses = []
        for batch in batches:
            value = loss(model, batch)
            calls = {"zero": optimizer.zero_grad, "backward": value.backward, "step": optimizer.step}
            for name in order.split():
                calls[name]()
            losses.append(value)
        return result(losses)

    return train_epoch


def unshifted(model, batch):
    return nn.functional.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten())


def shifted(model, batch):
    return nn.functional.cross_entropy(model(batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (loop(), "✓"),
        (loop("backward step zero"), "✓"),
        (loop(loss=shifted), "✓"),
        (loop(result=lambda losses: np.array([loss.item() for loss in losses])), "✓"),
        (loop("zero backward"), "no weight has moved"),
        (loop("backward zero step"), "in what order"),
        (loop(""), "in what order"),
        (loop("backward step"), "add up"),
        (loop("step zero backward"), "stopped at `calls[name]()`: RuntimeError"),
        (loop("zero backward step step"), "not by one plain step"),
        (loop(loss=unshifted), "shifts the labels itself"),
        (loop(result=lambda losses: torch.stack(losses).cumsum(0)), "each batch's own loss"),
        (loop(result=lambda losses: sum(losses).item()), "no list of numbers"),
        (loop(result=lambda losses: losses[:1]), "4 numbers were expected"),
        (loop(result=lambda losses: ...), "… Not answered yet"),
    ],
)
def test_training_loop(answer, said, capsys):
    assert said in verdict(capsys, exercises.check_2, answer)


def labels(prompt, answer, end, length):
    return [-100] * len(prompt) + answer + [end] + [-100] * (length - len(prompt) - len(answer) - 1)


def by_identity(prompt, answer, end, length):
    ids = prompt + answer + [end] * (length - len(prompt) - len(answer))
    return [-100 if token == end else token for token in ids]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (labels, "✓"),
        (lambda *given: torch.tensor([labels(*given)]), "✓"),
        (lambda *given: np.array(labels(*given)), "✓"),
        (lambda prompt, *rest: prompt + labels(prompt, *rest)[len(prompt) :], "a part of the prompt"),
        (lambda *given: [*labels(*given)[1:], -100], "one position early"),
        (lambda p, a, end, length: labels(p, a, end, length)[: len(p) + len(a)], "labels for"),
        (lambda p, a, end, length: labels(p, a, -100, length), "does not train the end"),
        (lambda p, a, end, length: [-100] * len(p) + a + [end] * (length - len(p) - len(a)), "trains padding"),
        (by_identity, "a part of the prompt"),
        (lambda p, a, end, length: by_identity([], labels(p, a, end, length), end, length), "does not train the end"),
    ],
)  # fmt: skip
def test_labels(answer, said, capsys):
    assert said in verdict(capsys, exercises.check_3, answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((29933568, 1843200), "✓"),
        (torch.tensor([29933568, 1843200]), "✓"),
        ((29933568, 1843200.0), "✓"),
        ((831488, 1843200), "one layer"),
        ((29933568, 36 * 8 * 4 * 2048), "fewer outputs"),
        ((29933568, 36 * 8 * 2 * 2048), "A alone"),
        ((29933568, 3686400), "another rank"),
        ((29933568, 7), "another number"),
        ((29933568,), "2 numbers"),
        ((..., ...), "… Not answered yet"),
    ],
)
def test_counts(answer, said, capsys):
    assert said in verdict(capsys, exercises.check_4, answer)


STARTS = {
    ("random", "random"): (False, True), ("random", "zero"): (True, True),
    ("zero", "random"): (True, True), ("zero", "zero"): (True, False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (STARTS, "✓"),
        ({start: [int(value) for value in values] for start, values in STARTS.items()}, "✓"),
        (STARTS | {("zero", "zero"): (True, True)}, "('zero', 'zero'): A's gradient"),
        (STARTS | {("random", "random"): (True, True)}, "('random', 'random'): how large"),
        (STARTS | {("zero", "zero"): (..., ...)}, "… Not answered yet"),
    ],
)
def test_starts(answer, said, capsys):
    assert said in verdict(capsys, exercises.check_5, answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda block, double: 4 + (8 / block + 32 / (block * 256) if double else 32 / block), "✓"),
        (lambda block, double: 4 + 32 / block, "takes 8 bits"),
        (lambda block, double: 4 + (8 if double else 32) / block, "share a scale, which"),
        (lambda block, double: 4 + (8 / block + 32 / 256 if double else 32 / block), "not 256 weights"),
        (lambda block, double: 0.5 + 4 / block, "bytes"),
        (lambda block, double: None, "… Not answered yet"),
    ],
)
def test_bits(answer, said, capsys):
    assert said in verdict(capsys, exercises.check_6, answer)


def each_layer(change):
    def take_out(model):
        for layer in [module for module in model.modules() if isinstance(module, LoRALayer)]:
            change(layer)

    return take_out


def unmerge_and_silence(layer):
    layer.unmerge_weights()
    layer.scaling = 0.0


@torch.no_grad()
def subtract(layer):
    if layer.merged:
        layer.linear.weight -= layer.update()
        layer.original_weight = None
    nn.init.zeros_(layer.lora_B.weight)


def keep_linear(model):
    for layer in model:
        if isinstance(layer, LoRALayer):
            layer.unmerge_weights()
    return nn.Sequential(*[layer.linear if isinstance(layer, LoRALayer) else layer for layer in model])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (each_layer(unmerge_and_silence), "✓"),
        (keep_linear, "✓"),
        (each_layer(subtract), "Nearly"),
        (each_layer(LoRALayer.unmerge_weights), "One of the two"),
        (each_layer(lambda layer: nn.init.zeros_(layer.lora_B.weight)), "One of the two"),
        (lambda model: None, "… Not answered yet"),
    ],
)
def test_taking_out(answer, said, capsys):
    assert said in verdict(capsys, exercises.check_7, answer)


def test_answers_in_chinese(capsys):
    words.choose("zh-TW")
    try:
        shown = [
            verdict(capsys, exercises.check_6, answer) for answer in (lambda *_: None, lambda *_: 4.0, lambda *_: math.nothing)
        ]
        right = verdict(capsys, exercises.check_4, (29933568, 1843200))
    finally:
        words.choose("en")
    assert [line[:4] for line in (*shown, right)] == ["… 還沒", "✗ 還差", "✗ 程式", "✓ 兩個"]
