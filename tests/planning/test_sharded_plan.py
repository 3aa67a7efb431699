"""A base model sharded over processes (performance.fsdp), in memory and plan."""

import pytest

from qlora_kit.config import GIB, Config, PerformanceSettings
from qlora_kit.errors import UserError
from qlora_kit.planning.fit import cheapest_change
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.plan import check_division, make_plan
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

QWEN_32B = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-32B-Instruct"])


def settings(**performance):
    return Config(performance=PerformanceSettings(**performance))


def test_only_the_frozen_weights_are_sharded():
    whole = estimate_memory(QWEN_32B, settings(), 1, 64)
    sharded = estimate_memory(QWEN_32B, settings(fsdp=True), 1, 64, processes=4)
    offloaded = estimate_memory(QWEN_32B, settings(fsdp="offload"), 1, 64, processes=4)
    assert sharded["projection weights"] == whole["projection weights"] / 4 and offloaded["projection weights"] == 0
    norms_and_biases = 2 * ((2 * 64 + 1) * 5120 + 64 * (40 + 2 * 8) * 128)
    head_and_embedding = 2 * 2 * 152064 * 5120
    assert whole["embedding and norms"] == norms_and_biases + head_and_embedding
    assert sharded["embedding and norms"] == norms_and_biases + head_and_embedding / 4
    assert sharded["gathered weights"] == 2 * whole["projection weights"] / 64
    same = ("adapters (fp32)", "gradients (fp32)", "kept activations", "largest layer's workspace")
    assert all(sharded[name] == whole[name] for name in same)


def test_sharding_is_offered_if_there_are_several_processes_and_none_can_hold_the_whole_model():
    for processes, expected in ((1, None), (2, True)):
        change = cheapest_change(settings(), QWEN_32B, 16 * GIB, processes)
        assert (change or {}).get("performance.fsdp") is expected
    plan = make_plan(settings(fsdp=True), QWEN_32B, 80 * GIB, 2)
    assert plan.peak < make_plan(settings(), QWEN_32B, 80 * GIB, 2).peak


@pytest.mark.parametrize("fsdp", [True, "offload"])
def test_one_process_cannot_shard(fsdp):
    check_division(settings(fsdp=fsdp), 2)
    with pytest.raises(UserError, match=f"performance.fsdp: {str(fsdp).lower()}: needs several processes"):
        check_division(settings(fsdp=fsdp), 1)
