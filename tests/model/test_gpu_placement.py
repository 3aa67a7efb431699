"""Place base models by sizes computed by hand, and run a model whose layers are on several devices."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import inference_example
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.config import GIB, GenerationSettings, ModelSettings, QuantizationSettings
from qlora_kit.errors import UserError
from qlora_kit.inference.library_engine import LibraryEngine
from qlora_kit.merge import command
from qlora_kit.merge.check import choose_device_maps
from qlora_kit.merge.weights import Packing
from qlora_kit.model.gpu_placement import (
    TEXT_TOKENS,
    WORK_BYTES,
    build_empty,
    choose_device_map,
    fits,
    missing_bytes,
    needed_bytes,
    spread,
)
from qlora_kit.model.load import load_base_model
from qlora_kit.model.loss import token_losses
from qlora_kit.planning.shape import BYTES_4BIT_DOUBLE, KNOWN_CONFIGS, read_shape

PAGE = " ".join((Path(__file__).resolve().parents[2] / "docs" / "several_gpus.md").read_text(encoding="utf-8").split())
# q, k, v, o and the three of the MLP: 64 x 64 + 2 x 64 x 32 + 64 x 64 + 3 x 64 x 128 weights a layer.
LAYER_WEIGHTS = 36_864
LAYER = 2 * (LAYER_WEIGHTS + 2 * 64)  # bytes in 16 bits, with two norms
PACKED_LAYER = LAYER_WEIGHTS // 2 + 2 * 2 * 64
VOCABULARY = 2 * 512 * 64  # embedding, and as much for the head


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a Llama of four layers that has a config.json and no weights."""
    shape = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return tmp_path


def empty(folder, packed: bool):
    return build_empty(ModelSettings(name=str(folder)), torch.bfloat16, packed)


@pytest.mark.parametrize("load_in_4bit, gib", [(True, 1.333 + 0.580), (False, 5.168 + 0.580)])
def test_the_bytes_of_qwen_3b_are_those_computed_by_hand(load_in_4bit, gib):
    """2,774,532,096 weights in 4.127 bits or 16, and 311,406,592 others in 16; 3,085,938,688 in all."""
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    weights, room = needed_bytes(shape, QuantizationSettings(load_in_4bit=load_in_4bit), 2)
    assert weights / GIB == pytest.approx(gib, abs=1e-3)
    # 4,096 tokens x 36 layers x keys and values x 2 heads of 128; the MLP's 2,048 x 11,008; half a GiB
    assert f"{WORK_BYTES / GIB} GiB" in PAGE and f"{TEXT_TOKENS:,} tokens." in PAGE
    assert room == 2 * (4096 * 36 * 2 * 256 + 2048 * 11008) + GIB // 2


@pytest.mark.parametrize(
    "free, places, missing",
    [
        ([14], "one", 0), ([13], "none", 1), ([1], "none", 13),
        ([13, 13], "several", 0), ([9, 9], "several", 0), ([9, 8], "none", 1), ([14, 1], "one", 0),
        ([1, 14], "several", 0), ([4, 4, 3, 4], "none", 10), ([6, 6, 6, 5], "none", 3), ([7, 7, 3, 8], "several", 0),
    ],
)  # fmt: skip
def test_ten_units_of_weights_need_four_more_on_each_gpu(free, places, missing):
    assert fits(10, 4, free) == places
    assert places == "one" or missing_bytes(10, 4, free) == missing


def test_undivided_layers_fill_the_gpus_in_their_order(folder):
    """accelerate keeps room for one more layer on the first GPU: 300,000 - 73,984 hold the embedding and two layers."""
    device_map, missing = spread(empty(folder, False), [300_000, 300_000], BYTES_4BIT_DOUBLE)
    assert 300_000 - LAYER - VOCABULARY - 2 * LAYER in range(LAYER) and 2 * LAYER + VOCABULARY + 2 * 64 < 300_000
    first, second = ("model.embed_tokens", "model.layers.0", "model.layers.1"), ("model.layers.2", "model.layers.3")
    expected = dict.fromkeys(first, 0) | dict.fromkeys((*second, "model.norm", "model.rotary_emb", "lm_head"), 1)
    assert (device_map, missing) == (expected, 0)


def test_packed_layers_count_with_their_packed_size(folder):
    """150,000 bytes a GPU: two layers of 16 bits and the head would be 213,504; packed, two are 37,376 and four 74,752."""
    budgets = [150_000, 150_000]
    assert spread(empty(folder, False), budgets, BYTES_4BIT_DOUBLE)[1] > 0
    device_map, missing = spread(empty(folder, True), budgets, BYTES_4BIT_DOUBLE)
    assert missing == 0 and set(device_map.values()) == {0, 1}
    assert 4 * PACKED_LAYER + 2 * VOCABULARY > 150_000  # so one GPU is not enough


def test_layers_that_do_not_fit_evenly_fill_up_each_gpu(folder):
    """Even shares, 427,136 / 3 + 1.25 x 73,984 bytes, hold one layer, then three, and the third GPU has no room for the head."""
    device_map, missing = spread(empty(folder, False), [300_000, 300_000, 10_000], BYTES_4BIT_DOUBLE)
    assert missing == 0 and set(device_map.values()) == {0, 1}


