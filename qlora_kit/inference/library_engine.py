"""The choice of an engine, and transformers' `generate` as an engine: prompts -> tokens, one step of all prompts at a time."""

from collections.abc import Generator
from itertools import zip_longest
from queue import SimpleQueue
from threading import Event, Thread

import torch
from peft import PeftModel
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_kit.config import GenerationSettings
from qlora_kit.errors import Failed
from qlora_kit.inference.generator import Engine
from qlora_kit.inference.graph_engine import GraphEngine, why_not_decoded
from qlora_kit.inference.sampling import penalise
from qlora_kit.model.records import longest_short_text

LONGEST_TEXT = 8192  # tokens; GraphEngine needs an attention window over the model's context, or over this if it is shorter


def choose_engine(model: PreTrainedModel | PeftModel, pad_id: int | None) -> tuple[Engine, str | None]:
    """Return GraphEngine if it covers a model on a GPU, else LibraryEngine and, on a GPU, a line for the user that says why."""
    if model.device.type != "cuda":
        return LibraryEngine(model, pad_id), None
    context = getattr(model.config, "max_position_embeddings", None) or LONGEST_TEXT
    if reason := why_not_decoded(model, min(context, LONGEST_TEXT)):
        return LibraryEngine(model, pad_id), f"Answers are written by the library's generate ({reason}), which is slower"
    return GraphEngine(model, captured=True), None


class LibraryEngine(Engine):
    """Decode any model that the library can load; graph_engine.GraphEngine is faster for those that it covers."""

    def __init__(self, model: PreTrainedModel | PeftModel, pad_id: int | None):
        self.model, self.pad_id = model.eval(), pad_id or 0

    def steps(
        self, prompts: list[list[int]], settings: GenerationSettings, seed: int, stop_ids: list[int]
    ) -> Generator[list[int]]:
        longest = max(map(len, prompts)) + settings.max_new_tokens
        if len({*map(len, prompts)}) > 1 and longest_short_text(self.model.config.get_text_config(), longest):
            # The library would choose the rotary angles of all by the longest.
            alone = [list(self.steps([prompt], settings, seed, stop_ids)) for prompt in prompts]
            yield from ([own[0] for own in step] for step in zip_longest(*alone, fillvalue=stop_ids[:1]))
            return
        ids, mask = _pad_left(prompts, self.pad_id, self.model.device)
        greedy = settings.temperature == 0
        sampling = {name: None if greedy else getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
        streamer, stopping = _StepQueue(), Event()

        def decode() -> None:
            try:
                torch.manual_seed(seed)
                stop = StoppingCriteriaList([lambda seen, scores: torch.full((len(seen),), stopping.is_set(), device=ids.device)])
                penalty = LogitsProcessorList([_Penalty(settings.repetition_penalty, mask.argmax(1).tolist(), stop_ids)])
                with torch.inference_mode():
                    self.model.generate(
                        input_ids=ids, attention_mask=mask, streamer=streamer, stopping_criteria=stop, logits_processor=penalty,
                        eos_token_id=stop_ids, pad_token_id=self.pad_id, max_new_tokens=settings.max_new_tokens,
                        repetition_penalty=None, do_sample=not greedy, **sampling,
                    )  # fmt: skip
            except BaseException as error:  # raised again below, in the reader's thread
                streamer.queue.put(error)

        worker = Thread(target=decode)
        worker.start()
        try:
            for number, step in enumerate(iter(streamer.queue.get, None)):
                if isinstance(step, BaseException):
                    raise step
                if number:  # before the first come the prompts
                    yield step
        finally:  # also when the reader closes the generator
            stopping.set()
            worker.join()


class _Penalty(LogitsProcessor):
    """sampling.py's repetition penalty, for `generate`.

    Args:
        starts: the index in each row at which the padding ends and the prompt begins.
    """

    def __init__(self, penalty: float, starts: list[int], stop_ids: list[int]):
        self.penalty, self.starts = penalty, starts
        self.stop_ids = [token for token in stop_ids if token >= 0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if not scores.isfinite().all():
            raise Failed("the model computes NaN or infinity; its weights or the adapter's are damaged: copy or train them again")
        if self.penalty == 1:
            return scores
        seen = torch.zeros_like(scores, dtype=torch.bool)
        for row, start in enumerate(self.starts):
            seen[row, input_ids[row, start:]] = True
        seen[:, self.stop_ids] = False
        return penalise(scores, seen, self.penalty)


class _StepQueue(BaseStreamer):
    """Pass each step's tokens from the decoding thread to the reader's; None after the last."""

    def __init__(self) -> None:
        self.queue: SimpleQueue = SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        self.queue.put(value.tolist())

    def end(self) -> None:
        self.queue.put(None)


def _pad_left(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, (B, longest), with the padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
