"""Check the answers to the exercises of the course: right or wrong, and why, but never the answer.

    from finetuning_lessons import exercises
    exercises.check_1(compare_ranks)

A check prints a line or two in the language that words.choose has set. It tries the answer on inputs that the exercise does not
show, and compares with what is computed here. A missing answer, or one that stops with an error, does not stop the notebook.
"""

import functools
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from finetuning_lessons.layers import LoRALayer, replace_linear_layers
from finetuning_lessons.lesson import print_text
from finetuning_lessons.words import text

IGNORED = -100  # the label that the loss leaves out
LAYERS = 36  # of Qwen2.5-3B, whose projections have these inputs and outputs
SIZES = {
    "q": (2048, 2048), "k": (2048, 256), "v": (2048, 256), "o": (2048, 2048),
    "gate": (2048, 11008), "up": (2048, 11008), "down": (11008, 2048),
}  # fmt: skip
Words = tuple[str, str]  # English and Chinese
Slip = tuple[float, str, str]  # a wrong number that a known mistake gives, and the mistake in English and Chinese


class Wrong(Exception):
    """Say why an answer is wrong."""

    def __init__(self, english: str, chinese: str):
        super().__init__(text(english, chinese))


def _exercise(judge: Callable[[Any], Words]) -> Callable[[Any], None]:
    """Turn a function that returns praise, or raises Wrong, into a check that prints the verdict."""

    @functools.wraps(judge)
    def check(answer: Any) -> None:
        try:
            verdict = "✓ " + text(*judge(answer))
        except NotImplementedError:
            verdict = text("… Not answered yet: fill in the cell and run it again.", "… 還沒作答：把空格填好，再執行一次吧！")
        except Wrong as why:
            verdict = text("✗ Not yet. ", "✗ 還差一點。") + str(why)
        except Exception as error:  # the student's own: one line, so that the cells below still run
            frames = traceback.extract_tb(error.__traceback__)
            line = [frame.line for frame in frames if "site-packages" not in frame.filename][-1]
            verdict = text("✗ Your code stopped at", "✗ 程式停在") + f" `{line}`: {type(error).__name__}: {error}"
        print_text(verdict)

    return check


def _given(value: Any) -> Any:
    """Return an answer; raise NotImplementedError where it is None or `...`, or holds one of them."""
    parts: Sequence[Any] = (value,)
    if isinstance(value, Mapping | list | tuple):
        parts = list(value.values() if isinstance(value, Mapping) else value)
    if any(part is None or part is ... for part in parts):
        raise NotImplementedError
    return value


def _numbers(values: Any, count: int) -> list[float]:
    """Return a list, tuple, array or tensor as `count` floats."""
    try:
        numbers = [float(value.detach() if isinstance(value, Tensor) else value) for value in values]
    except (TypeError, ValueError) as error:
        raise Wrong(f"{values!r} is no list of numbers.", f"{values!r} 不是一串數字。") from error
    if len(numbers) != count:
        raise Wrong(f"{count} numbers were expected, not {len(numbers)}.", f"應該有 {count} 個數字，這裡有 {len(numbers)} 個。")
    return numbers


def _compare(what: str, value: Any, right: float, slips: Sequence[Slip], tolerance: float = 1e-3) -> None:
    """Raise Wrong unless a number is right but for rounding, with the mistake that explains it where one does."""
    [number] = _numbers([value], 1)
    if math.isclose(number, right, rel_tol=tolerance):
        return
    known = [words for wrong, *words in slips if math.isclose(number, wrong, rel_tol=tolerance)]
    english, chinese = known[0] if known else ("It is another number.", "應該是別的數字。")
    raise Wrong(f"{what} = {number:g}: {english}", f"{what} = {number:g}：{chinese}")


