"""Tell linear layers from others, and pack a model without weights as loading packs it."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.nn import Linear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from qlora_kit.config import ModelSettings
from qlora_kit.model.load import load_base_model
from qlora_kit.model.skeleton import build_skeleton, is_linear, linear_layers_read_past_forward, pack_skeleton
from quantization_utils import create_bnb_config
from tests.model.saved_models import TINY, save_model


def skeleton(name: str):
    return build_skeleton(ModelSettings(name=str(save_model(name))))


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Noisy(Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(self.out_features)


class Renamed(Linear):
    pass


@pytest.mark.parametrize("layer, linear", [
    (Linear(8, 4), True), (Renamed(8, 4), True), (Conv1D(4, 8), True), (Linear4bit(64, 64), True), (FalconLinear(8, 4), True),
    (FalconLinear(8, 4, bias=False), True), (Doubled(8, 4), False), (Noisy(8, 4), False), (torch.nn.Embedding(8, 4), False),
])  # fmt: skip
def test_a_layer_is_linear_if_it_computes_what_linear_computes(layer, linear):
    state = torch.random.get_rng_state()
    assert is_linear(layer) is linear
    assert isinstance(layer, Noisy) or torch.equal(state, torch.random.get_rng_state())  # a run's numbers stay the same


def test_falcons_own_layers_are_replaced_and_routers_are_not():
    assert {type(module) for module in skeleton("falcon").modules() if isinstance(module, Linear)} == {Linear}
    routers = [module for module in skeleton("phimoe").modules() if isinstance(module, PhimoeTopKRouter)]
    assert len(routers) == 2 and not any(map(is_linear, routers))


@pytest.mark.parametrize("name, names", [
    ("mamba", {"dt_proj", "x_proj", "out_proj"}),  # conv1d is no linear layer
    ("gemma3n", {"prediction_coefs", "correction_coefs"}),
    ("llama", set()),
    ("falcon", set()),
])  # fmt: skip
def test_layers_whose_weight_is_read_by_the_layer_around_them_are_found(name, names):
    assert {full.rpartition(".")[2] for full in linear_layers_read_past_forward(skeleton(name))} == names


@pytest.mark.parametrize("name", ["falcon", "mamba", "mixtral"])
def test_a_skeleton_is_packed_where_loading_packs(name):
    empty, packing = skeleton(name), create_bnb_config(compute_dtype=torch.float32)
    pack_skeleton(empty)
    loaded = load_base_model(save_model(name), packing, device="cpu", dtype=torch.float32)
    kinds = [[type(module).__name__ for module in model.modules()] for model in (empty, loaded)]
    assert kinds[0] == kinds[1]
    assert any(isinstance(module, Linear4bit) for module in empty.modules())


def test_the_embedded_model_is_packed_as_the_library_packs_it():
    empty = build_skeleton(ModelSettings(name=str(TINY)))
    pack_skeleton(empty)
    assert sum(isinstance(module, Linear4bit) for module in empty.modules()) == 42
    assert type(empty.lm_head) is Linear
