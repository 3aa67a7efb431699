"""What only a CUDA GPU can show: `python -m pytest -m gpu`. Everything else runs on the CPU."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_qlora
from qlora_kit.config_file import load_config
from qlora_kit.errors import UserError
from qlora_kit.training.checkpointing import move_state_to_paged_memory
from qlora_kit.training.machine import look_at_machine
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
    provenance = json.loads((tmp_path / "out" / "run.json").read_text())
    assert provenance["perplexity"]["adapter"]["loss"] < provenance["perplexity"]["base"]["loss"]
    assert provenance["memory_gib"]["peak_reserved"] > 0 and provenance["memory_gib"]["predicted_peak"] > 0
    assert "cuda" in provenance["hardware"][0]
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


def test_loaded_optimizer_state_is_paged_again_and_steps_alike(tmp_path):
    """Beside an optimizer that was never saved: bitsandbytes alone would leave the loaded moments on the GPU."""
    from bitsandbytes.optim import PagedAdamW8bit

    torch.manual_seed(0)
    start, gradients = torch.randn(200_000, device="cuda"), torch.randn(4, 200_000, device="cuda")

    def step(optimizer, parameter, numbers):
        for number in numbers:
            parameter.grad = gradients[number].clone()
            optimizer.step()

    straight = torch.nn.Parameter(start.clone())
    step(PagedAdamW8bit([straight], lr=1e-3), straight, range(4))
    broken = torch.nn.Parameter(start.clone())
    before = PagedAdamW8bit([broken], lr=1e-3)
    step(before, broken, range(2))
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    again = PagedAdamW8bit([broken], lr=1e-3)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True))
    assert not any(getattr(again.state[broken][name], "is_paged", False) for name in ("state1", "state2"))  # else drop the move
    assert move_state_to_paged_memory(again) == 2
    assert all(again.state[broken][name].is_paged for name in ("state1", "state2"))
    step(again, broken, range(2, 4))
    assert torch.equal(broken, straight)


def test_a_limit_beyond_the_gpu_is_one_line(tmp_path):
    config = load_config(Path("configs/tiny.yaml"), {"performance.vram_limit_gib": 4096})
    with pytest.raises(UserError, match=r"performance\.vram_limit_gib: 4096") as error:
        look_at_machine(config, None)
    assert len(error.value.lines) == 1 and "GiB" in error.value.lines[0]


LONG = [*TINY, "--max_length", "1024", "--batch_size", "16", "--max_steps", "2", "--dropout", "0"]
# A run that the planner would refuse, in a process of its own, as the limit holds for all of it: only the allocator says no.
CAPPED = (
    "import train_qlora; from qlora_kit import cli; from qlora_kit.training import machine; "
    "machine.check_fit = lambda *rest: None; cli.run(train_qlora.main)"
)


def run_capped(root, folder, limit, *flags):
    flags = [*LONG, "--set", f"performance.vram_limit_gib={limit}", "--output_dir", str(folder), *flags]
    return subprocess.run([sys.executable, "-c", CAPPED, *flags], cwd=root, capture_output=True, text=True, timeout=300)


def test_a_full_gpu_is_one_line_with_remedies_and_status_1(root, tmp_path):
    result = run_capped(root, tmp_path / "out", 0.05)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the GPU's memory is full") and "--max_length 512" in last
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_out_of_memory_halves_the_micro_batch_and_changes_no_loss(root, tmp_path):
    losses = {}
    for name, limit in (("wide", 8), ("narrow", 0.4)):
        result = run_capped(root, tmp_path / name, limit, "--set", "performance.micro_batch=16")
        assert result.returncode == 0, result.stderr
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in metrics if "loss" in line]
    assert "with 8 sequences at a time" in result.stderr
    assert losses["narrow"] == pytest.approx(losses["wide"], rel=2e-3)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    """Three steps, and two steps and then the third: the same dropout, although the graph is captured at another step."""
    run = [*TINY, "--dropout", "0.3", "--set", "training.save_steps=2", "--set", "training.lr_scheduler=constant"]
    train_qlora.main([*run, "--max_steps", "3", "--output_dir", str(tmp_path / "whole")])
    train_qlora.main([*run, "--max_steps", "2", "--output_dir", str(tmp_path / "halves")])
    train_qlora.main([*run, "--max_steps", "3", "--output_dir", str(tmp_path / "halves"), "--resume"])
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for name in ("whole", "halves")
    ]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.fixture(scope="module")
def random_model(root, tmp_path_factory) -> Path:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random")
    shape = Qwen2Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=6144, max_position_embeddings=128, bos_token_id=6141, eos_token_id=6143, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(root / "assets" / "tiny-qwen2").save_pretrained(folder)
    return folder


def losses_of(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_a_run_that_was_killed_goes_on_as_two_undisturbed_ones_differ(root, random_model, tmp_path, monkeypatch):
    """By SIGKILL behind its third checkpoint. Rank 16 of this model has more than the 100,000 elements that are paged."""
    flags = [*TINY, "--model_name", str(random_model), "--max_steps", "20", "--set", "training.optim=paged_adamw_8bit",
             "--set", "training.save_steps=1", "--set", "data.eval_split=null"]  # fmt: skip
    killed = tmp_path / "killed"
    with subprocess.Popen([sys.executable, "train_qlora.py", *flags, "--output_dir", str(killed)], cwd=root) as process:
        while process.poll() is None and not (killed / "checkpoints" / "checkpoint-3").exists():
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    loaded, page = [], move_state_to_paged_memory
    monkeypatch.setattr(
        "qlora_kit.training.trainer.move_state_to_paged_memory", lambda optimizer: (loaded.append(optimizer), page(optimizer))[1]
    )
    train_qlora.main([*flags, "--output_dir", str(killed), "--resume"])
    (optimizer,) = loaded
    moments = [state[name] for state in optimizer.state.values() for name in ("state1", "state2")]
    assert len(moments) == 2 and all(getattr(moment, "is_paged", False) for moment in moments)
    for name in ("one", "two"):
        train_qlora.main([*flags, "--output_dir", str(tmp_path / name)])
    one, two, resumed = (torch.tensor(losses_of(folder)) for folder in (tmp_path / "one", tmp_path / "two", killed))
    assert len(one) == len(resumed) == 20
    # Two runs may agree to the last bit; a resumed one captures its graph at another step, and may round otherwise.
    noise = max((one - two).abs().max().item(), 1e-4 * one.max().item())
    assert (resumed - one).abs().max().item() <= 2 * noise


def test_the_embedding_can_stay_in_host_memory(tmp_path):
    losses = {}
    for offloaded in ("false", "true"):
        folder = tmp_path / offloaded
        settings = ["--set", f"performance.offload_embedding={offloaded}", "--max_steps", "3", "--output_dir", str(folder)]
        train_qlora.main([*TINY, *settings])
        losses[offloaded] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for kept, streamed in zip(losses["false"], losses["true"], strict=True):
        for key in ("loss", "eval_loss"):
            assert streamed.get(key) == pytest.approx(kept.get(key), rel=1e-3)
