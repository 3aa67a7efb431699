"""Parameters and bytes by hand, and against models that transformers and peft really build; then what a plan may choose."""

import json
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import override, parse_set
from qlora_kit.errors import UserError
from qlora_kit.fast.training_pass import FastDecoder
from qlora_kit.planning import fit
from qlora_kit.planning import plan as planner
from qlora_kit.planning import shape as shape_of
from qlora_kit.planning.fit import plan_table
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.plan import Plan, make_plan
from qlora_kit.planning.shape import KNOWN_CONFIGS, ModelShape, read_shape
from quantization_utils import create_lora_config, prepare_model_for_training

ALL_SEVEN = Config().lora.target_modules


@pytest.fixture
def qwen_3b() -> ModelShape:
    return read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])


def settings(**changes) -> Config:
    """`lora__rank=8` stands for the key lora.rank."""
    return override(Config(), {key.replace("__", "."): value for key, value in changes.items()})


def estimate(shape: ModelShape, micro_batch: int = 1, recomputed: int | None = None, **changes) -> dict[str, float]:
    """Bytes per part; all layers are computed again unless said."""
    return estimate_memory(shape, settings(**changes), micro_batch, shape.layers if recomputed is None else recomputed)


def total(shape: ModelShape, *division: int, **changes) -> float:
    return sum(estimate(shape, *division, **changes).values())


# Qwen2.5-3B, whose figures are published


def test_parameters_of_qwen_3b(qwen_3b):
    assert qwen_3b.parameters() == 3_085_938_688


def test_adapters_of_qwen_3b(qwen_3b):
    # 36 layers x rank 16 x the sum of in + out: q, o 2 x 4096; k, v 2 x 2304; gate, up, down 3 x 13056
    assert qwen_3b.lora_parameters(16, ALL_SEVEN) == 29_933_568
    assert qwen_3b.lora_parameters(16, "all-linear") == 29_933_568
    # 36 x 8 x (4096 + 2304)
    assert qwen_3b.lora_parameters(8, ["q_proj", "v_proj"]) == 1_843_200


def test_every_part_of_qwen_3b_by_hand(qwen_3b):
    """config.yaml at one sequence of 512 tokens, every layer computed again, in 2-byte elements."""
    assert estimate(qwen_3b) == {
        # 36 x 77,070,336 weights x (4 bits + 8 bits a 64 weights + 32 bits a 64 x 256)
        "projection weights": 2_774_532_096 // 2 + 2_774_532_096 // 64 + 2_774_532_096 // 4096,
        # 151,936 x 2,048; 73 norms of 2,048; in each of 36 layers biases of 20 heads of 128
        "embedding and norms": 2 * (311_164_928 + 149_504 + 92_160),
        "adapters (fp32)": 4 * 29_933_568,
        "gradients (fp32)": 4 * 29_933_568,
        "optimizer state": 0,  # paged: CUDA manages it, outside the allocator
        "kept activations": 2 * 36 * 512 * (2_048 + 16),  # each layer's input, and what the A of `down` made of its own
        "unpacked weights": 0,
        # a token: 7 x 11,008; input, its gradient and the residual 3 x 2,048; q and what was attended 2 x 2,048; k and v 2 x 256;
        # weights beside LoRA's columns: o 2,064 x 2,048, gate and up 2 x 2,080 x 11,008, down 11,024 x 2,048
        "largest layer's workspace": 2 * (512 * (77_056 + 10_752) + 4_227_072 + 2 * 22_896_640 + 22_577_152),
        "logits above that": 0,  # 160 MiB, less than a layer's 224
        "libraries": 0.15 * GIB,
    }


def test_the_sums_that_readme_and_the_design_state(qwen_3b):
    parts = estimate(qwen_3b)
    assert parts["projection weights"] / GIB == pytest.approx(1.33, abs=0.005)
    assert parts["embedding and norms"] / GIB == pytest.approx(0.58, abs=0.005)


