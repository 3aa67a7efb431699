"""Choosing device and dtype. A real GPU is for test_gpu.py; here torch.cuda answers like a machine without one, or an old one."""

import pytest
import torch

from qlora_kit import device
from qlora_kit.config import UserError
from qlora_kit.memory import KNOWN_CONFIGS, read_shape
from qlora_kit.settings import Config


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def config(**sections) -> Config:
    return Config.model_validate(sections)


def test_auto_takes_the_cpu_where_there_is_no_gpu(no_gpu):
    assert device.choose_device("auto") == "cpu"


def test_asking_for_a_missing_gpu_is_one_line(no_gpu):
    with pytest.raises(UserError, match=r"training.device: cuda.*auto"):
        device.choose_device("cuda")


def test_gpu_without_bfloat16_falls_back_to_float16_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    dtype, note = device.usable_dtype("bfloat16", "cuda")
    assert dtype is torch.float16
    assert "Tesla T4" in note and "float16" in note


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_cpu_computes_in_the_dtype_asked_for(name):
    assert device.usable_dtype(name, "cpu") == (getattr(torch, name), None)


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match=r"float16.*GPU"):
        device.usable_dtype("float16", "cpu")


def test_days_on_a_cpu_are_refused_with_the_estimate_and_both_ways_out(no_gpu, monkeypatch):
    monkeypatch.setattr(device, "_cpu_flops_per_second", lambda: 1e11)
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    # 2.4 M tokens x 3 epochs x 12.34 GFLOP a token / 1e11 FLOP/s = 888,692 s
    with pytest.raises(UserError, match=r"10 days.*configs/tiny\.yaml.*training\.device=cpu"):
        device.check_patience(Config(), shape)


def test_a_short_cpu_run_is_not_refused(monkeypatch, root):
    monkeypatch.setattr(device, "_cpu_flops_per_second", lambda: 1e11)
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    device.check_patience(config(training={"max_steps": 1}), shape)  # 8,192 tokens: 1,011 s


def test_one_process_sees_one_gpu(monkeypatch):
    for visible, expected in [(None, "0"), ("2,3", "2"), ("1", "1"), ("", "")]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        device._use_first_gpu_only()
        assert device.os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_missing_reporting_package_is_one_line(no_gpu, monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"report_to: wandb.*pip install wandb"):
        device.look_at_machine(config(training={"report_to": "wandb", "device": "cpu"}), None)
