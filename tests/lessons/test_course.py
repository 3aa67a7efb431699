"""The names of the course work with the arguments that its source gives them."""

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from finetuning_lessons import course, training_loop
from finetuning_lessons.course import (
    DataFormatter,
    InstructionDataset,
    LoRAAttention,
    LoRALayer,
    alpaca_example,
    instruction_example,
    sample_data,
    sharegpt_example,
)
from finetuning_lessons.lesson import load_tokenizer
from finetuning_lessons.words import choose


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Count what is shown, and close it."""
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    yield shown
    plt.close("all")


def test_a_layer_has_the_attributes_and_counts_of_the_source():
    layer = LoRALayer(4096, 4096, rank=8, alpha=16.0)
    assert (layer.rank, layer.alpha, layer.scaling) == (8, 16.0, 2.0)
    assert (layer.trainable_params, layer.total_params) == (65_536, 16_777_216 + 65_536)
    x = torch.randn(2, 3, 4096)
    with torch.no_grad():
        torch.nn.init.normal_(layer.lora_B.weight)
        before = layer(x)
        layer.merge_weights()
        torch.testing.assert_close(layer.linear(x), before, rtol=1e-3, atol=1e-2)


def test_attention_has_the_attributes_of_the_source():
    attention = LoRAAttention(hidden_size=768, num_heads=12, lora_rank=8, target_modules=["q", "v"])
    assert (attention.hidden_size, attention.num_heads, attention.head_dim, attention.scaling) == (768, 12, 64, 2.0)
    assert {name: tuple(pair["A"].weight.shape) for name, pair in attention.lora_modules.items()} == {
        "q": (8, 768),
        "v": (8, 768),
    }
    trainable = sum(p.numel() for p in attention.parameters() if p.requires_grad)
    assert trainable == 4 * 8 * 768
    hidden = torch.randn(1, 5, 768)
    assert attention(hidden, attention_mask=torch.zeros(1, 1, 5, 5)).shape == hidden.shape


def test_records_become_text():
    assert DataFormatter().alpaca_to_text(alpaca_example) == instruction_example["text"]
    assert instruction_example["text"].startswith("### Instruction:\n將以下句子翻譯成英文\n\n### Input:\n")
    short = DataFormatter.alpaca_to_text(example=alpaca_example, response_template="{output}", input_template="")
    assert short == "### Instruction:\n將以下句子翻譯成英文\n\n" + alpaca_example["output"]
    assert (
        DataFormatter.sharegpt_to_text(sharegpt_example, "{message} ", "= {message}")
        == "什麼是機器學習？ = 機器學習是人工智慧的一個分支..."
    )
    assert DataFormatter.sharegpt_to_text(sharegpt_example).startswith("User: 什麼是機器學習？\nAssistant: ")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tokenizer = load_tokenizer()
    assert DataFormatter.apply_chat_template(messages, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert DataFormatter.apply_chat_template(messages, object()) == "User: Hi\nAssistant: Hello\n"


def test_labels_are_everything_or_the_answer_and_its_end():
    tokenizer = load_tokenizer()
    for train_on, trained in (("all", DataFormatter.alpaca_to_text(sample_data[2])), ("assistant", "Paris")):
        item = InstructionDataset(sample_data, tokenizer, train_on=train_on)[2]
        assert item["input_ids"].shape == item["attention_mask"].shape == item["labels"].shape == (512,)
        assert tokenizer.decode(item["labels"][item["labels"] >= 0]) == trained + tokenizer.eos_token
        assert (item["labels"][item["attention_mask"] == 0] == -100).all()
    with pytest.raises(ValueError, match="train_on"):
        InstructionDataset(sample_data, tokenizer, train_on="answer")


def test_ranks_are_compared(figures):
    results = course.compare_lora_ranks(model_dim=96)
    assert [result["rank"] for result in results] == [1, 2, 4, 8, 16, 32, 64]
    assert results[3]["trainable_params"] == 2 * 8 * 96 and results[3]["param_ratio"] == pytest.approx(100 * 16 / 96)
    errors = [result["approximation_error"] for result in results]
    assert errors == sorted(errors, reverse=True) and 0.9 < errors[0] < 1
    assert all(0 < result["fastest_ms"] <= result["forward_time_ms"] <= result["slowest_ms"] for result in results)
    assert len(figures) == 1


def test_the_loop_lowers_the_loss_of_each_record_set(figures, monkeypatch, capsys):
    monkeypatch.setattr(course, "load_gpt2", training_loop.small_gpt2)
    losses = course.simple_lora_training_loop()
    assert len(losses) == 4 and sum(losses[2:]) < sum(losses[:2])
    assert "Epoch 2/2: mean loss" in capsys.readouterr().out and len(figures) == 1


def test_the_charts_name_their_cards(figures, capsys):
    for draw in (course.visualize_lora_efficiency, course.visualize_memory_requirements, course.visualize_qlora_memory):
        draw()
    texts = [text.get_text() for figure in figures for axes in figure.axes for text in axes.texts]
    assert {"RTX 4090: 24 GiB", "A100 40GB: 40 GiB", "A100 80GB: 80 GiB", "84 GB in all", "0.39 %"} <= set(texts)
    assert {"RTX 5080, T4: 16 GiB", "RTX 3090, 4090: 24 GiB"} <= set(texts)
    printed = capsys.readouterr().out
    assert "rank 8: 0.391 %" in printed and "QLoRA fits" in printed


def test_in_chinese_they_print_and_draw_chinese(figures, capsys, monkeypatch):
    monkeypatch.setattr("finetuning_lessons.lesson.find_chinese_font", lambda: None)
    choose("zh-TW")
    try:
        course.visualize_qlora_memory()
        assert course.setup_lora_training() is True
    finally:
        choose("en")
    printed = capsys.readouterr().out.replace("\n", "")
    assert "放得下：QLoRA" in printed and "✓ 已安裝" in printed and "parameters = 參數量" in printed
    assert figures[0].axes[0].get_xlabel() == "parameters"


def test_the_packages_of_lora_are_looked_for(capsys, monkeypatch):
    assert course.setup_lora_training() is True
    monkeypatch.setattr(course, "find_spec", lambda name: None)
    assert course.setup_lora_training() is False
    assert "pip install transformers peft bitsandbytes" in capsys.readouterr().out
