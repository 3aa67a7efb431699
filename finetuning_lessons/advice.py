"""Sum up what the lessons measured: what is often said beside the figures, and what to do with them.

    print(advice.table_of_claims())
    print(advice.practical_advice())

Both return Markdown in the language that words.choose has set. Each figure is computed here, or is the mean of the seeds that
`python -m finetuning_lessons.NAME --seeds 5` has stored, with its standard error.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from finetuning_lessons import attention, gradient_checkpointing, memory, methods, qlora, quantization, rank_study, variants
from finetuning_lessons.layers import count_parameters
from finetuning_lessons.lesson import load_model
from finetuning_lessons.paged_optimizer import paged_share
from finetuning_lessons.seeds import Results, load_results
from finetuning_lessons.words import percent, text
from qlora_kit.config import GIB

LENGTH = 512  # tokens of the one sequence that memory is computed for
Claim = tuple[str, str, str]  # what is often said, what was measured, and in which part of the course


def stored(lesson: str, steps: int) -> Results:
    """Return the results of a lesson's stored seeds.

    Raises:
        FileNotFoundError: none are stored of these settings.
    """
    results = load_results(lesson, {"steps": steps})
    if results is None:
        raise FileNotFoundError(f"results/{lesson}.json: run python -m finetuning_lessons.{lesson} --seeds 5")
    return results


def either(english: Claim, chinese: Claim) -> Claim:
    """Return the row of the chosen language."""
    said, measured, part = map(text, english, chinese)
    return said, measured, part


def table_of_claims() -> str:
    """Return a table of what is often said of the subject, and what the lessons found."""
    head = either(("often said", "measured", "part"), ("常見說法", "實測", "Part"))
    rows = [head, ("---",) * 3, *memory_claims(), *parameter_claims(), *quantization_claims(), *training_claims()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def memory_claims() -> Iterator[Claim]:
    shape = memory.model_shapes()["7B"]
    full, lora, packed = (memory.needed_bytes(method, shape, LENGTH) for method in ("full", "LoRA", "QLoRA"))
    billions, claimed = shape.parameters() / 1e9, 84e9 / GIB
    yield either(
        (
            "full fine-tuning of 7B takes 84 GB and activations",
            f"{full / GIB:.1f} GiB with activations, for the {billions:.2f} billion parameters of Llama-2-7B; 84 GB are "
            f"{claimed:.1f} GiB",
            "4.2",
        ),
        (
            "7B 的 Full FT 要 84 GB，再加激活值",
            f"連激活值 {full / GIB:.1f} GiB（Llama-2-7B，{10 * billions:.1f} 億個參數）；84 GB 等於 {claimed:.1f} GiB",
            "4.2",
        ),
    )
    yield either(
        (
            "LoRA of 7B takes 14 GB, QLoRA 4 GB",
            f"{lora / GIB:.1f} and {packed / GIB:.1f} GiB with all that training needs",
            "4.2",
        ),
        ("7B 的 LoRA 要 14 GB、QLoRA 要 4 GB", f"連同訓練所需的一切，{lora / GIB:.1f} 與 {packed / GIB:.1f} GiB", "4.2"),
    )
    smallest = memory.smallest_card(packed)
    yield either(
        ("QLoRA lets a card of 16 GB train 7B", f"a smaller one too ({smallest}), at 1 x {LENGTH} tokens", "4.2"),
        ("QLoRA 讓 16 GB 的卡能微調 7B", f"更小的也行（{smallest}），長度 {LENGTH}、批次 1", "4.2"),
    )
    ratios = [100 * (1 - less / more) for more, less in gradient_checkpointing.ON_GPU_GIB.values()]
    few, many = gradient_checkpointing.ON_GPU_GIB
    slower = 100 * (gradient_checkpointing.ON_GPU_SPEED[0] / gradient_checkpointing.ON_GPU_SPEED[1] - 1)
    yield either(
        (
            "gradient checkpointing saves 30 to 50 % of memory and costs 10 to 20 % of time",
            f"{percent(ratios[0])} at {few} tokens, {percent(ratios[1])} at {many}; {percent(slower)} more time (3B, H200)",
            "4.3",
        ),
        (
            "gradient checkpointing 省 30% 到 50% 記憶體，多花 10% 到 20% 時間",
            f"{few} 個 token 時省 {percent(ratios[0])}，{many} 個時省 {percent(ratios[1])}；時間多 {percent(slower)}（3B，H200）",
            "4.3",
        ),
    )
    low, high = (percent(100 * paged_share(memory.model_shapes()["3B"], rank)) for rank in (8, 16))
    yield either(
        (
            "paged optimizers take care of a full GPU",
            f"of LoRA's state for Qwen2.5-3B they page {low} at rank 8, {high} at 16",
            "4.3",
        ),
        ("分頁優化器會自動處理記憶體不足", f"Qwen2.5-3B 的 LoRA 狀態，rank 8 時能分頁 {low}，rank 16 時 {high}", "4.3"),
    )


def parameter_claims() -> Iterator[Claim]:
    shape = memory.model_shapes()["3B"]
    three = percent(100 * shape.lora_parameters(16, "all-linear") / shape.parameters(), 2)
    lora, adapter, prefix = (trained_share(methods.METHODS[name].apply) for name in ("LoRA", "adapter", "prefix"))
    yield either(
        ("LoRA trains 0.1-1 %", f"{three} of Qwen2.5-3B, but {lora} of this small model, both at rank 16", "2.2"),
        ("LoRA 訓練 0.1-1%", f"Qwen2.5-3B 的 {three}，但這個小模型的 {lora}，都是 rank 16", "2.2"),
    )
    yield either(
        ("an adapter trains 1-5 %, a prefix < 0.1 %", f"{adapter} and {prefix} of this small model", "2.2"),
        ("Adapter 訓練 1-5%，Prefix <0.1%", f"這個小模型的 {adapter} 與 {prefix}", "2.2"),
    )
    frozen, trained = 4096**2, 8 * 2 * 4096
    yield either(
        (
            "d = k = 4096, r = 8: 64 K beside 16 M, 0.4 %",
            f"{trained:,} beside {frozen:,}: {percent(100 * trained / frozen, 2)}",
            "3.1",
        ),
        ("d = k = 4096、r = 8：64K 對 16M，0.4%", f"{trained:,} 對 {frozen:,}：{percent(100 * trained / frozen, 2)}", "3.1"),
    )


def trained_share(apply: Callable[[Any], Any]) -> str:
    """Return how much of the embedded model a method trains."""
    base = load_model()
    total = count_parameters(base)[0]
    return percent(100 * count_parameters(apply(base))[0] / total, 2)


def quantization_claims() -> Iterator[Claim]:
    weights = quantization.projection_weights(load_model())
    with torch.no_grad():
        nf4, *others = (quantization.relative_error(weights, kind) for kind in ("nf4", "fp4", "int4"))
    fp4, int4 = (other / nf4 for other in others)
    yield either(
        (
            "NF4 is 1.8 times as precise as FP4 or INT4",
            f"FP4's error is {fp4:.2f} times as large, INT4's {int4:.2f} times; squared {fp4**2:.2f} and {int4**2:.2f}",
            "4.1",
        ),
        (
            "NF4 比 FP4 或 INT4 精確 1.8 倍",
            f"FP4 的誤差是它的 {fp4:.2f} 倍，INT4 是 {int4:.2f} 倍；平方之後是 {fp4**2:.2f} 與 {int4**2:.2f} 倍",
            "4.1",
        ),
    )
    plain, double = 4 + 32 / quantization.BLOCK, 4 + 8 / quantization.BLOCK + 32 / (quantization.BLOCK * quantization.GROUP)
    yield either(
        (
            "double quantization stores its constants in FP8",
            f"in 8 bits, by a table of levels: {double:.3f} instead of {plain:g} bits a weight",
            "4.1",
        ),
        ("雙重量化把量化常數存成 FP8", f"是 8-bit，但用的是位準表：每個權重 {double:.3f} 個位元，原本 {plain:g} 個", "4.1"),
    )


def training_claims() -> Iterator[Claim]:
    choices = stored("attention", attention.STEPS)
    both, value, query = (choices.gap(attention.LOSS, attention.BASE, name) for name in ("q, v", "v", "q"))
    yield either(
        ("q and v first", f"with as many parameters they gain {both:.2f} nats, v alone {value:.2f}, q alone {query:.2f}", "3.2"),
        (
            "優先對 Q、V 投影應用 LoRA",
            f"同樣的參數量，q 加 v 讓損失降 {both:.2f}，只用 v 降 {value:.2f}，只用 q 降 {query:.2f}",
            "3.2",
        ),
    )
    study = stored("rank_study", rank_study.STEPS)
    shares = shares_of_rank_64(study)
    yield either(
        ("rank 8 to 32 is enough", f"ranks 8, 16 and 32 gain {', '.join(shares)} % of what rank 64 gains", "7"),
        ("rank=8-32 通常足夠", f"rank 8、16、32 的進步是 rank 64 的 {'、'.join(shares)}%", "7"),
    )
    more = study.spread(lambda one: rank_study.share_of("rank 16", "attention only")(one) - 100)
    fair = study.spread(lambda one: rank_study.share_of("rank 16", "attention, rank 42")(one) - 100)
    yield either(
        (
            "the MLP's projections add 10 to 20 %",
            f"{more.compared('+.0f', ' %')} at the same rank, {fair.compared('+.0f', ' %')} with as many parameters",
            "7",
        ),
        (
            "再加上 MLP 的投影，好 10% 到 20%",
            f"同樣的 rank：{more.compared('+.0f', '%')}；同樣的參數量：{fair.compared('+.0f', '%')}",
            "7",
        ),
    )
    change = study.gap(rank_study.LOSS, "NF4 base", "rank 16").compared("+.3f", " nats")
    yield either(
        ("4-bit weights cost quality", f"an NF4 base changes the final loss by {change}", "7"),
        ("4-bit 會犧牲品質", f"基礎模型換成 NF4，最後的損失改變 {change}", "7"),
    )


def practical_advice() -> str:
    """Return what to do, as a list: memory, learning rate, rank, alpha, projections, data, merging, measuring."""
    return "\n".join(
        f"{number}. {words}" for number, words in enumerate([*memory_advice(), *setting_advice(), *habit_advice()], 1)
    )


def memory_advice() -> Iterator[str]:
    needed = memory.needed_bytes("QLoRA", memory.model_shapes()["7B"], LENGTH)
    change = stored("rank_study", rank_study.STEPS).gap(rank_study.LOSS, "NF4 base", "rank 16").compared("+.3f", " nats")
    yield text(
        f"**Use QLoRA on a card of your own**: NF4 with double quantization. 7B takes {needed / GIB:.1f} GiB "
        f"({memory.smallest_card(needed)}), and the 4 bits changed the final loss by {change}.",
        f"**自己的顯示卡就用 QLoRA**：NF4 加雙重量化。7B 只要 {needed / GIB:.1f} GiB（{memory.smallest_card(needed)}），"
        f"而 4-bit 只讓最後的損失改變 {change}。",
    )


def setting_advice() -> Iterator[str]:
    results, study = stored("variants", variants.STEPS), stored("rank_study", rank_study.STEPS)
    loss, by_rule = variants.LOSS, variants.RULE_LOSS
    rate = range_of(results, loss, [f"LoRA, {rate:g}" for rate in variants.RATES])
    variant = range_of(results, loss, [f"{name}, {variants.best_rate(results, name):g}" for name in variants.VARIANTS])
    yield text(
        f"**Tune the learning rate first.** Between four rates the loss of plain LoRA differs by {rate}; between LoRA, rsLoRA, "
        f"DoRA and PiSSA, each at its best rate, by {variant}. Try 2e-4, then twice and half of it.",
        f"**先調學習率。** 四種學習率之間，LoRA 的損失相差 {rate}；LoRA、rsLoRA、DoRA、PiSSA 各用自己最好的學習率時，"
        f"相差 {variant}。從 2e-4 開始，再試兩倍和一半。",
    )
    shares = shares_of_rank_64(study)
    yield text(
        f"**Rank 16 is a good start, 8 to 32 usual.** Ranks 8, 16 and 32 gained {', '.join(shares)} % of what rank 64 gained "
        "here. Go up when there is much to learn and the training loss stays high.",
        f"**rank 從 16 開始，8 到 32 都很常用。** 這裡 rank 8、16、32 的進步是 rank 64 的 {'、'.join(shares)}%。"
        "要學的東西很多、訓練損失又降不下來時，再加大。",
    )
    low, high = variants.RULE_RANKS[0], variants.RULE_RANKS[-1]
    fixed, root = (
        results.gap(by_rule, f"{rule}, {low}", f"{rule}, {high}").compared(".2f", " nats") for rule in ("alpha fixed", "rsLoRA")
    )
    yield text(
        f"**Let alpha follow the rank.** From rank {low} to {high} a fixed alpha gained {fixed}, rsLoRA's alpha/√rank {root}: "
        "with a fixed alpha the update of a higher rank is scaled down. alpha = 2 rank is as simple.",
        f"**alpha 要跟著 rank 走。** rank 從 {low} 加到 {high}，固定 alpha 時損失降 {fixed}，用 rsLoRA 的 alpha/√rank 降 {root}："
        "alpha 不變的話，rank 越高，更新縮得越小。最簡單的做法是 alpha = 2 rank。",
    )
    two = study.spread(rank_study.share_of("q and v only", "rank 16"))
    yield text(
        f"**Put LoRA on all linear layers**; q and v alone gained {two:.0f} % of that at the same rank.",
        f"**所有線性層都加 LoRA**；同樣的 rank 只加在 q、v 上，進步只有 {two:.0f}%。",
    )


def range_of(results: Results, quantity: str, items: list[str]) -> str:
    """Return by how much the largest mean of some items exceeds the least."""
    least, *_, most = sorted(items, key=lambda item: results.of(quantity, item).mean)
    return results.gap(quantity, most, least).compared(".2f", " nats")


def shares_of_rank_64(study: Results) -> list[str]:
    """Return what ranks 8, 16 and 32 gain, in percent of what rank 64 gains."""
    return [f"{study.spread(rank_study.share_of(f'rank {rank}', 'rank 64')):.0f}" for rank in (8, 16, 32)]


def habit_advice() -> Iterator[str]:
    yield text(
        "**Train answers with their end, in the model's own chat template** (part 5.2): then it learns what to say and when to "
        "stop.",
        "**只訓練回答和它的結尾，並用模型自己的 chat template**（5.2）：這樣才學得到該說什麼、何時該停。",
    )
    back = stored("qlora", qlora.STEPS).spread(qlora.taken_back)
    yield text(
        f"**Merge into 16-bit weights.** Packed to 4 bits again, {back:.0f} % of what was learned here was lost.",
        f"**合併到 16-bit 的權重。** 再壓回 4-bit，這裡學到的會丟掉 {back:.0f}%。",
    )
    yield text(
        "**Measure**: perplexity on held-out text, before and after, and more than one seed where the difference is small.",
        "**要量**：用沒訓練過的文字，微調前後各量一次困惑度；差距很小的時候，多換幾個種子再下結論。",
    )
