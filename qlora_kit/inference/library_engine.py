"""Prompts -> tokens, one step of all prompts at a time: which engine does it, and the one by the library's own `generate`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_kit.config import GenerationSettings
from qlora_kit.inference.sampling import penalise

LONGEST_TEXT = 8192  # tokens that an attention window must reach over, where the model's context is longer
Step = list[int | None]  # a prompt's next token; None once it has ended


def choose_engine(model: Any, pad_id: int | None) -> tuple[Any, str | None]:
    """The fast engine where it can serve, else the library's, and on a GPU why."""
    if model.device.type != "cuda":
        return LibraryEngine(model, pad_id), None
    from qlora_kit.inference.graph_engine import GraphEngine, why_not_decoded

    context = getattr(model.config, "max_position_embeddings", None) or LONGEST_TEXT
    if reason := why_not_decoded(model, min(context, LONGEST_TEXT)):
        return LibraryEngine(model, pad_id), f"Answers are written by the library's generate ({reason}), which is slower"
    return GraphEngine(model, captured=True), None


class LibraryEngine:
    """Any model that the library can load. fast/decode.py does the same faster for those that it covers."""

    def __init__(self, model: Any, pad_id: int | None):
        self.model, self.pad_id = model.eval(), pad_id or 0

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together at most; None where the model states none."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def steps(self, prompts: list[list[int]], settings: GenerationSettings, seed: int, stop_ids: list[int]) -> Iterator[Step]:
        """The same prompts, settings and seed give the same tokens, whatever came before.

        A prompt's stop token is its last; `settings.max_new_tokens` steps at most. Closing the iterator stops the work.
        """
        ids, mask = _padded_left(prompts, self.pad_id, self.model.device)
        streamer, stopping = _Tokens(), Event()

        def work() -> None:
            try:
                torch.manual_seed(seed)
                stop = StoppingCriteriaList([lambda seen, scores: torch.full((len(seen),), stopping.is_set(), device=ids.device)])
                penalty = LogitsProcessorList([_Penalty(settings.repetition_penalty, mask.argmax(1).tolist(), stop_ids)])
                with torch.inference_mode():
                    self.model.generate(
                        input_ids=ids, attention_mask=mask, streamer=streamer, stopping_criteria=stop, logits_processor=penalty,
                        eos_token_id=stop_ids, pad_token_id=self.pad_id, **_library_settings(settings),
                    )  # fmt: skip
                streamer.queue.put(None)
            except BaseException as error:  # raised again below, in the thread that can answer it
                streamer.queue.put(error)

        worker = Thread(target=work)
        worker.start()
        try:
            yield from _until_ended(streamer, len(prompts), stop_ids)
        finally:  # also when the reader stops listening
            stopping.set()
            worker.join()

    def adapter_off(self) -> AbstractContextManager:
        """The base model alone, while the context lasts."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()


class _Penalty(LogitsProcessor):
    """fast/sampling.py's repetition penalty within `generate`.

    Args:
        begins: of each row, where its prompt begins behind the padding.
    """

    def __init__(self, penalty: float, begins: list[int], stop_ids: list[int]):
        self.penalty, self.begins = penalty, begins
        self.stop_ids = [token for token in stop_ids if token >= 0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if self.penalty == 1:
            return scores
        seen = torch.zeros_like(scores, dtype=torch.bool)
        for row, begin in enumerate(self.begins):
            seen[row, input_ids[row, begin:]] = True
        seen[:, self.stop_ids] = False
        return penalise(scores, seen, self.penalty)


class _Tokens(BaseStreamer):
    """Hands each step's tokens to another thread."""

    def __init__(self) -> None:
        self.queue: SimpleQueue = SimpleQueue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.queue.put(value.tolist())
        self.prompt_seen = True  # the first call brings the prompts

    def end(self) -> None:
        pass


def _until_ended(streamer: _Tokens, count: int, stop_ids: list[int]) -> Iterator[Step]:
    ended = [False] * count
    while (step := streamer.queue.get()) is not None:
        if isinstance(step, BaseException):
            raise step
        yield [None if done else token for token, done in zip(step, ended, strict=True)]
        ended = [done or token in stop_ids for token, done in zip(step, ended, strict=True)]


def _padded_left(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and attention mask, (B, longest), shorter prompts to the right."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def _library_settings(settings: GenerationSettings) -> dict[str, Any]:
    greedy = settings.temperature == 0
    sampling = {name: None if greedy else getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    return {
        "do_sample": not greedy, "max_new_tokens": settings.max_new_tokens, "repetition_penalty": None, **sampling,
    }  # fmt: skip