@_exercise
def check_1(compare_ranks: Callable[[Tensor, Sequence[int]], Any]) -> Words:
    """Check compare_ranks(matrix, ranks): parameters, their share and the error of the best copy, for each rank."""
    ranks = (1, 4, 16)
    for seed, shape in enumerate([(48, 32), (24, 64)]):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        results = list(_given(compare_ranks(matrix.clone(), ranks)))
        if len(results) != len(ranks):
            raise Wrong(
                f"{len(ranks)} ranks give {len(ranks)} dicts, not {len(results)}.",
                f"{len(ranks)} 個 rank 應該有 {len(ranks)} 個 dict，這裡有 {len(results)} 個。",
            )
        for rank, result in zip(ranks, results, strict=True):
            for name, right, slips in _rank_numbers(matrix, rank):
                if name not in _given(result):
                    raise Wrong(f"A dict has no {name}.", f"有個 dict 裡少了 {name}。")
                _compare(f"{shape[0]} × {shape[1]}, rank {rank}: {name}", result[name], right, slips)
    return (
        "Right, for matrices that are not square too. See how slowly the error of random numbers falls.",
        "答對了，不是方陣的矩陣也對！注意看：隨機矩陣的誤差降得多慢。",
    )


def _rank_numbers(matrix: Tensor, rank: int) -> Iterator[tuple[str, float, list[Slip]]]:
    """Yield name and value of each number that exercise 1 asks for, with the usual slips."""
    rows, columns = matrix.shape
    trained = rank * (rows + columns)
    square = ("A and B differ in size when the matrix is not square.", "矩陣不是方陣時，A 和 B 的大小不一樣。")
    one = ("That is A or B: LoRA trains both.", "這只算了 A 或 B：LoRA 兩個都訓練。")
    sizes: list[Slip] = [(rank * factor * side, *words) for side in (rows, columns) for factor, words in ((2, square), (1, one))]
    yield "trainable_params", trained, sizes
    share = trained / (rows * columns)
    whole = ("That is a share of W with A and B; of W alone was asked for.", "分母是 W 加上 A 與 B；題目問的是 W。")
    yield "param_ratio", 100 * share, [(share, "That is no percentage.", "這不是百分比。"), (100 * share / (1 + share), *whole)]
    values = torch.linalg.svdvals(matrix)  # descending
    missed = values[rank:].square().sum()
    error = float((missed / values.square().sum()).sqrt())
    yield (
        "approximation_error",
        error,
        [
            (error**2, "That is its square.", "這是誤差的平方，還沒開根號。"),
            (math.sqrt(1 - error**2), "That is what the copy keeps, not what it misses.", "這是留住的，題目問的是漏掉的。"),
            (100 * error, "That is a percentage; a share was asked for.", "這是百分比；題目要的是 0 到 1 的比例。"),
            (float(missed.sqrt()), "Divide it by the size of the matrix.", "還要除以矩陣的大小。"),
            (
                float(values[rank] / values[0]),
                "All missing singular values count, not one.",
                "漏掉的奇異值都要算，不是只算一個。",
            ),
            (float(values[rank:].sum() / values.sum()), "Singular values add up by their squares.", "奇異值要先平方再相加。"),
        ],
    )


@_exercise
def check_2(train_epoch: Callable[[nn.Module, Sequence[Any], torch.optim.Optimizer], Any]) -> Words:
    """Check train_epoch(model, batches, optimizer): one step for each batch; returns their losses."""
    begins, model, batches, optimizer = _start_small_run()
    losses = _numbers(_given(train_epoch(model, batches, optimizer)), len(batches))
    ends = _trained_weights(model)
    right, right_ends = _run_small()
    if torch.equal(ends, begins):
        if any(p.grad is not None and p.grad.any() for p in model.parameters()):
            raise Wrong("There are gradients, but no weight has moved.", "梯度有了，權重卻完全沒動。")
        raise Wrong(
            "No weight has moved and no gradient is left: in what order do backward, step and zero_grad stand?",
            "權重沒動，也沒有留下梯度：backward、step、zero_grad 的順序對嗎？",
        )
    if not math.isclose(losses[0], right[0], rel_tol=1e-4):
        raise Wrong(
            "The first loss is not the model's own: give it the whole batch; it shifts the labels itself.",
            "第一個損失就和模型算的不同：把整個批次交給模型，它自己會把標籤錯開一格。",
        )
    if not torch.allclose(ends, right_ends, atol=1e-5):
        if torch.allclose(ends, _run_small(clear=False)[1], atol=1e-5):
            raise Wrong("The gradients of all steps add up.", "每一步的梯度都累加起來了。")
        raise Wrong("The weights moved, but not by one plain step a batch.", "權重動了，但不是每個批次更新一步的結果。")
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(losses, right, strict=True)):
        raise Wrong("The weights are right: return each batch's own loss.", "權重對了：請傳回每個批次自己的損失。")
    return "Right: the losses and the weights of the loop below.", "答對了：損失和權重都跟下面的解答一模一樣！"


