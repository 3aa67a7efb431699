"""What only a CUDA GPU can show: `python -m pytest -m gpu`. Everything else runs on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_qlora
from qlora_kit.config import UserError, load_config
from qlora_kit.device import look_at_machine
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TINY = [
    "--config", "configs/tiny.yaml", "--max_length", "64", "--batch_size", "4", "--set", "quantization.compute_dtype=bfloat16",
    "--set", "training.gradient_accumulation_steps=1", "--set", "data.max_train_samples=16", "--set", "data.max_eval_samples=4",
    "--set", "training.logging_steps=1", "--set", "training.device=cuda", "--set", "training.warmup_ratio=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


def load(folder: Path, device: str, dtype=torch.bfloat16):
    model, _ = load_model_and_tokenizer(str(folder), create_bnb_config("nf4", dtype), device=device, dtype=dtype)
    return model.eval()


def test_nf4_on_the_gpu_computes_what_it_computes_on_the_cpu(tiny_dir):
    ids = torch.arange(100, 164).reshape(2, 32)
    with torch.no_grad():
        cpu = load(tiny_dir, "cpu")(ids).logits.float()
        gpu = load(tiny_dir, "cuda")(ids.cuda()).logits.float().cpu()
    # Six layers in bfloat16, 8 bits of precision: rounding differs, the distribution of the next token does not.
    assert (gpu - cpu).norm() / cpu.norm() < 0.02
    assert (gpu.argmax(-1) == cpu.argmax(-1)).float().mean() > 0.9


def test_training_on_the_gpu_lowers_the_loss_and_leaves_an_adapter_that_loads(tmp_path):
    from peft import PeftModel

    train_qlora.main([*TINY, "--max_steps", "4", "--output_dir", str(tmp_path / "out")])
    passport = json.loads((tmp_path / "out" / "run.json").read_text())
    assert passport["perplexity"]["adapter"]["loss"] < passport["perplexity"]["base"]["loss"]
    assert passport["memory_gib"]["peak_reserved"] > 0 and passport["memory_gib"]["predicted_peak"] > 0
    assert "cuda" in passport["hardware"][0]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["memory_gib"] > 0 for line in lines if "loss" in line)
    ids = torch.arange(100, 132, device="cuda")[None]
    model = load(Path("assets/tiny-qwen2"), "cuda")
    with torch.no_grad():
        before = model(ids).logits.clone()
        after = PeftModel.from_pretrained(model, tmp_path / "out").eval()(ids).logits
    assert (after - before).abs().max() > 0.1


def test_the_paged_8_bit_optimizer_takes_a_step(tiny_dir):
    from bitsandbytes.optim import PagedAdamW8bit

    # bitsandbytes pages tensors from 100,000 elements on: rank 256 x 512 inputs is one, rank 16 of this small model is not
    lora = create_lora_config(rank=256, alpha=512.0, dropout=0.0)
    model = prepare_model_for_training(load(tiny_dir, "cuda"), lora).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = PagedAdamW8bit(trained.values(), lr=1e-4)
    ids = torch.arange(100, 164, device="cuda").reshape(2, 32)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trained.items())
    paged = [value for state in optimizer.state.values() for value in state.values() if getattr(value, "is_paged", False)]
    assert len(paged) == 6 * 3 * 2 * 1  # 6 layers; A of down, B of gate and up; two moments each


def test_a_limit_beyond_the_gpu_is_one_line(tmp_path):
    config = load_config(Path("configs/tiny.yaml"), {"performance.vram_limit_gib": 4096})
    with pytest.raises(UserError, match=r"performance\.vram_limit_gib: 4096") as error:
        look_at_machine(config, None)
    assert len(error.value.problems) == 1 and "GiB" in error.value.problems[0]


def test_a_full_gpu_is_one_line_with_remedies_and_status_1(root, tmp_path):
    """A process of its own: the limit holds for the whole process."""
    out = tmp_path / "out"
    arguments = [*TINY, "--max_length", "1024", "--set", "performance.vram_limit_gib=0.08", "--output_dir", str(out)]
    result = subprocess.run([sys.executable, "train_qlora.py", *arguments], cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the GPU's memory is full") and "--max_length 512" in last and "micro_batch=1" in last
    assert not (out / "adapter_model.safetensors").exists()
