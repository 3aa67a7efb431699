"""The machine of a run: what it can do, and what is refused there. torch.cuda answers like machines that are not here."""

from types import SimpleNamespace

import bitsandbytes  # noqa: F401 - asks for the GPU when it is imported, and here one is only played
import pytest
import torch

from qlora_kit.config import GIB, Config
from qlora_kit.errors import Failed, UserError
from qlora_kit.model import device
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape
from qlora_kit.training import machine


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def new_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def config(**sections) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("key", "remedy"), [("compile", "auto or false"), ("cuda_graphs", "auto or false"), ("offload_embedding", "false")]
)
def test_a_technique_of_the_gpu_is_refused_on_a_cpu_only_when_insisted_on(no_gpu, key, remedy):
    with pytest.raises(UserError) as refused:
        machine.look_at_machine(config(performance={key: True}), None)
    assert refused.value.lines == [f"performance.{key}: true: cannot work here (needs a CUDA GPU). Use {remedy}."]
    for value in (False, "auto") if "auto" in remedy else (False,):
        assert machine.look_at_machine(config(performance={key: value}), None).device == "cpu"


def test_a_technique_of_the_fast_path_is_refused_without_it():
    asked = config(performance={"compile": True, "cuda_graphs": True, "fused_lora": False})
    with pytest.raises(UserError) as refused:
        machine.check_switches(asked, "cuda")
    assert [line.partition(". ")[0] for line in refused.value.lines] == [
        f"performance.{key}: true: cannot work here (performance.fused_lora is false)" for key in ("compile", "cuda_graphs")
    ]
    machine.check_switches(config(performance={"compile": True, "offload_embedding": True}), "cuda")
    machine.check_switches(config(performance={"fused_lora": False}), "cpu")


def test_a_cpu_has_no_limit(no_gpu):
    assert machine.look_at_machine(config(performance={"vram_limit_gib": 8}), None).limit is None


@pytest.mark.parametrize(("cap", "expected"), [(None, 20), (8, 8), (22, 20)])
def test_the_limit_is_what_is_free_or_the_cap_below_it(monkeypatch, new_gpu, cap, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="a GPU", total_memory=24 * GIB))
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    assert machine.look_at_machine(config(performance={"vram_limit_gib": cap}), None).limit == expected * GIB
    assert fractions == ([] if cap is None else [cap / 24])


def test_a_cap_above_the_card_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="a GPU", total_memory=8 * GIB))
    with pytest.raises(
        UserError, match=r"^performance.vram_limit_gib: 9: is more than the 8\.0 GiB of this GPU. Use less, or null"
    ):
        device.cap_memory(9)


# Out of memory with one sequence at a time


@pytest.mark.parametrize(
    ("asked", "remedies"),
    [
        ({}, ["gradient_checkpointing=true", "offload_embedding=true", "--max_length 256", "--rank 8", "smaller"]),
        (
            {"training": {"gradient_checkpointing": True}, "performance": {"offload_embedding": True}},
            ["--max_length 256", "--rank 8", "smaller"],
        ),
        ({"performance": {"fused_lora": False}}, ["gradient_checkpointing=true", "--max_length 256", "--rank 8", "smaller"]),
        (  # whose micro-batch is not halved
            {"performance": {"fsdp": True, "offload_embedding": True}},
            ["micro_batch=1", "gradient_checkpointing=true", "--max_length 256", "--rank 8", "smaller"],
        ),
        (  # nothing below the least that is accepted
            {"data": {"max_length": 8}, "lora": {"rank": 1}, "training": {"gradient_checkpointing": True}},
            ["offload_embedding=true", "smaller"],
        ),
    ],
)
def test_out_of_memory_is_one_line_with_the_remedies_that_are_left(monkeypatch, asked, remedies):
    monkeypatch.setattr(machine, "memory_gib", lambda name: {"peak_reserved": 7.9})
    planned = asked.get("performance", {}).get("fused_lora", True)
    with pytest.raises(Failed) as failed, machine.explaining_out_of_memory(config(**asked), planned):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    line = str(failed.value)
    assert line.startswith("the GPU's memory is full at 7.90 GiB; try ") and "\n" not in line
    named = line.partition("; try ")[2].split(", then ")
    assert [wanted in given for wanted, given in zip(remedies, named, strict=True)] == [True] * len(remedies)


@pytest.mark.parametrize("error, full", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
    (RuntimeError("CUDA error: out of memory"), True),  # CUDA's own, as when a graph is instantiated
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (ValueError("out of memory"), False),
])  # fmt: skip
def test_a_full_gpu_has_several_voices(error, full):
    assert device.is_out_of_memory(error) == full
    with pytest.raises(Failed if full else type(error)), machine.explaining_out_of_memory(config(), planned=True):
        raise error


def test_days_on_a_cpu_are_refused_with_the_estimate_and_both_ways_out(no_gpu, monkeypatch):
    monkeypatch.setattr(machine, "_cpu_flops_per_second", lambda: 1e11)
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    # 2.4 M tokens x 3 epochs x 12.34 GFLOP a token / 1e11 FLOP/s = 888,692 s
    with pytest.raises(UserError, match=r"10 days.*configs/tiny\.yaml.*training\.device=cpu"):
        machine.check_patience(Config(), shape)


def test_a_short_cpu_run_is_not_refused(monkeypatch, root):
    monkeypatch.setattr(machine, "_cpu_flops_per_second", lambda: 1e11)
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    machine.check_patience(config(training={"max_steps": 1}), shape)  # 8,192 tokens: 1,011 s


def test_missing_reporting_package_is_one_line(no_gpu, monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"report_to: wandb.*pip install wandb"):
        machine.look_at_machine(config(training={"report_to": "wandb", "device": "cpu"}), None)
