"""Choose device and dtype where torch.cuda is replaced to answer like a machine without a GPU, or with an old one."""

import bitsandbytes  # noqa: F401 - looks for a GPU when it is imported, which must be before the tests replace torch.cuda
import pytest
import torch

from qlora_kit.errors import UserError
from qlora_kit.model import device


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_takes_the_cpu_if_there_is_no_gpu(no_gpu):
    assert device.choose_device("auto") == "cpu"


@pytest.mark.parametrize("key", ["training.device", "--device"])
def test_a_missing_gpu_is_one_line(no_gpu, key):
    with pytest.raises(UserError, match=rf"^{key}: cuda: needs a GPU, and torch finds none\. .*, or use auto\.$"):
        device.choose_device("cuda", key)


def test_another_device_is_refused():
    with pytest.raises(UserError, match=r"^training.device: mps: is no device\. Use auto, cuda or cpu\.$"):
        device.choose_device("mps")


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


def test_bfloat16_on_a_gpu_without_it_is_refused(tesla_t4):
    wording = r"^quantization.compute_dtype: bfloat16: is not supported by Tesla T4\. Use float16, or auto\.$"
    with pytest.raises(UserError, match=wording):
        device.usable_dtype("bfloat16", "cuda")


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_an_old_gpu_computes_in_a_dtype_it_has(tesla_t4, name):
    assert device.usable_dtype(name, "cuda") == (getattr(torch, name), None)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_new_gpu_computes_in_the_dtype_of_the_config(new_gpu, name):
    assert device.usable_dtype(name, "cuda") == (getattr(torch, name), None)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_cpu_computes_in_the_dtype_of_the_config(name):
    assert device.usable_dtype(name, "cpu") == (getattr(torch, name), None)


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match=r"float16.*GPU"):
        device.usable_dtype("float16", "cpu")


def test_an_adapters_own_dtype_falls_back_on_an_older_device(tesla_t4):
    """The user of an adapter did not choose its dtype and cannot change it."""
    dtype, note = device.usable_dtype("bfloat16", "cuda", insisted=False)
    assert dtype is torch.float16 and "Tesla T4" in note
    assert device.usable_dtype("float16", "cpu", insisted=False) == (torch.float32, None)
    assert device.usable_dtype("bfloat16", "cpu", insisted=False) == (torch.bfloat16, None)