def test_what_a_layer_keeps_that_is_not_computed_again(qwen_3b):
    # input and residual 2 x 2,048; q and the attention's output 2 x 2,048; k and v 2 x 256; gate and up 2 x 11,008
    # and of each of seven projections what A, of rank 16, made of its input; that of `down` stays for every layer
    layer = 4_096 + 4_096 + 512 + 22_016 + 7 * 16
    assert estimate(qwen_3b, recomputed=0)["kept activations"] == 2 * 36 * 512 * layer
    assert estimate(qwen_3b, micro_batch=4, recomputed=30)["kept activations"] == 2 * 4 * 512 * (30 * (2_048 + 16) + 6 * layer)


def test_weights_kept_unpacked(qwen_3b):
    again, kept = estimate(qwen_3b, recomputed=0), estimate_memory(qwen_3b, settings(), 1, 0, keep_weights=True)
    qkv, o, gate_up = (2_048 + 48) * (2_048 + 256 + 256), (2_048 + 16) * 2_048, (2_048 + 32) * 22_016
    down = (11_008 + 16) * 2_048
    assert (again["unpacked weights"], kept["unpacked weights"]) == (0, 2 * 36 * (qkv + o + gate_up + down))
    assert again["largest layer's workspace"] - kept["largest layer's workspace"] == 2 * (o + gate_up + down)


