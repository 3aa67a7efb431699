"""A run with data.chat_template: the template goes with the adapter, and a resumed run must have the same."""

import json

import pytest

import train_qlora
from qlora_kit.adapter.folder import load_checked_tokenizer, read_adapter
from qlora_kit.data.rendering import render_prompt
from qlora_kit.errors import UserError

TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m.role | upper }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>ASSISTANT
{% endif %}"""


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Return the folder of a run of two steps and its flags."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "own.jinja").write_text(TEMPLATE)
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "id": 7}
    (folder / "chats.jsonl").write_text((json.dumps(record) + "\n") * 40)
    flags = ["--config", str(root / "configs/tiny.yaml"), "--dataset", str(folder / "chats.jsonl"), "--max_length", "16"]
    flags += ["--model_name", str(root / "assets/tiny-qwen2"), "--output_dir", str(folder / "out"), "--batch_size", "1"]
    small = ("data.max_train_samples=4", "training.gradient_accumulation_steps=1", "data.eval_split=null")
    for setting in (*small, f"data.chat_template={folder / 'own.jinja'}", "training.save_steps=1"):
        flags += ["--set", setting]
    train_qlora.main([*flags, "--max_steps", "2"])
    return folder, flags


PROMPT = "<|im_start|>USER\nHi<|im_end|>\n<|im_start|>ASSISTANT\n"


@pytest.mark.parametrize("adapter", ["out", "out/checkpoints/checkpoint-1"])
def test_prompts_have_the_template_of_the_run(run, adapter):
    tokenizer = load_checked_tokenizer(read_adapter(str(run[0] / adapter)))
    (piece,) = render_prompt([{"role": "user", "content": "Hi"}], tokenizer).pieces
    assert (piece.text, tokenizer.chat_template) == (PROMPT, TEMPLATE)


def test_a_checkpoint_of_a_run_that_did_not_end_has_the_template_of_its_config(run, tmp_path):
    """No tokenizer is saved with it: that of the base model would render prompts otherwise than in training."""
    checkpoint = run[0] / "out" / "checkpoints" / "checkpoint-1"
    unfinished = tmp_path / "out" / "checkpoints" / "checkpoint-1"
    unfinished.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (unfinished / file.name).write_bytes(file.read_bytes())
    (tmp_path / "out" / "config.yaml").write_bytes((run[0] / "out" / "config.yaml").read_bytes())
    assert load_checked_tokenizer(read_adapter(str(unfinished))).chat_template == TEMPLATE


def test_a_run_is_not_resumed_with_another_template_in_the_file(run):
    folder, flags = run
    (folder / "own.jinja").write_text(TEMPLATE.replace("upper", "lower"))
    with pytest.raises(UserError) as caught:
        train_qlora.main([*flags, "--max_steps", "3", "--resume"])
    assert any(line.startswith("data.chat_template: the chat template differ") for line in caught.value.lines)


def test_a_missing_template_is_answered_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setattr(train_qlora, "load_tokenizer", None)
    with pytest.raises(UserError, match=r"^data\.chat_template: none\.jinja: cannot be read"):
        train_qlora.main([*run[1], "--set", "data.chat_template=none.jinja", "--preview"])