def test_the_bytes_of_layers_without_a_gpu_are_counted(folder):
    """The embedding goes onto the second GPU alone; four layers, the last norm and the head find no room."""
    _, missing = spread(empty(folder, False), [100_000, 100_000], BYTES_4BIT_DOUBLE)
    assert missing == pytest.approx(4 * LAYER + 2 * 64 + VOCABULARY, abs=200)  # rotary tables


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that sets each GPU's free bytes beyond `room`, and returns the numbers of the GPUs that were read."""
    read = []

    def pretend(room: float, *budgets: int):
        read.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(budgets))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (read.append(number), (int(room) + budgets[number], 0))[1])
        return read

    return pretend


def choose(folder, wanted="auto", device="cuda", packed=False):
    model, quantization = ModelSettings(name=str(folder)), QuantizationSettings(load_in_4bit=packed)
    return choose_device_map(folder, model, quantization, torch.bfloat16, device, wanted)


def room_of(folder) -> float:
    return needed_bytes(read_shape(json.loads((folder / "config.json").read_text())), QuantizationSettings(), 2)[1]


def test_several_gpus_are_used_if_the_first_has_no_room(folder, gpus):
    whole = 4 * LAYER + 2 * VOCABULARY + 2 * 64
    room = room_of(folder)
    read = gpus(room, whole, whole)
    assert choose(folder) == ({"": 0}, None) and set(read) == {0}
    gpus(room, whole - 1, whole)
    device_map, note = choose(folder)
    assert set(device_map.values()) == {0, 1} and device_map["model.embed_tokens"] == 0
    assert (
        note
        == f"{folder} does not fit into the {(room + whole - 1) / GIB:.2f} GiB that are free on the first GPU: spread over 2 GPUs"
    )
    gpus(room, 0, 2 * whole)
    device_map, note = choose(folder)
    assert set(device_map.values()) == {1} and note.endswith("loaded onto GPU 1")


@pytest.mark.parametrize("budgets", [(100_000,), (100_000, 100_000), (100_000, 330_000)], ids=str)
def test_no_room_is_one_line_before_anything_is_loaded(folder, gpus, budgets):
    """427,136 bytes of weights, in no file: too many for the first two, and for the third as layers are not divided."""
    gpus(room_of(folder), *budgets)
    with pytest.raises(UserError) as error:
        choose(folder)
    (line,) = error.value.lines
    assert line.startswith(f"model.name: {folder}: needs 0.00 GiB in bfloat16 and 0.5") and "\n" not in line
    assert line.count(" + ") == len(budgets) - 1
    assert "GiB, use --device cpu, or force the first GPU with --device_map one." in line


def test_the_first_device_is_used_without_reading_memory_if_there_is_no_choice(folder, other_models, gpus):
    read = gpus(0, 1, 1)
    assert choose(folder, wanted="one") == ({"": 0}, None)
    assert choose(folder, device="cpu") == ({"": "cpu"}, None)
    assert choose(other_models["gpt2"]) == ({"": 0}, None)  # its shape is not known
    assert read == []


def test_a_merge_whose_check_has_no_room_is_refused_before_writing(adapter, root, gpus, monkeypatch, capsys):
    """Packed the base fits on the first GPU; the merged model, of 3,543,360 parameters in 16 bits, on both or on none."""
    monkeypatch.chdir(root)
    source = replace(read_adapter(str(adapter)), model=ModelSettings(name="assets/tiny-qwen2"))
    packing = Packing(source.quantization, torch.bfloat16, "cuda")
    room = room_of(root / "assets/tiny-qwen2")
    gpus(room, 6_000_000, 6_000_000)
    packed, whole = choose_device_maps(source, root / "assets/tiny-qwen2", packing, "auto")
    assert packed == {"": 0} and set(whole.values()) == {0, 1}
    assert capsys.readouterr().err.endswith("spread over 2 GPUs\n")
    gpus(room, 6_000_000)
    with pytest.raises(UserError, match=r"in bfloat16 .*, or use --check none\.$"):
        choose_device_maps(source, root / "assets/tiny-qwen2", packing, "auto")
    assert choose_device_maps(source, root / "assets/tiny-qwen2", packing, "one") == [{"": 0}, {"": 0}]


def test_the_flag_takes_a_hyphen():
    assert inference_example.parse_arguments(["--device-map", "one"]).device_map == "one"
    flags = ["--adapter", "a", "--output", "b"]
    assert command.parse_arguments([*flags, "--device-map", "one"]).device_map == "one"
    assert command.parse_arguments(flags).device_map == "auto"


def test_a_model_on_several_devices_gives_the_same_answers_and_losses(tiny_dir):
    """Two layers stay on disk, so that accelerate's hooks move them, here without a GPU."""
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{n}" for n in range(6))]
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.2": "disk", "model.layers.5": "disk"}
    results = []
    for device in ("cpu", device_map):
        model = load_base_model(tiny_dir, None, device=device, dtype=torch.float32)
        assert model.model.layers[5].mlp.up_proj.weight.is_meta == (device is device_map)
        ids = torch.arange(100, 164).reshape(2, 32)
        greedy = GenerationSettings(temperature=0, max_new_tokens=8, repetition_penalty=1)
        with torch.no_grad():
            losses = token_losses(model.requires_grad_(False), ids, ids)
        results.append((losses, list(LibraryEngine(model, 0).steps([[100, 101, 102]], greedy, 0, []))))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] and len(results[0][1]) == 8
