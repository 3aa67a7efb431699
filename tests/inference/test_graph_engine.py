"""Answers a token at a time against the library's `generate`."""

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from qlora_kit.config import GenerationSettings
from qlora_kit.fast.llama_parts import ProjectionGroup
from qlora_kit.fast.projection import Lora
from qlora_kit.inference import graph_engine, library_engine, token_kernels
from qlora_kit.inference.graph_engine import GraphEngine, why_not_decoded
from qlora_kit.inference.library_engine import LibraryEngine
from qlora_kit.inference.sampling import Sampling, choose
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training

PROMPTS = [[100, 200, 300, 400, 500], [7], list(range(50, 90)), [1000, 2000]]


def adapted(folder, targets=None, four_bits=True):
    bnb = create_bnb_config(compute_dtype=torch.float32) if four_bits else None
    model, _ = load_model_and_tokenizer(str(folder), bnb, device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    lora = create_lora_config(4, 16.0, 0.05, targets) if targets else create_lora_config(4, 16.0, 0.05)
    model = prepare_model_for_training(model, lora, use_gradient_checkpointing=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_dir) -> PeftModel:
    return adapted(tiny_dir)


def greedy(**changes) -> GenerationSettings:
    return GenerationSettings(**{"max_new_tokens": 12, "temperature": 0.0, "repetition_penalty": 1.0} | changes)


def answers(engine, prompts, settings, seed=0, stop_ids=(3,)):
    steps = list(engine.steps(prompts, settings, seed, list(stop_ids)))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def by_hand(model, prompt, count):
    """Without a cache and without padding."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_greedy_answers_are_the_librarys_token_for_token(model):
    engine = GraphEngine(model, captured=False)
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert answers(engine, PROMPTS, greedy(), stop_ids=[-1]) == expected
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        assert answers(engine, [prompt], greedy(), stop_ids=[-1]) == [answer]
        assert answers(LibraryEngine(model, 0), [prompt], greedy(), stop_ids=[-1]) == [answer]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_the_librarys(model, penalty):
    settings = greedy(repetition_penalty=penalty, max_new_tokens=30)
    expected = answers(LibraryEngine(model, 0), PROMPTS[:1], settings)
    assert answers(GraphEngine(model, captured=False), PROMPTS[:1], settings) == expected
    assert expected != answers(GraphEngine(model, captured=False), PROMPTS[:1], greedy(max_new_tokens=30))


def test_the_end_of_a_turn_is_never_penalised(model):
    """A chat's prompt holds one: as `generate` counts, the answer would hardly end. All else is as the library has it."""
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, stop = [3, 5, 7, 9], 5
    logits = model(torch.tensor([prompt])).logits[:, -1].detach()
    logits[0, stop] = logits.max() + 0.5  # likeliest by little: penalised, it is not
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt]), logits.clone())
    assert expected.argmax() != stop
    expected[0, stop] = logits[0, stop]
    for begins, ids in (([0], [prompt]), ([2], [[8, 8, *prompt]])):  # also behind padding
        actual = library_engine._Penalty(1.5, begins, [stop])(torch.tensor(ids), logits.clone())
        torch.testing.assert_close(actual, expected)
    engine = GraphEngine(model, captured=False)
    next(engine.steps([prompt], greedy(repetition_penalty=1.5, max_new_tokens=1), 0, [stop]))
    (lines,) = engine.lines.values()
    assert set(lines.seen[0].nonzero()[:, 0].tolist()) - {int(lines.token)} == {3, 7, 9}


def test_a_prompt_is_read_in_chunks_as_at_once(model, monkeypatch):
    expected = answers(GraphEngine(model, captured=False), PROMPTS, greedy())
    monkeypatch.setattr(graph_engine, "CHUNK_TOKENS", 28)  # seven of each prompt
    assert answers(GraphEngine(model, captured=False), PROMPTS, greedy()) == expected


def test_an_answer_ends_with_its_stop_token_while_others_go_on(model):
    engine = GraphEngine(model, captured=False)
    whole = answers(engine, PROMPTS, greedy(), stop_ids=[-1])
    stop = whole[0][4]
    at = [row.index(stop) + 1 if stop in row else 12 for row in whole]
    assert answers(engine, PROMPTS, greedy(), stop_ids=[stop]) == [row[:end] for row, end in zip(whole, at, strict=True)]
    assert answers(LibraryEngine(model, 0), PROMPTS, greedy(), stop_ids=[stop]) == [
        row[:end] for row, end in zip(whole, at, strict=True)
    ]


