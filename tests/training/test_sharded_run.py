"""Refusals of runs whose base model cannot be sharded over processes (performance.fsdp)."""

import json
import re

import pytest

from qlora_kit.config import Config, ModelSettings, PerformanceSettings
from qlora_kit.errors import UserError
from qlora_kit.model.architecture import read_fast_shape
from qlora_kit.planning.shape import KNOWN_CONFIGS
from qlora_kit.training.processes import check_launcher


@pytest.mark.parametrize(
    ("model", "performance", "reason"),
    [
        ({"model_type": "gpt2"}, {}, "gpt2 is not built like Llama"),
        (KNOWN_CONFIGS["Qwen/Qwen2.5-32B-Instruct"], {"fused_lora": False}, "performance.fused_lora is false"),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused_by_its_config(tmp_path, model, performance, reason):
    (tmp_path / "config.json").write_text(json.dumps(model))
    config = Config(model=ModelSettings(name=str(tmp_path)), performance=PerformanceSettings(fsdp=True, **performance))
    with pytest.raises(UserError, match=re.escape(f"performance.fsdp: true: cannot work here ({reason}). Use false.")):
        read_fast_shape(config)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_accelerates_own_ways_to_shard_are_refused_by_name(monkeypatch, variable):
    check_launcher()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=rf"{variable}: true: .*performance.fsdp=true"):
        check_launcher()