def _start_small_run() -> tuple[Tensor, nn.Module, list[dict[str, Tensor]], torch.optim.Optimizer]:
    """Return the trained weights at the start, a model of one layer with LoRA, four batches of two texts, and an optimizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32}
        quiet: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **quiet)).train()
        replace_linear_layers(model, ("c_attn", "c_fc"), rank=4)
        tokens = torch.randint(32, (4, 2, 12))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} for ids in tokens]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
    return _trained_weights(model), model, batches, optimizer


def _trained_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def _run_small(clear: bool = True) -> tuple[list[float], Tensor]:
    """Run the loop, or one that never clears the gradients."""
    _, model, batches, optimizer = _start_small_run()
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        if clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, _trained_weights(model)


@_exercise
def check_3(make_labels: Callable[[list[int], list[int], int, int], Any]) -> Words:
    """Check make_labels(prompt, answer, end, length): the answer and its end are trained, prompt and padding are not."""
    for prompt, answer, end, length in (([5, 6, 7], [8, 9], 2, 9), ([5, 2, 7], [7, 8, 5], 2, 7), ([4], [6, 2, 9, 6], 2, 12)):
        labels = torch.as_tensor(_given(make_labels(list(prompt), list(answer), end, length))).flatten().tolist()
        right = [IGNORED] * len(prompt) + [*answer, end]
        right += [IGNORED] * (length - len(right))
        if labels != right:
            english, chinese = _label_mistake(labels, right, len(prompt), len(prompt) + len(answer))
            call = f"make_labels({prompt}, {answer}, {end}, {length})"
            raise Wrong(f"{call} {english}", f"{call} {chinese}")
    return "Right, also where padding and end are the same token.", "答對了！填充與結尾是同一個 token 時也不會錯。"


def _label_mistake(labels: list[int], right: list[int], begin: int, end: int) -> Words:
    """Say what is wrong with labels, of which `begin` to `end` are the answer's."""
    if len(labels) != len(right):
        return f"has {len(labels)} labels for {len(right)} positions.", f"給了 {len(labels)} 個標籤，但有 {len(right)} 個位置。"
    if labels[:-1] == right[1:]:
        return "is one position early: the model shifts labels itself.", "早了一格：模型自己會把標籤錯開。"
    if labels[:begin] != right[:begin]:
        return "trains a part of the prompt.", "訓練到了提示。"
    if labels[begin:end] != right[begin:end]:
        return (
            "does not train the whole answer: a token of the answer may occur elsewhere too.",
            "沒有訓練整個回答：回答裡的 token 也可能出現在別的地方。",
        )
    if labels[end] != right[end]:
        return "does not train the end: such a model does not learn to stop.", "沒有訓練結尾：這樣的模型學不會停。"
    return "trains padding.", "訓練到了填充。"


@_exercise
def check_4(counts: Sequence[float]) -> Words:
    """Check two counts for Qwen2.5-3B: rank 16 on all seven projections, rank 8 on q and v."""
    for (rank, names), count in zip(((16, tuple(SIZES)), (8, ("q", "v"))), _numbers(_given(counts), 2), strict=True):
        inputs, outputs = (sum(SIZES[name][side] for name in names) for side in (0, 1))
        right = LAYERS * rank * (inputs + outputs)
        square = LAYERS * rank * sum(2 * SIZES[name][0] if name in "kv" else sum(SIZES[name]) for name in names)
        slips = [
            (right / LAYERS, "That is one layer.", "這只是一層。"),
            (square, "k and v have fewer outputs than inputs.", "k 與 v 的輸出比輸入少。"),
            (LAYERS * rank * inputs, "That is A alone.", "這只有 A。"),
            (LAYERS * rank * outputs, "That is B alone.", "這只有 B。"),
            (LAYERS * sum(math.prod(SIZES[name]) for name in names), "Those are the frozen weights.", "這是凍結的權重。"),
            (right * 16 / rank, "That is another rank.", "這是別的 rank。"),
        ]
        _compare(f"rank {rank}, {', '.join(names)}", count, right, slips)
    return "Right, both. In fp32 a parameter takes 4 bytes of the file.", "兩個都對！以 fp32 儲存，每個參數佔檔案 4 個位元組。"