def test_without_the_adapter_it_is_the_base_model(model):
    engine = GraphEngine(model, captured=False)
    with_adapter = answers(engine, PROMPTS, greedy())
    with model.disable_adapter(), engine.adapter_off():
        expected = answers(LibraryEngine(model, 0), PROMPTS[:1], greedy())
        assert answers(engine, PROMPTS, greedy())[:1] == expected
    assert answers(engine, PROMPTS, greedy()) == with_adapter and with_adapter[:1] != expected


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj"], ["k_proj", "up_proj", "down_proj"]], ids=str)
def test_some_projections_may_have_no_adapter(tiny_dir, targets):
    partly = adapted(tiny_dir, targets)
    assert answers(GraphEngine(partly, captured=False), [PROMPTS[2]], greedy()) == [by_hand(partly, PROMPTS[2], 12)]


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_kin_and_16_bit_models(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
    base = AutoModelForCausalLM.from_config(kind(**sizes, num_key_value_heads=2, head_dim=32)).eval()
    base.requires_grad_(False)
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert why_not_decoded(base, 64) is None
    assert answers(GraphEngine(base, captured=False), [[5, 6, 7]], greedy(), stop_ids=[-1]) == [by_hand(base, [5, 6, 7], 12)]


# Sampling


def test_the_same_seed_gives_the_same_answer_whatever_is_written_beside_it(model):
    engine, settings = GraphEngine(model, captured=False), greedy(temperature=1.0, top_k=0, top_p=1.0)
    alone = answers(engine, PROMPTS[:1], settings, seed=5)
    assert answers(engine, PROMPTS, settings, seed=5)[:1] == alone
    assert answers(engine, PROMPTS[:1], settings, seed=6) != alone


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7, "temperature": 0.5}, {}], ids=str)
def test_tokens_are_drawn_as_often_as_the_librarys_processors_say(changes):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    settings = {"temperature": 1.5, "top_k": 0, "top_p": 1.0} | changes
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0, 0.5]])
    expected = TemperatureLogitsWarper(settings["temperature"])(None, logits.clone())
    if settings["top_k"]:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    expected = (
        TopPLogitsWarper(settings["top_p"])(None, expected).softmax(1)[0] if settings["top_p"] < 1 else expected.softmax(1)[0]
    )
    count, one = 2000, torch.ones(())
    drawn = [
        choose(logits, torch.zeros(1, 6, dtype=torch.bool), torch.tensor([(n + 0.5) / count]), one * settings["temperature"],
               one * settings["top_p"], one, Sampling(False, settings["top_k"], False)).item()
        for n in range(count)
    ]  # fmt: skip
    shares = torch.bincount(torch.tensor(drawn), minlength=6) / count
    torch.testing.assert_close(shares, expected, atol=1.5 / count, rtol=0)


def test_the_reason_against_it_is_said(tiny_dir):
    assert why_not_decoded(adapted(tiny_dir), 64) is None
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    angles = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    stretched = AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, intermediate_size=64, rope_parameters=angles)
    ).requires_grad_(False)
    assert "angles (dynamic)" in why_not_decoded(stretched, 64)
    from transformers import GPT2Config

    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    assert "not built like Llama" in why_not_decoded(other, 64)
    in_parts = adapted(tiny_dir)
    in_parts.get_base_model().model.norm.to("meta")
    assert "several devices" in why_not_decoded(in_parts, 64)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class TestOnTheGpu:
    pytestmark = needs_gpu

    def on_gpu(self, tiny_dir, dtype):
        bnb = create_bnb_config(compute_dtype=dtype)
        model, _ = load_model_and_tokenizer(str(tiny_dir), bnb, device="cuda", dtype=dtype)
        torch.manual_seed(0)
        model = prepare_model_for_training(model, create_lora_config(4, 16.0, 0.05), use_gradient_checkpointing=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    def test_captured_answers_are_the_librarys(self, tiny_dir):
        """In fp32, where no rounding decides between two tokens; twice, so that a graph is used again."""
        model = self.on_gpu(tiny_dir, torch.float32)
        engine = GraphEngine(model, captured=True)
        expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
        for _ in range(2):
            assert answers(engine, PROMPTS, greedy(), stop_ids=[-1]) == expected
        with engine.adapter_off(), model.disable_adapter():
            assert answers(engine, PROMPTS, greedy(), stop_ids=[-1])[0] == by_hand(model, PROMPTS[0], 12)

    @pytest.mark.parametrize("settings", [greedy(), greedy(temperature=1.0, repetition_penalty=1.2)], ids=["greedy", "sampled"])
    def test_a_graph_answers_as_its_kernels_one_by_one(self, tiny_dir, settings):
        model = self.on_gpu(tiny_dir, torch.bfloat16)
        expected = answers(GraphEngine(model, captured=False), PROMPTS, settings, seed=3)
        assert answers(GraphEngine(model, captured=True), PROMPTS, settings, seed=3) == expected

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize(
        "sizes, fan_in, rank", [((48, 16, 16), 192, 4), ((5504, 5504), 2048, 16), ((2048,), 11008, 0)], ids=str
    )
    def test_the_product_is_that_of_the_unpacked_weights(self, rows, sizes, fan_in, rank):
        torch.manual_seed(0)
        weights = []
        for size in sizes:
            w = torch.randn(size, fan_in, device="cuda", dtype=torch.bfloat16) / 20
            packed, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
            packed.quant_state = state
            weights.append(packed)
        adapter = None
        if rank:
            A = (torch.randn(rank * len(sizes), fan_in, device="cuda") / 20).bfloat16()
            adapter = Lora(
                A, tuple(torch.randn(size, rank, device="cuda").bfloat16() for size in sizes), sizes, scale=1.0, keep=1.0
            )
        bias = torch.randn(sum(sizes), device="cuda").bfloat16()
        x = torch.randn(rows, fan_in, device="cuda").bfloat16()
        actual = token_kernels.product(x, ProjectionGroup(tuple(weights), bias, sizes, adapter, None))
        whole = torch.cat([bitsandbytes.functional.dequantize_4bit(w, w.quant_state) for w in weights]).double()
        expected = x.double() @ whole.T + bias.double()
        if adapter:
            xa = (x @ adapter.A.T).double().split(rank, 1)
            expected += torch.cat([part @ b.double().T for part, b in zip(xa, adapter.B, strict=True)], 1)
        torch.testing.assert_close(actual.double(), expected, rtol=4e-3, atol=4e-3 * expected.abs().max().item())
