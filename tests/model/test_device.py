"""Choosing device and dtype. A real GPU is for test_gpu.py; here torch.cuda answers like a machine without one, or an old one."""

import bitsandbytes  # noqa: F401 - asks for the GPU when it is imported, and here one is only played
import pytest
import torch

from qlora_kit.config import Config
from qlora_kit.errors import UserError
from qlora_kit.model import device


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


@pytest.fixture
def tesla_t4(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")


@pytest.fixture
def new_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def test_auto_is_float16_on_a_gpu_without_bfloat16_and_says_so(tesla_t4):
    dtype, note = device.usable_dtype("auto", "cuda")
    assert dtype is torch.float16
    assert "Tesla T4" in note and "float16" in note


def test_auto_is_bfloat16_on_a_gpu_that_has_it(new_gpu):
    assert device.usable_dtype("auto", "cuda") == (torch.bfloat16, None)


def test_auto_is_float32_on_a_cpu():
    assert device.usable_dtype("auto", "cpu") == (torch.float32, None)


def test_bfloat16_asked_for_on_a_gpu_without_it_is_refused(tesla_t4):
    with pytest.raises(UserError, match=r"^quantization.compute_dtype: bfloat16: Tesla T4 lacks it; use float16, or auto$"):
        device.usable_dtype("bfloat16", "cuda")


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_an_old_gpu_computes_in_what_it_has(tesla_t4, name):
    assert device.usable_dtype(name, "cuda") == (getattr(torch, name), None)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_new_gpu_computes_in_the_dtype_asked_for(new_gpu, name):
    assert device.usable_dtype(name, "cuda") == (getattr(torch, name), None)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_cpu_computes_in_the_dtype_asked_for(name):
    assert device.usable_dtype(name, "cpu") == (getattr(torch, name), None)


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match=r"float16.*GPU"):
        device.usable_dtype("float16", "cpu")


def test_an_adapter_may_come_from_a_gpu_that_has_more(tesla_t4):
    """Who talks to an adapter did not choose the dtype that it was trained in, and cannot change it."""
    dtype, note = device.usable_dtype("bfloat16", "cuda", insisted=False)
    assert dtype is torch.float16 and "Tesla T4" in note
    assert device.usable_dtype("float16", "cpu", insisted=False) == (torch.float32, None)
    assert device.usable_dtype("bfloat16", "cpu", insisted=False) == (torch.bfloat16, None)


# What is insisted on and cannot work
