"""Answers a token at a time: static key/value cache, one captured CUDA graph per shape, sampling inside it.

Through the library a 4-bit model launches thousands of kernels for a token, which take longer to launch than to run. Here a token
is one replay. The next one is under way before this one is looked at, so that the GPU never waits for the reader.

Prompts stand in the cache from position 0, each as long as it is; a shorter one's row is simply further behind. What padding left
behind a prompt is overwritten before any later token may look at it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.config import GenerationSettings
from qlora_kit.fast.llama_layer import Norms, Rotary, rms_norm, rotate
from qlora_kit.fast.llama_parts import lora_of, read_layers, read_rotary_table, why_not_covered
from qlora_kit.fast.projection import Lora
from qlora_kit.inference import token_kernels
from qlora_kit.inference.kv_cache import attend_cached, store, visible_to
from qlora_kit.inference.sampling import Sampling, choose
from qlora_kit.model.loss import decoder_and_head

CHUNK_TOKENS = 512  # of prompts at a time
ROOM = 256  # the cache grows in steps of so many tokens: one graph each
WARM_UP_RUNS = 2
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # rotary tables that do not depend on how long the text is


class Cache(NamedTuple):
    """Keys and values of every layer, (B, heads of k, room, head size) each."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]


class GraphEngine:
    """Prompts -> tokens for models built like Llama; members as in decoding.LibraryEngine.

    Args:
        model: loaded, with or without PEFT around it; `why_not_decoded` has no objection to it.
        captured: whether to use CUDA graphs; without, the same functions run one after the other.
    """

    def __init__(self, model: Any, captured: bool):
        self.model = model.requires_grad_(False).eval()
        parts = decoder_and_head(model)
        assert parts is not None, "why_not_decoded comes first"
        self.decoder, self.head = parts
        self.config, self.captured = self.decoder.config, captured
        self.embedding = self.decoder.embed_tokens.weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.layers = read_layers(self.decoder, self._copy_lora)
        self.adapting = True
        self.lines: dict[tuple[int, int], _Lines] = {}

    def _copy_lora(self, modules: list[Any], sizes: tuple[int, ...]) -> tuple[Lora | None, None]:
        """Return the LoRA update of a group in the model's dtype, A times alpha / rank."""
        pairs = [lora_of(module) for module in modules]
        if not any(pairs):
            return None, None
        A = torch.cat([pair.A * pair.scale for pair in pairs if pair]).to(self.embedding)
        return Lora(A, tuple(pair and pair.B.to(self.embedding) for pair in pairs), sizes, scale=1.0, keep=1.0), None

    @property
    def context(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        before, self.adapting = self.adapting, False
        try:
            with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext():
                yield
        finally:
            self.adapting = before

    @torch.inference_mode()
    def steps(
        self, prompts: list[list[int]], settings: GenerationSettings, seed: int, stop_ids: list[int]
    ) -> Iterator[list[int | None]]:
        lines = self._lines(len(prompts), max(map(len, prompts)) + settings.max_new_tokens)
        lines.begin(prompts, settings, seed, stop_ids)
        ended = [False] * len(prompts)
        for tokens in lines.run(settings.max_new_tokens):
            yield [None if done else token for token, done in zip(tokens, ended, strict=True)]
            ended = [done or token in stop_ids for token, done in zip(tokens, ended, strict=True)]
            if all(ended):
                return

    def _lines(self, batch: int, tokens: int) -> "_Lines":
        """Buffers and graphs for this many prompts; those of another size are given up, so that one cache is held."""
        room = ROOM * math.ceil(tokens / ROOM)
        if self.context:
            room = min(room, self.context)
        if (batch, room) not in self.lines:
            self.lines.clear()
            self.lines[batch, room] = _Lines(self, batch, room)
        return self.lines[batch, room]

    def forward(self, ids: torch.Tensor, at: torch.Tensor, start: int | None, cache: Cache, rotary: Rotary) -> torch.Tensor:
        """Hidden states after the last norm, (B, n, hidden).

        Args:
            ids: (B, n) tokens.
            at: (B, n), their positions.
            start: of the first of them where all rows are at the same place (a prompt's chunk); None: one token a row.
        """
        batch, length = ids.shape
        h = F.embedding(ids, self.embedding).flatten(0, 1)  # (B · n, hidden)
        turned = Rotary(rotary.cos[at][:, None], rotary.sin[at][:, None])
        visible = visible_to(at, cache.keys[0].shape[2] if start is None else start + length)
        came = None
        for number, layer in enumerate(self.layers):
            qkv, o, gate_up, down = (group if self.adapting else group._replace(lora=None) for group in layer[1:])
            h, x = token_kernels.add_and_norm(h, came, layer.norms.attention, layer.norms.epsilon)
            product, keys, values = token_kernels.product(x, qkv), cache.keys[number], cache.values[number]
            if start is None and layer.norms.q is None and token_kernels.in_one(product):
                q = token_kernels.rotate_and_store(product, qkv.sizes, rotary, at, keys, values)
            else:
                q, k, v = self._heads(product, qkv.sizes, layer.norms, turned, batch)
                keys, values = store(keys, k, at, start), store(values, v, at, start)
            attended = attend_cached(q, keys, values, visible)
            h, x = token_kernels.add_and_norm(h, token_kernels.product(attended, o), layer.norms.mlp, layer.norms.epsilon)
            came = token_kernels.product(token_kernels.gated(token_kernels.product(x, gate_up)), down)
        _, x = token_kernels.add_and_norm(h, came, self.decoder.norm.weight, self.decoder.norm.variance_epsilon)
        return x.view(batch, length, -1)

    def _heads(
        self, product: torch.Tensor, sizes: tuple[int, ...], norms: Norms, rotary: Rotary, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v, (B, heads, n, head size), rotated."""
        size = rotary.cos.shape[-1]
        pieces = product.split(list(sizes), 1)
        q, k, v = (piece.view(batch, -1, piece.shape[1] // size, size).transpose(1, 2) for piece in pieces)
        if norms.q is not None and norms.k is not None:
            q, k = rms_norm(q, norms.q, norms.epsilon), rms_norm(k, norms.k, norms.epsilon)
        return rotate(q, rotary), rotate(k, rotary), v

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, vocabulary) in fp32 of (B, hidden)."""
        return F.linear(hidden, self.head.weight).float()


class _Lines:
    """Buffers of a fixed number of answers under way at once, and the graphs that read and write them."""

    def __init__(self, engine: GraphEngine, batch: int, room: int):
        self.engine, self.batch, self.room = engine, batch, room
        device, first = engine.device, engine.layers[0]
        self.rotary = read_rotary_table(engine.decoder, room, engine.device)
        size = self.rotary.cos.shape[-1]
        shape = (batch, first.qkv.sizes[1] // size, room, size)
        self.cache = Cache(*([torch.zeros(shape, dtype=engine.dtype, device=device) for _ in engine.layers] for _ in range(2)))
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(batch, 1, dtype=torch.long, device=device)  # the token's position
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.drawn = torch.zeros(room, device=device)  # numbers from 0 to 1, one a step
        self.seen = torch.zeros(batch, len(engine.head.weight), dtype=torch.bool, device=device)
        self.temperature, self.top_p, self.penalty = (torch.ones((), device=device) for _ in range(3))
        self.graphs: dict[tuple[bool, Sampling], Callable[[], None]] = {}
        self.sampling = Sampling(True, 0, False)

    def begin(self, prompts: list[list[int]], settings: GenerationSettings, seed: int, stop_ids: list[int]) -> None:
        """Read the prompts and take the first token of each answer."""
        greedy = settings.temperature == 0
        self.sampling = Sampling(greedy, 0 if greedy else settings.top_k, settings.repetition_penalty != 1)
        self.temperature.fill_(settings.temperature or 1.0)
        self.top_p.fill_(settings.top_p)
        self.penalty.fill_(settings.repetition_penalty)
        self.drawn.copy_(torch.rand(self.room, generator=torch.Generator().manual_seed(seed)))
        self.step.zero_()
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.engine.device)
        self.at.copy_(lengths[:, None] - 1)
        self.seen.zero_()
        for row, prompt in enumerate(prompts):
            penalised = [token for token in prompt if token not in stop_ids]
            self.seen[row, torch.tensor(penalised, dtype=torch.long, device=self.engine.device)] = True
        self._take(self.engine.logits(self._read(prompts, lengths)))

    def _read(self, prompts: list[list[int]], lengths: torch.Tensor) -> torch.Tensor:
        """Fill the cache a chunk at a time; the hidden state of each prompt's last token, (B, hidden)."""
        engine, longest = self.engine, int(lengths.max())
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=engine.device)
        last = torch.zeros(self.batch, self.engine.embedding.shape[1], dtype=engine.dtype, device=engine.device)
        chunk = max(1, CHUNK_TOKENS // self.batch)
        for start in range(0, longest, chunk):
            part = ids[:, start : start + chunk]
            at = torch.arange(start, start + part.shape[1], device=engine.device).expand_as(part)
            hidden = engine.forward(part, at, start, self.cache, self.rotary)
            within = (lengths - 1 - start).clamp(0, part.shape[1] - 1)
            ends_here = (lengths > start) & (lengths <= start + part.shape[1])
            last = torch.where(ends_here[:, None], hidden[torch.arange(self.batch), within], last)
        return last

    def _next(self) -> None:
        hidden = self.engine.forward(self.token, self.at, None, self.cache, self.rotary)
        self._take(self.engine.logits(hidden[:, 0]))

    def _take(self, logits: torch.Tensor) -> None:
        """Choose each answer's next token, from logits (B, vocabulary), and move on by one."""
        drawn = self.drawn.gather(0, self.step)
        chosen = choose(logits, self.seen, drawn, self.temperature, self.top_p, self.penalty, self.sampling)
        self.token.copy_(chosen[:, None])
        self.seen.scatter_(1, self.token, True)
        self.at += 1
        self.step += 1

    def run(self, count: int) -> Iterator[list[int]]:
        """`count` tokens of each answer; the next is always under way."""
        on_gpu = self.engine.device.type == "cuda"
        taken = torch.empty(count, self.batch, dtype=torch.long, pin_memory=on_gpu)
        done = [torch.cuda.Event() for _ in range(count)] if on_gpu else []

        def record(number: int) -> None:
            taken[number].copy_(self.token[:, 0], non_blocking=on_gpu)
            if on_gpu:
                done[number].record()

        record(0)
        for number in range(count):
            if number + 1 < count:
                self._way()()
                record(number + 1)
            if on_gpu:
                done[number].synchronize()
            yield taken[number].tolist()

    def _way(self) -> Callable[[], None]:
        """How to take the next step: by replay, or plainly."""
        if not self.engine.captured:
            return self._next
        key = (self.engine.adapting, self.sampling)
        if key not in self.graphs:
            self.graphs[key] = self._capture()
        return self.graphs[key]

    def _capture(self) -> Callable[[], None]:
        """Capturing computes nothing, but warming up does: what it changes is put back."""
        state = (self.token, self.at, self.step, self.seen)
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._next()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._next()
        return graph.replay


def why_not_decoded(model: Any, length: int) -> str | None:
    """Return why a model cannot be decoded by GraphEngine in texts of up to `length` tokens, or None if it can."""
    if reason := why_not_covered(model.requires_grad_(False), length):  # a trained head is no reason here
        return reason
    if model.device.index:
        return "it is not on the first GPU"
    config = model.config.to_dict()
    angles = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    return None if angles in FIXED_ANGLES else f"its rotary angles ({angles}) depend on the length of the text"