def test_logits_count_where_they_exceed_a_layer_at_work():
    shape = ModelShape("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, True)  # Qwen2.5-0.5B
    # 512 x 151,936 logits are more than 2^26, so two pieces of 75,968 rows: bf16 logits and their exponentials;
    # 12 bytes for each of 512 x 896 hidden states
    loss = 2 * 2 * 512 * 75_968 + 12 * 512 * 896
    layer = 2 * (512 * (7 * 4_864 + 5 * 896 + 2 * 128) + 912 * 896 + 2 * 928 * 4_864 + 4_880 * 896)
    parts = estimate(shape)
    assert (parts["largest layer's workspace"], parts["logits above that"]) == (layer, loss - layer)


def test_an_offloaded_embedding_leaves_a_piece_of_the_head(qwen_3b):
    held, offloaded = estimate(qwen_3b), estimate(qwen_3b, performance__offload_embedding=True)
    assert held["embedding and norms"] - offloaded["embedding and norms"] == 2 * 311_164_928
    # 8,192 rows of the head and their logits, 60 MiB in all, are less than a layer at work
    assert {key for key in held if held[key] != offloaded[key]} == {"embedding and norms"}


def test_optimizer_state(qwen_3b):
    assert estimate(qwen_3b, training__optim="adamw_8bit")["optimizer state"] == 2 * 29_933_568  # two moments of 8 bits
    assert estimate(qwen_3b, training__optim="adamw_torch")["optimizer state"] == 8 * 29_933_568
    assert estimate(qwen_3b, training__optim="paged_adamw_32bit")["optimizer state"] == 0


def test_float32_takes_twice_what_two_byte_elements_take(qwen_3b):
    two, four = estimate(qwen_3b), estimate(qwen_3b, quantization__compute_dtype="float32")
    for part in ("embedding and norms", "kept activations", "largest layer's workspace"):
        assert four[part] == 2 * two[part]
    assert estimate(qwen_3b, quantization__compute_dtype="float16") == two


def test_bits_per_weight_are_those_of_the_qlora_paper(qwen_3b):
    def bits(**changes) -> float:
        return 8 * estimate(qwen_3b, **changes)["projection weights"] / qwen_3b.projection_parameters()

    assert bits() == pytest.approx(4.127, abs=0.001)
    assert bits(quantization__use_double_quant=False) == 4.5
    assert bits(quantization__load_in_4bit=False) == 16


@pytest.mark.parametrize("tokens", [1, 100, 441, 442, 512, 8192])
def test_pieces_of_the_head_cover_the_vocabulary_and_hold_no_more_logits_than_allowed(tokens):
    rows = shape_of.vocabulary_piece(tokens, 151_936)
    assert rows % 64 == 0
    pieces = -(-151_936 // rows)
    assert (pieces == 1) == (tokens <= 441)  # 2^26 / 151,936
    assert tokens * rows <= shape_of.PIECE_LOGITS + tokens * 64  # up to the rounding
    assert pieces == -(-tokens * 151_936 // shape_of.PIECE_LOGITS)


# Against the libraries


def small(config_class: type[PretrainedConfig], tied: bool, **rest) -> PretrainedConfig:
    return config_class(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        tie_word_embeddings=tied,
        **rest,
    )


@pytest.fixture(
    params=[
        (config_class, tied, rest)
        for config_class, rest in [
            (Qwen2Config, {}),
            (LlamaConfig, {}),
            (LlamaConfig, {"head_dim": 32}),
            (MistralConfig, {}),
            (Qwen3Config, {"head_dim": 32}),
        ]
        for tied in (True, False)
    ],
    ids=lambda parts: f"{parts[0].model_type}-{'tied' if parts[1] else 'untied'}{'-head_dim' if parts[2] else ''}",
)
def model_and_shape(request, tmp_path):
    """A small model of each kind, and the shape read from the config.json that it saves."""
    config_class, tied, rest = request.param
    config = small(config_class, tied, **rest)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, read_shape(json.loads((tmp_path / "config.json").read_text()))


def test_parameters_are_those_of_the_model_that_transformers_builds(model_and_shape):
    model, shape = model_and_shape
    model.tie_weights()
    assert shape.parameters() == model.num_parameters()


@pytest.mark.parametrize("targets", [ALL_SEVEN, ["q_proj", "v_proj"], ["down_proj"], "all-linear"], ids=str)
def test_adapters_are_those_that_peft_adds(model_and_shape, targets):
    model, shape = model_and_shape
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert shape.lora_parameters(4, targets) == adapted.get_nb_trainable_parameters()[0]


def test_the_embedded_model_counts_as_it_is(tiny_dir):
    shape = read_shape(json.loads((tiny_dir / "config.json").read_text()))
    assert shape.parameters() == AutoModelForCausalLM.from_pretrained(tiny_dir).num_parameters()


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "gemma3", None])
def test_other_architectures_have_no_estimate(model_type):
    sizes = {key: value for key, value in KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"].items() if key != "model_type"}
    assert read_shape({"model_type": model_type, **sizes}) is None
    assert read_shape(sizes) is None


@pytest.mark.parametrize(
    "missing", ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_config_that_leaves_a_size_to_the_library_has_no_estimate(missing):
    stated = KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"]
    assert read_shape({key: value for key, value in stated.items() if key != missing}) is None


# What takes more, and what takes less


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"lora__rank": 8}, {"lora__rank": 16}),
        ({"data__max_length": 512}, {"data__max_length": 513}),
        ({"micro_batch": 1}, {"micro_batch": 2}),
        ({"recomputed": 36}, {"recomputed": 35}),
        ({"recomputed": 1}, {"recomputed": 0}),
        ({"performance__offload_embedding": True}, {"performance__offload_embedding": False}),
        ({"quantization__use_double_quant": True}, {"quantization__use_double_quant": False}),
        ({"quantization__use_double_quant": False}, {"quantization__load_in_4bit": False}),
        ({"quantization__compute_dtype": "bfloat16"}, {"quantization__compute_dtype": "float32"}),
        ({"training__optim": "paged_adamw_8bit"}, {"training__optim": "adamw_8bit"}),
        ({"training__optim": "adamw_8bit"}, {"training__optim": "adamw_torch"}),
        ({"lora__target_modules": ["q_proj"]}, {"lora__target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=str,
)
def test_the_estimate_grows_with_what_takes_memory(qwen_3b, less, more):
    assert total(qwen_3b, **less) < total(qwen_3b, **more)


def test_gradient_accumulation_takes_no_memory(qwen_3b):
    assert total(qwen_3b, training__gradient_accumulation_steps=1) == total(qwen_3b, training__gradient_accumulation_steps=64)


def test_recomputing_costs_one_forward_pass_through_the_layers(qwen_3b):
    work = qwen_3b.training_flops_per_token
    assert work(recompute=True) - work(recompute=False) == 2 * qwen_3b.projection_parameters()


# What a plan chooses

SHAPES = {
    "3B": read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"]),
    "0.5B": ModelShape("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, True),
    "7B": ModelShape("qwen2", 28, 3584, 28, 4, 128, 18944, 152_064, False),
}
LIMITS = [1.0, 2.0, 2.8, 3.0, 4.0, 6.0, 7.2, 8.0, 12.0, 24.0, 80.0, 139.0]  # GiB
RUNS = [
    {},
    {"lora__rank": 64, "data__max_length": 1024},
    {"training__batch_size": 3, "training__gradient_accumulation_steps": 5},  # no power of two divides 15
    {"training__batch_size": 1, "training__gradient_accumulation_steps": 1},
    {"performance__offload_embedding": True, "training__optim": "adamw_torch"},
    {"data__max_length": 64, "training__gradient_accumulation_steps": 48},
]


def cost(plan: Plan, config: Config, layers: int) -> float:
    """What a plan is predicted to take beside the products that every plan has, in the work of one token."""
    tokens = plan.micro_batch * config.data.max_length
    beside = planner.MICRO_STEP_TOKENS - planner.KEPT_WEIGHTS_TOKENS * plan.keep_weights
    return beside / tokens + planner.RECOMPUTATION * plan.recomputed / layers


@pytest.fixture(params=SHAPES, ids=str)
def shape(request) -> ModelShape:
    return SHAPES[request.param]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_a_plan_fills_the_memory_and_leaves_a_tenth_of_it(shape, changes):
    config = settings(**changes)
    divisors = [n for n in range(1, config.effective_batch + 1) if config.effective_batch % n == 0]
    ways = [(b, n, keep) for b in divisors for n in range(shape.layers + 1) for keep in (False, True) if n == 0 or not keep]
    peaks = {way: sum(estimate_memory(shape, config, *way).values()) for way in ways}
    for gib in LIMITS:
        plan = make_plan(config, shape, gib * GIB)
        assert plan.peak == peaks[plan.micro_batch, plan.recomputed, plan.keep_weights]  # the micro-batch divides the batch
        fitting = [way for way, peak in peaks.items() if peak <= 0.9 * gib * GIB]
        if not fitting:
            assert plan.peak == min(peaks.values())
            continue
        # Nothing else that fits has as large a micro-batch, as few layers computed again, and keeps as much.
        as_fast = [
            (b, n, keep) for b, n, keep in fitting if b >= plan.micro_batch and n <= plan.recomputed and keep >= plan.keep_weights
        ]
        assert as_fast == [(plan.micro_batch, plan.recomputed, plan.keep_weights)]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_more_memory_never_makes_a_run_slower(shape, changes):
    config = settings(**changes)
    costs = [cost(make_plan(config, shape, gib * GIB), config, shape.layers) for gib in LIMITS]
    assert all(more <= less for less, more in pairwise(costs))


def test_without_need_nothing_is_computed_again_and_the_effective_batch_goes_through_at_once(qwen_3b):
    plan = make_plan(Config(), qwen_3b, 139 * GIB)
    assert (plan.micro_batch, plan.recomputed, plan.keep_weights) == (16, 0, True)


def test_the_default_run_fits_a_card_of_8_gib(qwen_3b):
    plan = make_plan(Config(), qwen_3b, 8 * GIB)
    assert 6.5 * GIB < plan.peak <= 7.2 * GIB


def test_what_was_set_is_obeyed(shape):
    for gib in LIMITS:
        plan = make_plan(settings(performance__micro_batch=4), shape, gib * GIB)
        assert plan.micro_batch == 4
        for recompute, layers in ((True, shape.layers), (False, 0)):
            assert make_plan(settings(training__gradient_checkpointing=recompute), shape, gib * GIB).recomputed == layers
            both = settings(training__gradient_checkpointing=recompute, performance__micro_batch=2)
            plan = make_plan(both, shape, gib * GIB)
            assert (plan.micro_batch, plan.recomputed) == (2, layers)


def test_recomputation_is_what_memory_demands_of_the_micro_batch_that_was_set(qwen_3b):
    config = settings(performance__micro_batch=8)
    layers = [make_plan(config, qwen_3b, gib * GIB).recomputed for gib in (3.5, 6, 9, 12, 80)]
    assert layers == sorted(layers, reverse=True) and layers[0] == 36 and layers[-1] == 0 and len(set(layers)) == 5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (1, 0)),
        ({"training__batch_size": 4}, (4, 0)),
        ({"training__batch_size": 4, "performance__micro_batch": 2}, (2, 0)),
        ({"training__gradient_checkpointing": True}, (1, 36)),
        ({"training__gradient_checkpointing": False}, (1, 0)),
    ],
    ids=str,
)
def test_without_a_limit_the_micro_batch_is_the_batch_size(qwen_3b, changes, expected):
    plan = make_plan(settings(**changes), qwen_3b, None)  # a CPU
    assert (plan.micro_batch, plan.recomputed) == expected
    assert plan.parts == {} and plan.peak == 0


