"""Decoding with one CUDA graph for each token: a static key/value cache, and sampling inside the graph.

Through the library, a 4-bit model launches thousands of kernels for a token, and launching them takes longer than running them.
Here a token is one replay. The next token is started before the last one is read, so that the GPU never waits for the reader.

Each prompt is stored in the cache from position 0, whatever its length. Keys and values of the padding after a shorter prompt
are overwritten before any later token attends to them.
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from qlora_kit.config import GenerationSettings
from qlora_kit.fast.llama_layer import Norms, Rotary, rms_norm, rotate
from qlora_kit.fast.llama_parts import lora_of, read_layers, read_rotary_table, why_not_covered
from qlora_kit.fast.projection import Lora
from qlora_kit.inference import token_kernels
from qlora_kit.inference.generator import Engine
from qlora_kit.inference.kv_cache import Cache, attend_cached, make_causal_mask, store
from qlora_kit.inference.sampling import Sampling, SamplingTensors, choose_tokens
from qlora_kit.model.loss import decoder_and_head

PREFILL_TOKENS = 512  # of all prompts together, in one pass
CAPACITY_STEP = 256  # the cache's capacity is a multiple of this, so that few capacities need graphs
WARM_UP_RUNS = 2
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # rotary tables that do not depend on the length of the text


class GraphEngine(Engine):
    """Decode models built like Llama.

    Args:
        model: with or without PEFT around it; `why_not_decoded` says which are covered.
        captured: whether to use CUDA graphs; without them the same functions run kernel by kernel.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, captured: bool):
        self.model = model.requires_grad_(False).eval()
        parts = decoder_and_head(model)
        assert parts is not None, "why_not_decoded comes first"
        self.decoder, self.head = parts
        self.captured = captured
        self.embedding = self.decoder.embed_tokens.weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.layers = read_layers(self.decoder, self._copy_lora)
        self.uses_adapter = True
        self.batches: dict[tuple[int, int], _AnswerBatch] = {}

    def _copy_lora(self, modules: list[Any], sizes: tuple[int, ...]) -> tuple[Lora | None, None]:
        """Copy the LoRA matrices of a group in the model's dtype, A times alpha / rank."""
        pairs = [lora_of(module) for module in modules]
        if not any(pairs):
            return None, None
        A = torch.cat([pair.A * pair.scale for pair in pairs if pair]).to(self.embedding)
        return Lora(A, tuple(pair and pair.B.to(self.embedding) for pair in pairs), sizes, scale=1.0, keep=1.0), None

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        self.uses_adapter = False
        try:
            with super().adapter_off():
                yield
        finally:
            self.uses_adapter = True

    @torch.inference_mode()
    def steps(
        self, prompts: list[list[int]], settings: GenerationSettings, seed: int, stop_ids: list[int]
    ) -> Generator[list[int]]:
        batch = self._batch_for(len(prompts), max(map(len, prompts)) + settings.max_new_tokens)
        batch.start(prompts, settings, seed, stop_ids)
        yield from batch.run(settings.max_new_tokens)

    def _batch_for(self, rows: int, tokens: int) -> "_AnswerBatch":
        """Return buffers and graphs for so many prompts; those of another size are freed, so that there is one cache."""
        capacity = CAPACITY_STEP * math.ceil(tokens / CAPACITY_STEP)
        if self.context:
            capacity = min(capacity, self.context)
        if (rows, capacity) not in self.batches:
            self.batches.clear()
            self.batches[rows, capacity] = _AnswerBatch(self, rows, capacity)
        return self.batches[rows, capacity]

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, start: int | None, cache: Cache, rotary: Rotary
    ) -> torch.Tensor:
        """Return the hidden states after the last norm, (B, n, hidden), and store keys and values.

        Args:
            ids, positions: (B, n), of the tokens.
            start: the first position, if it is the same in all rows (a chunk of the prompts); None: one token a row.
            rotary: the table of all positions, (capacity, head size).
        """
        batch, length = ids.shape
        h = F.embedding(ids, self.embedding).flatten(0, 1)  # (B · n, hidden)
        rotary_here = Rotary(rotary.cos[positions][:, None], rotary.sin[positions][:, None])
        mask = make_causal_mask(positions, cache.keys[0].shape[2] if start is None else start + length)
        update = None  # of the residual h, by the attention or the MLP before
        for number, layer in enumerate(self.layers):
            qkv, o, gate_up, down = (group if self.uses_adapter else group._replace(lora=None) for group in layer[1:])
            h, x = token_kernels.add_and_norm(h, update, layer.norms.attention, layer.norms.epsilon)
            product, keys, values = token_kernels.project(x, qkv), cache.keys[number], cache.values[number]
            if start is None and layer.norms.q is None and token_kernels.has_kernels(product):
                q = token_kernels.rotate_and_store(product, qkv.sizes, rotary, positions, keys, values)
            else:
                q, k, v = self._split_heads(product, qkv.sizes, layer.norms, rotary_here, batch)
                keys, values = store(keys, k, positions, start), store(values, v, positions, start)
            attended = attend_cached(q, keys, values, mask)
            h, x = token_kernels.add_and_norm(h, token_kernels.project(attended, o), layer.norms.mlp, layer.norms.epsilon)
            update = token_kernels.project(token_kernels.apply_gate(token_kernels.project(x, gate_up)), down)
        _, x = token_kernels.add_and_norm(h, update, self.decoder.norm.weight, self.decoder.norm.variance_epsilon)
        return x.view(batch, length, -1)

    def _split_heads(
        self, product: torch.Tensor, sizes: tuple[int, ...], norms: Norms, rotary: Rotary, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v, (B, heads, n, head size), q and k rotated."""
        size = rotary.cos.shape[-1]
        pieces = product.split(list(sizes), 1)
        q, k, v = (piece.view(batch, -1, piece.shape[1] // size, size).transpose(1, 2) for piece in pieces)
        if norms.q is not None and norms.k is not None:
            q, k = rms_norm(q, norms.q, norms.epsilon), rms_norm(k, norms.k, norms.epsilon)
        return rotate(q, rotary), rotate(k, rotary), v

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (B, vocabulary) in fp32, of (B, hidden)."""
        return F.linear(hidden, self.head.weight).float()


class _AnswerBatch:
    """Buffers of a fixed number of answers that are written at once, and the graphs that read and write them."""

    def __init__(self, engine: GraphEngine, rows: int, capacity: int):
        self.engine, self.rows, self.capacity = engine, rows, capacity
        device, first = engine.device, engine.layers[0]
        self.rotary = read_rotary_table(engine.decoder, capacity, engine.device)
        size = self.rotary.cos.shape[-1]
        shape = (rows, first.qkv.sizes[1] // size, capacity, size)
        self.cache = Cache(*([torch.zeros(shape, dtype=engine.dtype, device=device) for _ in engine.layers] for _ in range(2)))
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=device)  # of the token
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.uniform = torch.zeros(capacity, device=device)  # random numbers from 0 to 1, one for each step
        self.seen = torch.zeros(rows, len(engine.head.weight), dtype=torch.bool, device=device)
        self.tensors = SamplingTensors(*(torch.ones((), device=device) for _ in range(3)))
        self.graphs: dict[tuple[bool, Sampling], Callable[[], None]] = {}
        self.sampling = Sampling(True, 0, False)

    def start(self, prompts: list[list[int]], settings: GenerationSettings, seed: int, stop_ids: list[int]) -> None:
        """Read the prompts and choose the first token of each answer."""
        greedy = settings.temperature == 0
        self.sampling = Sampling(greedy, 0 if greedy else settings.top_k, settings.repetition_penalty != 1)
        self.tensors.temperature.fill_(settings.temperature or 1.0)
        self.tensors.top_p.fill_(settings.top_p)
        self.tensors.penalty.fill_(settings.repetition_penalty)
        self.uniform.copy_(torch.rand(self.capacity, generator=torch.Generator().manual_seed(seed)))
        self.step.zero_()
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.engine.device)
        self.position.copy_(lengths[:, None] - 1)
        self.seen.zero_()
        for row, prompt in enumerate(prompts):
            penalised = [token for token in prompt if token not in stop_ids]
            self.seen[row, torch.tensor(penalised, dtype=torch.long, device=self.engine.device)] = True
        self._choose_next(self.engine.logits(self._prefill(prompts, lengths)))

    def _prefill(self, prompts: list[list[int]], lengths: torch.Tensor) -> torch.Tensor:
        """Fill the cache a chunk at a time, and return the hidden state of each prompt's last token, (B, hidden)."""
        engine, longest = self.engine, int(lengths.max())
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=engine.device)
        last = torch.zeros(self.rows, self.engine.embedding.shape[1], dtype=engine.dtype, device=engine.device)
        chunk_length = max(1, PREFILL_TOKENS // self.rows)
        for start in range(0, longest, chunk_length):
            chunk = ids[:, start : start + chunk_length]
            positions = torch.arange(start, start + chunk.shape[1], device=engine.device).expand_as(chunk)
            hidden = engine.forward(chunk, positions, start, self.cache, self.rotary)
            index = (lengths - 1 - start).clamp(0, chunk.shape[1] - 1)
            ends_here = (lengths > start) & (lengths <= start + chunk.shape[1])
            last = torch.where(ends_here[:, None], hidden[torch.arange(self.rows), index], last)
        return last

    def _decode(self) -> None:
        """Compute the next token of each answer; this is what a graph captures."""
        hidden = self.engine.forward(self.token, self.position, None, self.cache, self.rotary)
        self._choose_next(self.engine.logits(hidden[:, 0]))

    def _choose_next(self, logits: torch.Tensor) -> None:
        """Choose each answer's next token, given logits (B, vocabulary), and move its position on by one."""
        uniform = self.uniform.gather(0, self.step)
        chosen = choose_tokens(logits, self.seen, uniform, self.tensors, self.sampling)
        self.token.copy_(chosen[:, None])
        self.seen.scatter_(1, self.token, True)
        self.position += 1
        self.step += 1

    def run(self, count: int) -> Iterator[list[int]]:
        """Yield `count` times the next token of each answer; the one after it is started first."""
        on_gpu = self.engine.device.type == "cuda"
        tokens = torch.empty(count, self.rows, dtype=torch.long, pin_memory=on_gpu)
        copied = [torch.cuda.Event() for _ in range(count)] if on_gpu else []

        def copy_to_host(number: int) -> None:
            tokens[number].copy_(self.token[:, 0], non_blocking=on_gpu)
            if on_gpu:
                copied[number].record()

        copy_to_host(0)
        for number in range(count):
            if number + 1 < count:
                self._runner()()
                copy_to_host(number + 1)
            if on_gpu:
                copied[number].synchronize()
            yield tokens[number].tolist()

    def _runner(self) -> Callable[[], None]:
        """Return what decodes the next token: a graph's replay, or the plain function."""
        if not self.engine.captured:
            return self._decode
        key = (self.engine.uses_adapter, self.sampling)
        if key not in self.graphs:
            self.graphs[key] = self._capture()
        return self.graphs[key]

    def _capture(self) -> Callable[[], None]:
        """Capture `_decode`. Capturing computes nothing, but the warm-up does, so the buffers are restored after it."""
        buffers = (self.token, self.position, self.step, self.seen)
        before = [buffer.clone() for buffer in buffers]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._decode()
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode()
        return graph.replay


def why_not_decoded(model: PreTrainedModel | PeftModel, length: int) -> str | None:
    """Return why GraphEngine does not cover a model in texts of up to `length` tokens, or None if it does."""
    if reason := why_not_covered(model.requires_grad_(False), length):  # a head that was trained is covered as well
        return reason
    others = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # modules with which peft does something else, or saves them whole
    if getattr(model, "replaced", None) or any(isinstance(m, others) and not isinstance(m, LoraLayer) for m in model.modules()):
        return "its adapter is more than LoRA"
    if model.device.index:
        return "it is not on the first GPU"
    config = model.config.to_dict()
    angles = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    return None if angles in FIXED_ANGLES else f"its rotary angles ({angles}) depend on the length of the text"
