"""adapter_config.json against peft's own keys: what a LoRA needs is kept, the rest is refused or left out."""

import dataclasses
import json

import peft
import pytest

from qlora_kit.adapter.settings import CHANGES_THE_COMPUTATION, WITHOUT_EFFECT, IA3File, LoraFile, read_settings
from qlora_kit.errors import UserError


@pytest.fixture
def read(tmp_path):
    def call(**settings):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        return read_settings(tmp_path)

    return call


def test_every_key_of_peft_is_known():
    """A key that a later peft adds must be put on one of the lists."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= {*LoraFile.model_fields, *CHANGES_THE_COMPUTATION, *WITHOUT_EFFECT}
    assert {field.name for field in dataclasses.fields(peft.IA3Config)} <= {*IA3File.model_fields, *WITHOUT_EFFECT}


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=7.5, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        peft.LoraConfig(target_modules=r".*\.q_proj", rank_pattern={"^a.b": 2}, alpha_pattern={"b": 3}, use_rslora=True),
        peft.LoraConfig(use_dora=True, bias="all", modules_to_save=["lm_head"]),
        peft.LoraConfig(init_lora_weights="pissa", trainable_token_indices=[1]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
)  # fmt: skip
def test_what_peft_saves_is_read_as_peft_reads_it(config, tmp_path):
    config.save_pretrained(tmp_path)
    settings, left_out = read_settings(tmp_path)
    again = type(config)(**settings.model_dump())
    ours, theirs = again.to_dict(), peft.PeftConfig.from_pretrained(tmp_path).to_dict()
    assert {name for name in ours if ours[name] != theirs[name]} <= set(WITHOUT_EFFECT) and left_out == []


def test_a_key_that_imports_a_module_is_refused(read):
    with pytest.raises(UserError, match=r"sets megatron_config to .* which is not supported"):
        read(peft_type="LORA", megatron_config={"a": 1}, megatron_core="megatron.payload")


def test_keys_without_effect_are_dropped_and_unknown_ones_are_named(read):
    settings, left_out = read(r=2, megatron_core="os", auto_mapping={"parent_library": "os"}, later=1, note="x", unused=None)
    assert settings == LoraFile(r=2) and left_out == ["later", "note"]


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "XLORA"}, {"peft_type": 5}, {"layer_replication": [[0, 4]]}, {"r": 0}, {"r": True},
        {"r": 10**400}, {"r": "8"},
        {"lora_alpha": 10**400}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"use_rslora": "no"},
        {"target_modules": "(("}, {"target_modules": [1]}, {"exclude_modules": "*"}, {"rank_pattern": []},
        {"rank_pattern": {"(": 1}},
        {"rank_pattern": {"a": "b"}}, {"alpha_pattern": "x"}, {"init_lora_weights": [1]}, {"bias": "some"}, {"lora_dropout": -1},
        {"trainable_token_indices": "all"}, {"base_model_name_or_path": ["x"]}, {"modules_to_save": "lm_head"},
        {"inference_mode": 1}, {"target_modules": "a\x1b[31m"}, {"base_model_name_or_path": "evil\n\x1b]0;title\x07"},
        {"base_model_name_or_path": "\ud800"}, {"modules_to_save": ["(("]}, {"init_lora_weights": "pissa_niter_1000000"},
        {"init_lora_weights": "os.system"}, {"kasa_config": {}}, {"alora_invocation_tokens": []},
        {"megatron_config": {}}, {"megatron_config": 0},
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_that_names_the_key(read, settings):
    with pytest.raises(UserError) as error:
        read(**settings)
    (line,) = error.value.lines
    assert line.startswith("--adapter: ") and next(iter(settings)) in line
