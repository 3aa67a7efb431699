"""Base model + adapter -> text, streamed or whole.

What an adapter's folder says decides how it is loaded: run.json (written by train_qlora.py) names base model, revision,
quantization and prompt style; a plain PEFT adapter names its base model, and the rest takes the defaults.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint import ADAPTER_FILES, CONFIG, PASSPORT
from qlora_kit.config import UserError, load_config
from qlora_kit.hub import read_json
from qlora_kit.settings import Config, GenerationSettings, ModelConfig, QuantizationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Beginnings that fit an adapter of running text; the first two have Wikitext's form.
DEMO_PROMPTS = [
    " = Lighthouse = \n \n A lighthouse is",
    " = River = \n \n A river is a",
    "The history of the city begins",
    "In the spring of that year",
]


@dataclass(frozen=True)
class AdapterSource:
    """What an adapter's folder says about how to load and prompt it."""

    folder: Path
    model: ModelConfig
    quantization: QuantizationConfig
    config: Config  # the run's resolved settings; of these, `generation` holds the defaults of answers
    separator_id: int | None  # ends a text
    complete: bool  # False: a plain PEFT adapter, whose quantization and prompt style are unknown


def read_adapter(name: str) -> AdapterSource:
    """Read what an adapter's folder says.

    Raises:
        UserError: no such folder, no adapter in it, or a file that cannot be read.
    """
    folder = _adapter_folder(name)
    key = f"--adapter {name}"
    settings = load_config(folder / CONFIG) if (folder / CONFIG).is_file() else Config()
    if (folder / PASSPORT).is_file():
        return _by_passport(folder, read_json(folder / PASSPORT, key), settings, key)
    base = read_json(folder / ADAPTER_FILES[1], key).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{key}: its adapter_config.json names no base model; add base_model_name_or_path")
    return AdapterSource(folder, ModelConfig(name=base), settings.quantization, settings, None, complete=False)


def _adapter_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    key = f"--adapter {name}"
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder; train one: python train_qlora.py --output_dir {name}")
    missing = [file for file in ADAPTER_FILES if not (folder / file).is_file()]
    if missing:
        newest = sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = (
            f"its run is unfinished: continue it with --resume, or use {newest[-1]}"
            if newest
            else "name a folder that train_qlora.py finished"
        )
        raise UserError(f"{key}: no adapter there ({missing[0]} not found); {hint}")
    return folder


def _by_passport(folder: Path, passport: dict[str, Any], settings: Config, key: str) -> AdapterSource:
    try:
        base = passport["base_model"]
        name = base["name"] if not base["folder"] or Path(base["name"]).is_dir() else base["folder"]
        return AdapterSource(
            folder=folder,
            model=ModelConfig(name=name, revision=base["revision"], trust_remote_code=passport["trust_remote_code"]),
            quantization=QuantizationConfig(**passport["quantization"]),
            config=settings,
            separator_id=passport["separator_id"],
            complete=True,
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}: its run.json is damaged ({reason}); copy it again, or delete it to load a plain adapter"
        ) from None


@dataclass(frozen=True)
class Generated:
    text: str  # the continuation alone
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Generator:
    """A loaded model, its tokenizer and the settings of its answers."""

    def __init__(
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", settings: GenerationSettings, separator_id: int | None, seed: int
    ):
        self.model, self.tokenizer, self.settings, self.seed = model.eval(), tokenizer, settings, seed
        stops = {tokenizer.eos_token_id, separator_id}
        self.stop_ids = sorted(number for number in stops if number is not None)

    def encode(self, prompt: str) -> Any:
        """(1, tokens). Raises UserError for a prompt without tokens or beyond the model's context."""
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if ids.shape[1] == 0:
            raise UserError("--prompt: the prompt is empty; give it some text")
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room and ids.shape[1] + self.settings.max_new_tokens > room:
            raise UserError(
                f"--prompt: {ids.shape[1]} tokens and {self.settings.max_new_tokens} new ones exceed the model's context "
                f"of {room}; shorten the prompt or use a smaller --max_new_tokens"
            )
        return ids.to(self.model.device)

    def stream(self, prompt: str) -> Iterator[str]:
        """Pieces of the continuation as they come; whole words, so that no character is ever split."""
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        ids = self.encode(prompt)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopping, failures = Event(), []

        def work() -> None:
            try:
                self._run(ids, streamer=streamer, stopping_criteria=StoppingCriteriaList([lambda *state: stopping.is_set()]))
            except BaseException as error:  # raised again below, in the thread that can answer it
                failures.append(error)
                streamer.end()

        worker = Thread(target=work)
        worker.start()
        try:
            yield from streamer
        finally:  # also when the reader stops listening
            stopping.set()
            worker.join()
        if failures:
            raise failures[0]

    def complete(self, prompt: str) -> Generated:
        ids = self.encode(prompt)
        started = time.perf_counter()
        output = self._run(ids)
        new = output[0, ids.shape[1] :]
        return Generated(str(self.tokenizer.decode(new, skip_special_tokens=True)), len(new), time.perf_counter() - started)

    def _run(self, ids: Any, **extra: Any) -> Any:
        import torch

        settings = self.settings
        greedy = settings.temperature == 0
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        torch.manual_seed(self.seed)  # the same prompt and seed give the same text, whatever came before
        with torch.inference_mode():
            return self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.max_new_tokens,
                repetition_penalty=settings.repetition_penalty,
                do_sample=not greedy,
                **({"temperature": None, "top_p": None, "top_k": None} if greedy else sampling),
                eos_token_id=self.stop_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                **extra,
            )
