"""Test the training loop: the items of its data set, and its losses against transformers' Trainer and train_qlora.py."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from finetuning_lessons.training_loop import (
    BATCH,
    EPOCHS,
    LEARNING_RATE,
    LENGTH,
    SEED,
    InstructionDataset,
    add_lora,
    load_records,
    loss_rows,
    shuffle_epoch,
    small_gpt2,
    train_plainly,
    train_with_script,
    write_inputs,
)


@pytest.fixture(scope="module")
def tokenizer():
    return small_gpt2().tokenizer


def test_item_is_text_end_and_padding(tokenizer):
    record = {"instruction": "Say hi.", "input": "", "output": "Hi"}
    item = InstructionDataset([record], tokenizer, 32)[0]
    text = "### Instruction:\nSay hi.\n\n### Response:\nHi"
    length = len(tokenizer(text).input_ids) + 1
    assert tokenizer.decode(item["input_ids"][:length]) == f"{text}<|im_end|>"
    assert item["attention_mask"].tolist() == [1] * length + [0] * (32 - length)
    assert item["labels"].tolist() == item["input_ids"][:length].tolist() + [-100] * (32 - length)
    assert item["labels"][length - 1] == tokenizer.eos_token_id  # the end is trained, although padding is the same token


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_item_that_is_too_long_loses_its_beginning_and_trains_its_end(tokenizer, train_on):
    record = {"instruction": "Count. " * 40, "input": "", "output": "one two three"}
    item = InstructionDataset([record], tokenizer, 32, train_on)[0]
    assert {tuple(value.shape) for value in item.values()} == {(32,)}
    trained = tokenizer.decode(item["labels"][item["labels"] >= 0])
    assert trained.endswith("one two three<|im_end|>") and item["labels"][-1] == tokenizer.eos_token_id
    assert trained.startswith("one") == (train_on == "assistant")


def test_both_masks_are_shown(tokenizer):
    record = [{"instruction": "Say hi.", "input": "", "output": "Hi"}]
    everything, answers = (InstructionDataset(record, tokenizer, 32, train_on).marked(0) for train_on in ("all", "assistant"))
    assert answers == "### Instruction:\nSay hi.\n\n### Response:\n[[Hi<|im_end|>]]"
    assert everything.endswith("Response:\nHi<|im_end|>]]") and everything.count("[[") == 1


def test_no_record_of_the_lesson_is_cut(tokenizer):
    dataset = InstructionDataset(load_records(48), tokenizer, LENGTH)
    assert len(dataset) == 48
    assert all(dataset[index]["labels"][-1] == -100 for index in range(48))


def test_lora_is_on_attention_and_mlp_of_each_layer_and_nothing_else():
    """rank 8: c_attn 192 -> 576, c_proj 192 -> 192 and 768 -> 192, in 4 layers."""
    model = add_lora(small_gpt2().model)
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(trained.values()) == 4 * 8 * (192 + 576 + 192 + 192 + 768 + 192)
    assert all("lora_" in name and ("c_attn" in name or "c_proj" in name) for name in trained)


def test_each_epoch_has_its_own_order():
    numbers = list(range(12))
    first, second = ([*shuffle_epoch(numbers, 12, epoch)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == numbers
    assert first != second


def test_losses_are_those_of_the_librarys_trainer(tmp_path):
    records, (plain, library) = load_records(8), (small_gpt2(), small_gpt2())
    dataset = InstructionDataset(records, plain.tokenizer, LENGTH)
    losses = train_plainly(add_lora(plain.model), dataset)
    # Nothing predicts the first token of a row, but the library divides by its label as well: 3 % too small a loss here.
    first = torch.arange(LENGTH) == 0
    items = [item | {"labels": item["labels"].masked_fill(first, -100)} for item in (dataset[index] for index in range(8))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1, save_strategy="no", seed=SEED, use_cpu=True,
        report_to="none", disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(model=add_lora(library.model), args=arguments, train_dataset=items)
    trainer.train()
    assert losses == pytest.approx([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], abs=1e-4)


@pytest.mark.slow
def test_losses_are_those_of_the_script(tmp_path):
    base = small_gpt2()
    records = load_records(16)
    write_inputs(base.model, base.tokenizer, records, tmp_path)
    plain = train_plainly(add_lora(base.model), InstructionDataset(records, base.tokenizer, LENGTH, "assistant"))
    script = train_with_script(tmp_path, threads=1)
    assert len(plain) == 16 * EPOCHS / BATCH
    assert plain == pytest.approx(script, abs=1e-4)
    assert plain[-1] < plain[0] - 0.5


def test_rows_show_both_losses_and_their_difference():
    assert loss_rows([2.0, 1.0], [2.0, 1.5]) == [
        ["1", "2.000000", "2.000000", "0.0e+00"],
        ["2", "1.000000", "1.500000", "5.0e-01"],
    ]


def test_padding_does_not_change_the_loss(tokenizer):
    """Causal attention sees no later token, and padding has no label."""
    model, record = small_gpt2().model.eval(), load_records(1)
    short, long = (InstructionDataset(record, tokenizer, length)[0] for length in (48, 96))
    with torch.no_grad():
        losses = [model(**{name: value[None] for name, value in item.items()}).loss.item() for item in (short, long)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
