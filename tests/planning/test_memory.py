"""Memory item by item: by hand for Qwen2.5-3B, and against every tensor of a real micro-step."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import override
from qlora_kit.fast.training_pass import FastDecoder
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.shape import ModelShape, read_shape
from quantization_utils import create_lora_config, prepare_model_for_training


def estimate(
    shape: ModelShape, changes: dict | None = None, micro_batch: int = 1, recomputed: int | None = None
) -> dict[str, float]:
    """Return the bytes of each item; recomputed None means all layers."""
    layers = shape.layers if recomputed is None else recomputed
    return estimate_memory(shape, override(Config(), changes or {}), micro_batch, layers)


def test_every_item_of_qwen_3b_by_hand(qwen_3b):
    """config.yaml at one sequence of 512 tokens, every layer recomputed, in 2-byte elements."""
    assert estimate(qwen_3b) == {
        # 36 x 77,070,336 weights x (4 bits + 8 bits a 64 weights + 32 bits a 64 x 256)
        "projection weights": 2_774_532_096 // 2 + 2_774_532_096 // 64 + 2_774_532_096 // 4096,
        # 151,936 x 2,048; 73 norms of 2,048; in each of 36 layers biases of 20 heads of 128
        "embedding and norms": 2 * (311_164_928 + 149_504 + 92_160),
        "adapters (fp32)": 4 * 29_933_568,
        "gradients (fp32)": 4 * 29_933_568,
        "optimizer state": 0,  # paged: CUDA manages it, outside the allocator
        "kept activations": 2 * 36 * 512 * (2_048 + 16),  # each layer's input, and the product of its input with the A of `down`
        # a token: 7 x 11,008; input, its gradient and the residual 3 x 2,048; q and attention output 2 x 2,048; k and v 2 x 256;
        # weights with LoRA's columns: o 2,064 x 2,048, gate and up 2 x 2,080 x 11,008, down 11,024 x 2,048
        "largest layer's workspace": 2 * (512 * (77_056 + 10_752) + 4_227_072 + 2 * 22_896_640 + 22_577_152),
        "logits above that": 0,  # 160 MiB, less than a layer's 224
        "libraries": 0.15 * GIB,
    }


def test_the_loaded_model_takes_what_readme_and_the_design_state(qwen_3b):
    parts = estimate(qwen_3b)
    assert parts["projection weights"] / GIB == pytest.approx(1.33, abs=0.005)
    assert parts["embedding and norms"] / GIB == pytest.approx(0.58, abs=0.005)


def test_a_layer_without_recomputation_keeps_its_activations(qwen_3b):
    # input and residual 2 x 2,048; q and the attention's output 2 x 2,048; k and v 2 x 256; gate and up 2 x 11,008
    # and of each of seven projections the product of its input with A, of rank 16; that of `down` is kept for every layer
    layer = 4_096 + 4_096 + 512 + 22_016 + 7 * 16
    assert estimate(qwen_3b, recomputed=0)["kept activations"] == 2 * 36 * 512 * layer
    assert estimate(qwen_3b, micro_batch=4, recomputed=30)["kept activations"] == 2 * 4 * 512 * (30 * (2_048 + 16) + 6 * layer)


def test_logits_count_where_they_exceed_a_layers_workspace(shapes):
    # 512 x 151,936 logits are more than 2^26, so two pieces of 75,968 rows: bf16 logits and their exponentials;
    # 12 bytes for each of 512 x 896 hidden states
    loss = 2 * 2 * 512 * 75_968 + 12 * 512 * 896
    layer = 2 * (512 * (7 * 4_864 + 5 * 896 + 2 * 128) + 912 * 896 + 2 * 928 * 4_864 + 4_880 * 896)
    parts = estimate(shapes["0.5B"])
    assert (parts["largest layer's workspace"], parts["logits above that"]) == (layer, loss - layer)


def test_an_offloaded_embedding_leaves_only_a_piece_of_the_head_on_the_gpu(qwen_3b):
    held, offloaded = estimate(qwen_3b), estimate(qwen_3b, {"performance.offload_embedding": True})
    assert held["embedding and norms"] - offloaded["embedding and norms"] == 2 * 311_164_928
    # 8,192 rows of the head and their logits, 60 MiB in all, are less than a layer's workspace
    assert {key for key in held if held[key] != offloaded[key]} == {"embedding and norms"}


def test_an_untied_head_counts_twice(qwen_3b):
    untied = replace(qwen_3b, tied_embedding=False)
    assert estimate(untied)["embedding and norms"] - estimate(qwen_3b)["embedding and norms"] == 2 * 151_936 * 2_048


def test_optimizer_state(qwen_3b):
    def state(optim: str) -> float:
        return estimate(qwen_3b, {"training.optim": optim})["optimizer state"]

    assert state("adamw_8bit") == 2 * 29_933_568  # two moments of 8 bits
    assert state("adamw_torch") == 8 * 29_933_568
    assert state("paged_adamw_32bit") == 0


def test_float32_takes_twice_as_much_as_two_byte_elements(qwen_3b):
    two, four = estimate(qwen_3b), estimate(qwen_3b, {"quantization.compute_dtype": "float32"})
    for part in ("embedding and norms", "kept activations", "largest layer's workspace"):
        assert four[part] == 2 * two[part]
    assert estimate(qwen_3b, {"quantization.compute_dtype": "float16"}) == two


def test_bits_per_weight_equal_those_of_the_qlora_paper(qwen_3b):
    def bits(**quantization) -> float:
        changes = {f"quantization.{key}": value for key, value in quantization.items()}
        return 8 * estimate(qwen_3b, changes)["projection weights"] / qwen_3b.projection_parameters()

    assert bits() == pytest.approx(4.127, abs=0.001)
    assert bits(use_double_quant=False) == 4.5
    assert bits(load_in_4bit=False) == 16


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"lora.rank": 8}, {"lora.rank": 16}),
        ({"data.max_length": 512}, {"data.max_length": 513}),
        ({"performance.offload_embedding": True}, {"performance.offload_embedding": False}),
        ({"quantization.use_double_quant": True}, {"quantization.use_double_quant": False}),
        ({"quantization.use_double_quant": False}, {"quantization.load_in_4bit": False}),
        ({"quantization.compute_dtype": "bfloat16"}, {"quantization.compute_dtype": "float32"}),
        ({"training.optim": "paged_adamw_8bit"}, {"training.optim": "adamw_8bit"}),
        ({"training.optim": "adamw_8bit"}, {"training.optim": "adamw_torch"}),
        ({"lora.target_modules": ["q_proj"]}, {"lora.target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=str,
)
def test_the_estimate_grows_with_settings_that_take_memory(qwen_3b, less, more):
    assert sum(estimate(qwen_3b, less).values()) < sum(estimate(qwen_3b, more).values())


@pytest.mark.parametrize(("less", "more"), [((1, 36), (2, 36)), ((1, 36), (1, 35)), ((1, 1), (1, 0))], ids=str)
def test_the_estimate_grows_with_the_micro_batch_and_shrinks_with_recomputation(qwen_3b, less, more):
    """Each pair is (micro_batch, recomputed)."""
    assert sum(estimate(qwen_3b, {}, *less).values()) < sum(estimate(qwen_3b, {}, *more).values())


def test_gradient_accumulation_takes_no_memory(qwen_3b):
    once, often = (estimate(qwen_3b, {"training.gradient_accumulation_steps": steps}) for steps in (1, 64))
    assert sum(once.values()) == sum(often.values())


class LiveStorages(TorchDispatchMode):
    """Record the most bytes that tensors created under it held at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.held, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.held += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self.held)
        return out

    def _forget(self, key):
        self.held -= self.sizes.pop(key, 0)


