"""Share one loaded adapter and the command's text mode."""

import pytest

import inference_example
from qlora_kit.config import GenerationSettings
from qlora_kit.inference.generator import Generator


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="session")
def greedy(adapter) -> Generator:
    """Return the trained adapter, loaded, with greedy answers of 12 tokens."""
    settings = {"max_new_tokens": 12, "temperature": 0.0, "repetition_penalty": 1.0}
    return inference_example.load_generator(adapter, device="cpu", settings=settings)


@pytest.fixture
def sampled(greedy):
    """Return a function that gives the loaded adapter other settings: by default, sampled answers of 12 tokens."""

    def build(seed: int = 1, **settings) -> Generator:
        chosen = GenerationSettings(**{"max_new_tokens": 12, "temperature": 1.0} | settings)
        return Generator(greedy.engine, greedy.encoder, chosen, seed)

    return build


@pytest.fixture
def text_mode(adapter, capsys):
    """Return a function that runs --mode text for answers of 8 tokens and returns its standard output."""

    def run(*flags: str) -> str:
        always = ["--mode", "text", "--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "8"]
        inference_example.main([*always, *flags])
        return capsys.readouterr().out

    return run
