"""Shapes of real models, for every test of planning."""

import pytest

from qlora_kit.planning.shape import KNOWN_CONFIGS, ModelShape, read_shape

SHAPES = {
    "3B": read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"]),
    "0.5B": ModelShape("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, True),
    "7B": ModelShape("qwen2", 28, 3584, 28, 4, 128, 18944, 152_064, False),
}


@pytest.fixture
def shapes() -> dict[str, ModelShape]:
    return SHAPES


@pytest.fixture
def qwen_3b() -> ModelShape:
    return SHAPES["3B"]