@pytest.mark.parametrize(
    ("sizes", "micro_batch", "recomputed"),
    [
        ({}, 4, 3),
        ({}, 4, 0),
        ({"vocab_size": 16384}, 4, 3),
        pytest.param({}, 8, 2, marks=pytest.mark.slow),
        pytest.param({"intermediate_size": 1408}, 4, 3, marks=pytest.mark.slow),
        pytest.param({"hidden_size": 256}, 4, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_micro_step_holds_what_is_predicted(sizes, micro_batch, recomputed):
    """Measure every tensor of an uncompiled forward and backward pass on the CPU, of shapes where tokens outweigh weights."""
    sizes = {"hidden_size": 128, "intermediate_size": 704, "vocab_size": 512} | sizes
    built = Qwen2Config(**sizes, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16)
    model = prepare_model_for_training(model, create_lora_config(16), use_gradient_checkpointing=False)
    decoder = FastDecoder(model, recomputed, compiled=False)
    decoder.adapters.clear_gradients()
    ids, keys = torch.randint(512, (micro_batch, 128)), torch.zeros(3, 4, dtype=torch.int32)
    with LiveStorages() as measured:
        decoder.accumulate(ids, ids, torch.tensor(1e-3), keys)
    config = override(Config(), {"data.max_length": 128, "performance.compile": False})
    parts = estimate_memory(read_shape(built.to_dict()), config, micro_batch, recomputed)
    predicted = parts["kept activations"] + parts["largest layer's workspace"] + parts["logits above that"]
    assert predicted == pytest.approx(measured.peak, rel=0.1)


def test_answers_to_prompts_take_their_keys_and_values_beside_the_micro_steps(qwen_3b):
    """36 layers keep a key and a value of 2 heads of 128 numbers, in 16 bits, for 512 + 64 tokens: 21,233,664 bytes."""
    config = override(Config(), {"training.sample_prompts": ["The river"]})
    without, parts = (estimate_memory(qwen_3b, one, 1, 36) for one in (Config(), config))
    (name,) = parts.keys() - without
    assert name == "answers to sample_prompts" and 21_233_664 < parts[name] < 0.15 * GIB
    assert {key: parts[key] for key in without} == without