@pytest.mark.parametrize("limit", [None, 8.0 * GIB])
def test_another_architecture_has_no_prediction_and_takes_the_batch_size(limit):
    assert make_plan(settings(training__batch_size=4), None, limit) == Plan(4, 0, {})
    fit.check_fit(Plan(4, 0, {}), Config(), None, limit)  # and nobody is refused for it


def test_the_librarys_layers_have_no_prediction(qwen_3b):
    config = settings(performance__fused_lora=False, training__batch_size=2)
    plan = make_plan(config, qwen_3b, 8 * GIB)
    assert plan == Plan(2, 36, {})  # recomputation on a GPU, for want of knowing better
    fit.check_fit(plan, config, qwen_3b, 8 * GIB)


# When it does not fit


def apply(config: Config, remedy: str) -> Config:
    """The config with the flags of a remedy."""
    words = (
        remedy.partition(": ")[2]
        .replace("--rank ", "--set lora.rank=")
        .replace("--max_length ", "--set data.max_length=")
        .split()
    )
    assert words[::2] == ["--set"] * (len(words) // 2)
    return override(config, parse_set(words[1::2]))


SAME_RESULT = {"performance.micro_batch", "training.gradient_checkpointing", "training.optim", "performance.offload_embedding"}


@pytest.mark.parametrize(
    ("changes", "gib", "expected"),
    [
        # Only what changes is named, and what leaves the result alone comes first.
        ({"performance__micro_batch": 16}, 2.6, "--set performance.micro_batch=auto"),
        ({"training__gradient_checkpointing": False}, 3, "--set training.gradient_checkpointing=auto"),
        ({"training__optim": "adamw_torch"}, 2.6, "--set training.optim=paged_adamw_32bit"),
        ({"training__optim": "adamw_8bit"}, 2.6, "--set training.optim=paged_adamw_8bit"),
        ({}, 2.4, "--set performance.offload_embedding=true"),
        ({"quantization__load_in_4bit": False}, 3, "--set quantization.load_in_4bit=true"),
        ({"quantization__compute_dtype": "float32"}, 3, "--set performance.offload_embedding=true"),
        (
            {"quantization__compute_dtype": "float32", "performance__offload_embedding": True},
            2.1,
            "--set quantization.compute_dtype=auto",
        ),
        ({"data__max_length": 4096}, 2.5, "--set performance.offload_embedding=true --max_length 2048"),
        ({}, 1.95, "--set performance.offload_embedding=true --max_length 256"),
        ({"lora__rank": 64, "data__max_length": 64}, 2.1, "--set performance.offload_embedding=true --rank 32"),
    ],
    ids=str,
)  # fmt: skip
def test_the_cheapest_change_that_fits(qwen_3b, changes, gib, expected):
    assert fit.remedy(settings(**changes), qwen_3b, gib * GIB) == f"the cheapest change that fits: {expected}"


@pytest.mark.parametrize("changes", [*RUNS, {"lora__rank": 2}, {"data__max_length": 32}], ids=str)
@pytest.mark.parametrize("gib", [1.0, 1.7, 1.8, 2.0, 2.2, 2.4, 3.0, 4.0])
def test_a_remedy_fits_takes_nothing_up_and_changes_the_result_only_when_it_must(shape, changes, gib):
    config = settings(**changes, performance__micro_batch="auto")
    change = fit.cheapest_change(config, shape, gib * GIB)
    if change is None:
        assert fit.remedy(config, shape, gib * GIB) == "no setting makes it fit: use a smaller base model"
        return
    if make_plan(config, shape, gib * GIB).peak <= gib * GIB:
        return  # it fits as it is
    again = apply(config, fit.remedy(config, shape, gib * GIB))
    assert make_plan(again, shape, gib * GIB).peak <= gib * GIB
    assert again.lora.rank <= config.lora.rank and again.data.max_length <= config.data.max_length
    changed = {key for key, value in change.items() if config.model_dump()[key.split(".")[0]][key.split(".")[1]] != value}
    if changed - SAME_RESULT:
        same = override(config, {"performance.offload_embedding": True, "training.optim": "paged_adamw_32bit"})
        assert make_plan(same, shape, gib * GIB).peak > gib * GIB


def test_a_run_that_cannot_fit_is_one_line_with_key_value_and_remedy(qwen_3b):
    config = settings(performance__vram_limit_gib=2.2)
    with pytest.raises(UserError) as refused:
        fit.check_fit(make_plan(config, qwen_3b, 2.2 * GIB), config, qwen_3b, 2.2 * GIB)
    (problem,) = refused.value.lines
    assert problem.startswith("performance.vram_limit_gib: 2.2: training Qwen/Qwen2.5-3B-Instruct needs 2.58 GiB")
    assert "1.33 of it for weights" in problem  # as in the table of parts
    assert problem.endswith("the cheapest change that fits: --set performance.offload_embedding=true")
    assert "\n" not in problem


def test_a_cap_below_what_the_weights_need_says_that_no_setting_helps(qwen_3b):
    config = settings(performance__vram_limit_gib=1)
    with pytest.raises(UserError, match=r"vram_limit_gib: 1\.0: .*no setting makes it fit: use a smaller base model"):
        fit.check_fit(make_plan(config, qwen_3b, 1.0 * GIB), config, qwen_3b, 1.0 * GIB)


def test_it_is_the_free_memory_that_is_named_where_the_cap_is_not_what_binds(qwen_3b):
    for config in (settings(performance__vram_limit_gib=8), Config()):
        with pytest.raises(UserError, match=r"^GPU memory: 2\.00 GiB free: training"):
            fit.check_fit(make_plan(config, qwen_3b, 2.0 * GIB), config, qwen_3b, 2.0 * GIB)


def test_only_what_cannot_fit_is_refused(qwen_3b):
    """A prediction may be 8 % too high: between the limit and 8 % above it, the run tries."""
    plan = make_plan(Config(), qwen_3b, 2.0 * GIB)
    fit.check_fit(plan, Config(), qwen_3b, plan.peak / 1.079)
    with pytest.raises(UserError):
        fit.check_fit(plan, Config(), qwen_3b, plan.peak / 1.081)
    fit.check_fit(plan, Config(), qwen_3b, None)  # a CPU


# The table


def test_the_table_adds_up_and_names_what_was_planned(qwen_3b):
    config = settings(performance__vram_limit_gib=8)
    plan = make_plan(config, qwen_3b, 8 * GIB)
    title, *rows, verdict = plan_table(plan, config, qwen_3b, 8 * GIB, "performance.vram_limit_gib").splitlines()
    assert title == (
        f"Qwen/Qwen2.5-3B-Instruct: {plan.micro_batch} x {16 // plan.micro_batch} sequences of 512 tokens, rank 16, "
        f"{plan.recomputed} of 36 layers recomputed"
    )
    shown = {row[2:28].strip(): float(row[28:].removesuffix(" GiB")) for row in rows}
    assert list(shown)[: len(plan.parts)] == list(plan.parts)
    assert sum(shown[name] for name in plan.parts) == pytest.approx(shown["sum: torch's allocator"], abs=0.05)
    assert shown["paged optimizer state"] == round(2 * 29_933_568 / GIB, 2)
    assert verdict == f"Fits: {plan.peak / GIB:.2f} of 8.00 GiB (performance.vram_limit_gib)."


def test_the_state_of_an_optimizer_that_is_not_paged_is_counted_once(qwen_3b):
    config = settings(training__optim="adamw_8bit")
    table = plan_table(make_plan(config, qwen_3b, 8 * GIB), config, qwen_3b, 8 * GIB, "a card")
    assert "optimizer state             0.06 GiB" in table and "paged optimizer state       0.00 GiB" in table


def test_the_verdict_follows_the_limit(qwen_3b):
    plan = make_plan(Config(), qwen_3b, 2.5 * GIB)
    for limit, word in ((plan.peak, "Fits: "), (plan.peak - 1, "Does not fit: ")):
        assert plan_table(plan, Config(), qwen_3b, limit, "a card").splitlines()[-1].startswith(word)


def test_an_untied_head_is_counted(qwen_3b):
    untied = replace(qwen_3b, tied_embedding=False)
    assert estimate(untied)["embedding and norms"] - estimate(qwen_3b)["embedding and norms"] == 2 * 151_936 * 2_048


# What the allocator would see


class LiveStorages(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

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
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.held)
        return out

    def _freed(self, key):
        self.held -= self.sizes.pop(key, 0)


@pytest.mark.parametrize(
    ("changes", "micro_batch", "recomputed"),
    [
        ({}, 4, 3),
        ({}, 4, 0),
        ({}, 8, 2),
        ({"intermediate_size": 1408}, 4, 3),
        ({"vocab_size": 16384}, 4, 3),
        ({"hidden_size": 256}, 4, 1),
    ],
    ids=str,
)
def test_a_micro_step_holds_what_is_predicted(changes, micro_batch, recomputed):
    """Not compiled, as on the CPU: every tensor of a real forward and backward pass, of shapes where tokens outweigh weights."""
    sizes = {"hidden_size": 128, "intermediate_size": 704, "vocab_size": 512} | changes
    built = Qwen2Config(**sizes, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16)
    model = prepare_model_for_training(model, create_lora_config(16), use_gradient_checkpointing=False)
    decoder = FastDecoder(model, recomputed, compiled=False)
    decoder.adapters.clear_gradients()
    ids, keys = torch.randint(512, (micro_batch, 256)), torch.zeros(3, 4, dtype=torch.int32)
    with LiveStorages() as measured:
        decoder.accumulate(ids, ids, torch.tensor(1e-3), keys)
    config = settings(data__max_length=256, performance__compile=False)
    parts = estimate_memory(read_shape(built.to_dict()), config, micro_batch, recomputed)
    predicted = parts["kept activations"] + parts["largest layer's workspace"] + parts["logits above that"]
    assert predicted == pytest.approx(measured.peak, rel=0.1)
