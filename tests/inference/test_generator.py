"""Check answers against plain forward passes, and streaming at every cut."""

import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from qlora_kit.config import GenerationSettings
from qlora_kit.errors import UserError
from qlora_kit.inference.generator import Generator, replace_settings
from qlora_kit.inference.library_engine import LibraryEngine
from qlora_kit.inference.prompts import PromptEncoder

PROMPT = "The river"
MANY = ["The river", "A lighthouse is in the", "In the spring of that year the city had begun to", "x", "The"]


def test_temperature_0_takes_the_likeliest_token_each_time(greedy):
    """Compare with a loop over plain forward passes, without generate() and without a cache."""
    ids = greedy.encoder.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, greedy.engine.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    answer = greedy.answer(PROMPT)
    assert answer.text == greedy.encoder.tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert answer.text == greedy.answer(PROMPT).text
    assert answer.tokens == 12 and answer.tokens_per_second > 0


def test_a_seed_gives_the_same_text_whatever_was_answered_before(sampled):
    generator = sampled(seed=1)
    first = generator.answer(PROMPT).text
    generator.answer("something else")
    torch.rand(7)
    assert generator.answer(PROMPT).text == first
    assert sampled(seed=1).answer(PROMPT).text == first
    assert any(sampled(seed=seed).answer(PROMPT).text != first for seed in (2, 3))


def test_streamed_pieces_add_up_to_the_complete_text(greedy, sampled):
    generator = sampled(max_new_tokens=40)
    pieces = list(generator.stream(greedy.encode(PROMPT)))
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == generator.answer(PROMPT).text


def test_a_text_ends_at_the_separator(greedy):
    """The separator is not the tokenizer's end-of-sequence token, and is not printed."""
    separator = greedy.encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert separator in greedy.encoder.stop_ids and greedy.encoder.tokenizer.eos_token_id in greedy.encoder.stop_ids
    ids = greedy.encode(PROMPT)
    likeliest = greedy.engine.model(torch.tensor([ids])).logits[0, -1].argmax().item()
    as_if_separator = replace(greedy.encoder, stop_ids=[likeliest])
    ending = Generator(greedy.engine, as_if_separator, greedy.settings)
    assert ending.answer(PROMPT).tokens == 1


def test_closing_a_stream_early_ends_its_thread(greedy, sampled):
    before = set(threading.enumerate())
    stream = sampled(max_new_tokens=500).stream(greedy.encode(PROMPT))
    next(stream)
    assert set(threading.enumerate()) != before
    stream.close()
    assert set(threading.enumerate()) == before


def test_an_error_while_streaming_reaches_the_reader(greedy, monkeypatch):
    def fails(*arguments, **rest):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(greedy.engine.model, "generate", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(greedy.stream(greedy.encode(PROMPT)))


@pytest.mark.parametrize("repetition_penalty", [1.0, 3.0])
def test_a_greedy_answer_does_not_depend_on_its_batch(greedy, repetition_penalty, sampled):
    """Use a padding token that an answer begins with: the repetition penalty must not count the padding of shorter prompts."""
    alone = sampled(temperature=0.0, repetition_penalty=repetition_penalty, max_new_tokens=20)
    expected = [alone.answer(prompt).text for prompt in MANY]
    (first,) = next(alone.engine.steps([alone.encode(MANY[0])], alone.settings, 1, []))
    engine = LibraryEngine(greedy.engine.model, pad_id=first)
    batch = Generator(engine, alone.encoder, alone.settings, seed=1)
    assert [answer.text for answer in batch.complete([batch.encode(prompt) for prompt in MANY])] == expected


@pytest.fixture(scope="module", params=["tiny", "Qwen2.5"])
def tokenizer(request, tiny_dir):
    return AutoTokenizer.from_pretrained(
        request.getfixturevalue("qwen_tokenizer_dir") if request.param == "Qwen2.5" else tiny_dir
    )


class Script:
    """An engine that answers with given tokens."""

    context = 1024

    def __init__(self, *ids: int):
        self.ids = ids

    def steps(self, prompts, settings, seed, stop_ids):
        yield from ([number] for number in self.ids)

    def adapter_off(self):
        return nullcontext()


def scripted(tokenizer, *ids: int) -> Generator:
    return Generator(Script(*ids), PromptEncoder(tokenizer), GenerationSettings())


@pytest.mark.parametrize("text", ["👩‍👩‍👧 familie", "日本語の文", "naïve – ½ ℵ 𓂀"])
def test_no_piece_ends_within_a_character(tokenizer, text):
    """Cut the answer after each of its tokens: the pieces then add up to a beginning of the text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for length in range(1, len(ids) + 1):
        generator = scripted(tokenizer, *ids[:length])
        streamed = "".join(generator.stream([1]))
        assert text.startswith(streamed) and generator.last.text == streamed
    assert streamed == text and len(ids) > 1


def test_each_token_yields_a_piece_even_without_text(tokenizer):
    """Otherwise a reader could not stop an answer of incomplete characters: here the first token of a hieroglyph, repeated."""
    first, *_ = tokenizer("𓂀", add_special_tokens=False)["input_ids"]
    assert list(scripted(tokenizer, first, first, first).stream([1]))[:3] == ["", "", ""]


def test_settings_and_seed_of_one_stream_leave_the_generators_own(sampled):
    generator = sampled(seed=1)
    own = generator.settings
    short = own.model_copy(update={"max_new_tokens": 3})
    other = "".join(generator.stream(generator.encode(PROMPT), short, seed=2))
    assert generator.last.tokens == 3 and (generator.settings, generator.seed) == (own, 1)
    assert other == sampled(seed=2, max_new_tokens=3).answer(PROMPT).text


def test_wrong_settings_are_one_error_with_a_problem_for_each_key():
    changes = {"temperature": "-1", "top_p": 2, "temprature": 1}
    with pytest.raises(UserError) as error:
        replace_settings(GenerationSettings(temperature=0.5), changes, "--")
    problems = {problem.key: problem for problem in error.value.problems}
    assert set(problems) == {"--temperature", "--top_p", "--temprature"}
    assert problems["--temperature"].remedy == "use another value, or keep 0.5"
    assert "did you mean" in problems["--temprature"].problem
    assert all("command line" not in line for line in error.value.lines)