@_exercise
def check_5(starts: Mapping[tuple[str, str], tuple[Any, Any]]) -> Words:
    """Check for each start of (A, B): is the model unchanged before the first step, and can it learn?"""
    for start in (("random", "random"), ("random", "zero"), ("zero", "random"), ("zero", "zero")):
        unchanged, learns = _try_start(*start)
        if [bool(value) for value in _given(starts[start])] == [unchanged, learns]:
            continue
        if bool(starts[start][0]) != unchanged:
            raise Wrong(f"{start}: how large is B A then?", f"{start}：這時 B A 是多少？")
        raise Wrong(
            f"{start}: A's gradient passes through B, and B's through A x.", f"{start}：A 的梯度要經過 B，B 的梯度要經過 A x。"
        )
    return "Right: four layers were tried just now, and do the same.", "四種都對！剛剛實際試了四個層，結果就是這樣。"


def _try_start(a: str, b: str) -> tuple[bool, bool]:
    """Return whether a layer with these starts computes W x, and whether A or B has a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, x = LoRALayer(16, 16, rank=4), torch.randn(8, 16)
        for matrix, start in ((layer.lora_A, a), (layer.lora_B, b)):
            nn.init.normal_(matrix.weight, std=float(start == "random"))
    unchanged = torch.equal(layer(x), layer.linear(x))
    layer(x).square().mean().backward()
    return unchanged, any(bool(p.grad.any()) for p in layer.parameters() if p.grad is not None)


@_exercise
def check_6(bits_per_weight: Callable[[int, bool], Any]) -> Words:
    """Check bits_per_weight(block, double): a 4-bit code, and its share of absmax, in fp32 or with double quantization."""
    for block in (64, 32, 128):
        for double in (False, True):
            right = 4 + (8 / block + 32 / (block * 256) if double else 32 / block)
            slips = [
                (right / 8, "Those are bytes.", "這是位元組。"),
                (right - 4, "That is absmax alone.", "這只有 absmax。"),
                (4.0, "absmax is stored too.", "absmax 也要存。"),
                (4 + 4 / block, "absmax takes 4 bytes, not 4 bits.", "absmax 是 4 個位元組，不是 4 個位元。"),
                (4 + 32 / block, "With double quantization absmax takes 8 bits.", "雙重量化之後，absmax 佔 8 個位元。"),
                (4 + 8 / block, "256 absmax share a scale, which is stored too.", "256 個 absmax 共用的縮放值也要存。"),
                (
                    4 + 8 / block + 1 / 8,
                    "256 absmax share a scale, not 256 weights.",
                    "共用的是 256 個 absmax，不是 256 個權重。",
                ),
            ]
            _compare(f"bits_per_weight({block}, {double})", _given(bits_per_weight(block, double)), right, slips, 1.5e-4)
    return "Right, for blocks of 32, 64 and 128.", "答對了！區塊 32、64、128 都對。"


@_exercise
def check_7(take_out: Callable[[nn.Module], Any]) -> Words:
    """Check take_out(model): the base model is back, bit for bit, from LoRA layers that are merged and not merged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(64, 32)
        base = model(x)
        replace_linear_layers(model, ("0", "2"))
        layers = [module for module in model if isinstance(module, LoRALayer)]
        for layer in layers:
            nn.init.normal_(layer.lora_B.weight)
    layers[0].merge_weights()
    changed = model(x)
    answer = take_out(model)
    outputs = (answer if isinstance(answer, nn.Module) else model)(x)
    if torch.equal(outputs, base):
        return "Right: not one bit of the outputs differs from the base model's.", "答對了：輸出和基礎模型一個位元都不差！"
    if torch.equal(outputs, changed):
        raise NotImplementedError
    if torch.allclose(outputs, base, atol=1e-3):
        raise Wrong(
            "Nearly: the outputs differ by rounding, as W + ΔW − ΔW is not W. Where is the copy of W?",
            "很接近，但有捨入誤差：W + ΔW − ΔW 不等於 W。W 的備份在哪裡？",
        )
    raise Wrong(
        "One of the two layers is merged, the other is not: one still counts.",
        "兩層之中一層已合併、一層沒有：還有一層的更新沒拿掉。",
    )
