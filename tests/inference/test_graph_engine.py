"""GraphEngine against decoding without a cache, and against the library's `generate`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from qlora_kit.inference import graph_engine
from qlora_kit.inference.graph_engine import GraphEngine, why_not_decoded
from qlora_kit.inference.library_engine import LibraryEngine
from tests.inference.engines import PROMPTS, answer, decode_without_cache, greedy, load_adapted


@pytest.fixture(scope="module")
def model(two_layers_dir):
    return load_adapted(two_layers_dir)


def test_greedy_answers_are_the_librarys_token_for_token(model):
    engine = GraphEngine(model, captured=False)
    expected = [decode_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert answer(engine, PROMPTS, greedy(), stop_ids=[-1]) == expected
    for prompt, alone in zip(PROMPTS, expected, strict=True):
        assert answer(engine, [prompt], greedy(), stop_ids=[-1]) == [alone]
        assert answer(LibraryEngine(model, 0), [prompt], greedy(), stop_ids=[-1]) == [alone]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_the_librarys(model, penalty):
    settings = greedy(repetition_penalty=penalty, max_new_tokens=30)
    expected = answer(LibraryEngine(model, 0), PROMPTS[:1], settings)
    assert answer(GraphEngine(model, captured=False), PROMPTS[:1], settings) == expected
    assert expected != answer(GraphEngine(model, captured=False), PROMPTS[:1], greedy(max_new_tokens=30))


def test_a_token_that_ends_an_answer_is_never_penalised(model):
    """A chat prompt contains one: penalised, the answer would hardly ever end."""
    engine = GraphEngine(model, captured=False)
    next(engine.steps([[3, 5, 7, 9]], greedy(repetition_penalty=1.5, max_new_tokens=1), 0, [5]))
    (batch,) = engine.batches.values()
    assert set(batch.seen[0].nonzero()[:, 0].tolist()) - {int(batch.token)} == {3, 7, 9}


def test_a_prompt_that_is_read_in_chunks_has_the_same_answer(model, monkeypatch):
    expected = answer(GraphEngine(model, captured=False), PROMPTS, greedy())
    monkeypatch.setattr(graph_engine, "PREFILL_TOKENS", 28)  # seven of each prompt
    assert answer(GraphEngine(model, captured=False), PROMPTS, greedy()) == expected


def test_an_answer_ends_with_its_stop_token_while_others_continue(model):
    engine = GraphEngine(model, captured=False)
    endless = answer(engine, PROMPTS, greedy(), stop_ids=[-1])
    stop = endless[0][4]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in endless]
    assert answer(engine, PROMPTS, greedy(), stop_ids=[stop]) == expected
    assert answer(LibraryEngine(model, 0), PROMPTS, greedy(), stop_ids=[stop]) == expected


def test_with_the_adapter_off_the_base_model_answers(model):
    engine = GraphEngine(model, captured=False)
    adapted = answer(engine, PROMPTS, greedy())
    with model.disable_adapter(), engine.adapter_off():
        expected = answer(LibraryEngine(model, 0), PROMPTS[:1], greedy())
        assert answer(engine, PROMPTS, greedy())[:1] == expected
    assert answer(engine, PROMPTS, greedy()) == adapted and adapted[:1] != expected


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj"], ["k_proj", "up_proj", "down_proj"]], ids=str)
def test_some_projections_may_have_no_adapter(two_layers_dir, targets):
    partly = load_adapted(two_layers_dir, targets)
    expected = decode_without_cache(partly, PROMPTS[2], 12)
    assert answer(GraphEngine(partly, captured=False), [PROMPTS[2]], greedy()) == [expected]


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_other_llama_like_models_without_quantization_are_covered(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
    base = AutoModelForCausalLM.from_config(kind(**sizes, num_key_value_heads=2, head_dim=32)).eval()
    base.requires_grad_(False)
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert why_not_decoded(base, 64) is None
    expected = decode_without_cache(base, [5, 6, 7], 12)
    assert answer(GraphEngine(base, captured=False), [[5, 6, 7]], greedy(), stop_ids=[-1]) == [expected]


def test_a_seed_gives_an_answer_whatever_the_other_prompts_are(model):
    engine, settings = GraphEngine(model, captured=False), greedy(temperature=1.0, top_k=0, top_p=1.0)
    alone = answer(engine, PROMPTS[:1], settings, seed=5)
    assert answer(engine, PROMPTS, settings, seed=5)[:1] == alone
    assert answer(engine, PROMPTS[:1], settings, seed=6) != alone


def test_a_model_that_is_not_covered_has_a_reason(two_layers_dir):
    assert why_not_decoded(load_adapted(two_layers_dir), 64) is None
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    angles = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, intermediate_size=64, rope_parameters=angles))
    assert "angles (dynamic)" in why_not_decoded(dynamic, 64)
    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    assert "not built like Llama" in why_not_decoded(other, 64)
    spread = load_adapted(two_layers_dir)
    spread.get_base_model().model.norm.to("meta")
    assert "several devices" in why_not_decoded(spread, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnTheGpu:
    def test_captured_answers_are_the_librarys(self, tiny_dir):
        """In fp32, where rounding does not decide between two tokens; twice, so that a graph is replayed in a second answer."""
        model = load_adapted(tiny_dir, device="cuda")
        engine = GraphEngine(model, captured=True)
        expected = [decode_without_cache(model, prompt, 12) for prompt in PROMPTS]
        for _ in range(2):
            assert answer(engine, PROMPTS, greedy(), stop_ids=[-1]) == expected
        with engine.adapter_off(), model.disable_adapter():
            assert answer(engine, PROMPTS, greedy(), stop_ids=[-1])[0] == decode_without_cache(model, PROMPTS[0], 12)

    @pytest.mark.parametrize("settings", [greedy(), greedy(temperature=1.0, repetition_penalty=1.2)], ids=["greedy", "sampled"])
    def test_a_graph_answers_as_its_kernels_one_by_one(self, tiny_dir, settings):
        model = load_adapted(tiny_dir, device="cuda", dtype=torch.bfloat16)
        expected = answer(GraphEngine(model, captured=False), PROMPTS, settings, seed=3)
        assert answer(GraphEngine(model, captured=True), PROMPTS, settings, seed=3) == expected
