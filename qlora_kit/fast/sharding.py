"""FSDP for a frozen base model: each process keeps a part of every layer, and has the whole of one only while it works with it.

The idea is that of fully sharded data parallel (arXiv 2304.11277). What is divided here has no gradient and never changes, which
leaves the gathering of its parts and nothing to scatter back; the adapters, their gradients and the optimizer stay whole in every
process. A layer is divided as one run of bytes, 4-bit weights with their absmax values; embedding and output head are divided by
rows. While the decoder works with one run, the next one comes. No CUDA graph holds a gathering: a captured pass stops at each
(`ShardedBase.gathering`, graph.py). All processes have to gather in the same order: each takes as many passes as the others.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_kit.errors import UserError
from qlora_kit.model.llama_modules import projections_of
from qlora_kit.model.weight_files import Stored, read_base
from qlora_kit.planning.shape import HEAD_ROWS

ALIGNMENT = 512  # bytes, of a tensor within a run: kernels read aligned memory faster
Place = tuple[Any, str]  # an object and its attribute that holds a tensor


class Gathering:
    """Gathers a tensor of which each process has an even part, in the order of ranks.

    Args:
        part: (n, ...), on the device or in host memory.
        device: where the whole is wanted; `land` says at which place.
    """

    def __init__(self, part: torch.Tensor, device: torch.device):
        self.part, self.hosted = part, part.device.type != device.type
        self.size = part.nbytes * dist.get_world_size()
        self.whole = part.new_empty(0)  # (processes · n, ...), in memory that others use in between
        self.work: Any = None  # what is under way

    def land(self, place: torch.Tensor) -> None:
        """From now on the whole comes to the beginning of `place`, bytes on the device."""
        self.whole = place[: self.size].view(self.part.dtype).view(-1, *self.part.shape[1:])

    def fetch(self) -> None:
        """Begin, beside what the device does; nothing where it was begun."""
        if self.work is None:
            with self._copying():
                self.work = dist.all_gather_into_tensor(self.whole, self._part_here(), async_op=True)

    def take(self) -> None:
        """What the device does from now on finds the whole, until the next `fetch` of one that has the same place."""
        self.fetch()
        self.work.wait()
        self.work = None

    def _part_here(self) -> torch.Tensor:
        if not self.hosted:
            return self.part
        return self.whole.chunk(dist.get_world_size())[dist.get_rank()].copy_(self.part, non_blocking=True)

    def _copying(self) -> Any:
        """Copies from host memory have a stream of their own, beside what the device computes."""
        if not self.hosted:
            return nullcontext()
        stream = _copy_stream()
        stream.wait_stream(torch.cuda.current_stream())  # then what had the place before is done with
        return torch.cuda.stream(stream)


@cache
def _copy_stream() -> Any:
    return torch.cuda.Stream()


def _take_and_fetch(runs: list[Gathering], number: int, then: int) -> None:
    runs[number].take()
    if 0 <= then < len(runs):
        runs[then].fetch()


class ShardedLayer:
    """Tensors that are divided as one run of bytes; they are empty except between `fill` and `clear`.

    Args:
        places: where they are, all on one device.
        offload: keep this process's part in host memory.
    """

    def __init__(self, places: list[Place], offload: bool):
        tensors = [getattr(owner, name) for owner, name in places]
        self.places, device = places, tensors[0].device
        self.like = [(tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors]
        self.nothing = [torch.empty(0, dtype=tensor.dtype, device=device) for tensor in tensors]
        self.room = [ALIGNMENT * math.ceil(tensor.nbytes / ALIGNMENT) for tensor in tensors]
        self.room.append(-sum(self.room) % (ALIGNMENT * dist.get_world_size()))  # to divide evenly
        run = torch.zeros(sum(self.room), dtype=torch.uint8, device=device)
        for piece, tensor in zip(run.split(self.room), tensors, strict=False):
            piece[: tensor.nbytes] = tensor.detach().contiguous().view(-1).view(torch.uint8)
        part = run.chunk(dist.get_world_size())[dist.get_rank()]
        self.run = Gathering(part.cpu().pin_memory() if offload else part.clone(), device)
        self.clear()

    def fill(self) -> None:
        """Have the tensors where their run was gathered."""
        pieces = self.run.whole.split(self.room)
        for (owner, name), (dtype, shape, size), piece in zip(self.places, self.like, pieces, strict=False):
            setattr(owner, name, piece[:size].view(dtype).view(shape))

    def clear(self) -> None:
        for (owner, name), nothing in zip(self.places, self.nothing, strict=True):
            setattr(owner, name, nothing)


class ShardedRows:
    """A frozen matrix (rows, columns), read a run of `rows` at a time; of each run every process has `own` rows."""

    def __init__(self, matrix: torch.Tensor, device: torch.device, base: "ShardedBase"):
        processes = dist.get_world_size()
        self.length, self.dtype, self.device, self.base = len(matrix), matrix.dtype, device, base
        self.own = math.ceil(HEAD_ROWS / processes)
        self.rows = self.own * processes
        filled = torch.nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % self.rows))
        runs = filled.view(-1, processes, self.own, filled.shape[1])[:, dist.get_rank()]  # (runs, own, columns)
        self.part = runs.cpu().pin_memory() if base.offload else runs.to(device, copy=True)
        self.runs = [Gathering(run, device) for run in self.part]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Each run of rows, to be used before the next is asked for."""
        for number, run in enumerate(self.runs):
            self.base.between(partial(_take_and_fetch, self.runs, number, number + 1))
            yield run.whole[: self.length - number * self.rows]

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix: ids, (B, T) in every process -> (B, T, columns). Each looks up for all what it has."""
        asked = torch.empty(dist.get_world_size(), *ids.shape, dtype=ids.dtype, device=self.device)
        dist.all_gather_into_tensor(asked, ids[None].to(self.device).contiguous())
        run, place = asked // self.rows, asked % self.rows
        mine = place // self.own == dist.get_rank()
        found = self.part.flatten(0, 1)[(run * self.own + place % self.own).to(self.part.device)].to(self.device)
        found = torch.where(mine[..., None], found, 0.0)
        dist.all_reduce(found)  # one process has the row, the others zeros
        return found[dist.get_rank()]


class ShardedBase:
    """The layers of a base model, and its embedding and head where they are divided as well."""

    def __init__(self, offload: bool):
        self.offload = offload
        self.layers: list[ShardedLayer] = []
        self.runs: list[Gathering] = []  # the layers'
        self.embedding: ShardedRows | None = None
        self.head: ShardedRows | None = None
        self.parameters = 0  # weights that are divided, a packed byte counted as two
        self.between: Callable[[Callable[[], None]], None] = _at_once  # how to gather within a pass

    def settle(self, device: torch.device) -> None:
        """Once all is divided: two places in turn, so that a run comes while the one before it is in use."""
        self.runs = [layer.run for layer in self.layers]
        sequences = [self.runs, *(matrix.runs for matrix in (self.embedding, self.head) if matrix)]
        size = max(run.size for runs in sequences for run in runs)
        places = torch.empty(2, ALIGNMENT * math.ceil(size / ALIGNMENT), dtype=torch.uint8, device=device)
        for runs in sequences:
            for number, run in enumerate(runs):
                run.land(places[number % 2])

    @contextmanager
    def gathering(self, between: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        """While it lasts, `between` is given what gathers, each time a pass comes to it."""
        self.between = between
        try:
            yield
        finally:
            self.between = _at_once

    @contextmanager
    def whole(self, number: int, then: int) -> Iterator[None]:
        """A layer is there while the context lasts, and its neighbour that comes then is on its way."""
        self.between(partial(_take_and_fetch, self.runs, number, then))
        self.layers[number].fill()
        try:
            yield
        finally:
            self.layers[number].clear()


def _at_once(action: Callable[[], None]) -> None:
    action()


def load_sharded(
    folder: Path, quantization: BitsAndBytesConfig | None, device: str, dtype: torch.dtype, offload: bool, embedding: bool
) -> PreTrainedModel:
    """A Llama-like model, read a layer at a time, of which each process keeps its part; `sharded_base` finds the parts.

    Args:
        folder: with config.json and *.safetensors.
        offload: keep the parts in host memory.
        embedding: whether to divide embedding and head, too.

    Raises:
        UserError: files or tensors are missing or damaged.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    stored, base, decoder = read_base(folder), ShardedBase(offload), model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(device)  # its angles are in no file
    for number, layer in enumerate(decoder.layers):
        if quantization:
            _make_4bit(layer, quantization)
        _fill(layer, f"model.layers.{number}.", stored, device, dtype)
        bases = [module for group in projections_of(layer) for module in group]
        base.parameters += sum(module.in_features * module.out_features for module in bases)
        base.layers.append(ShardedLayer([place for module in bases for place in _large(module.weight)], offload))
    _fill(decoder.norm, "model.norm.", stored, device, dtype)
    head, place = model.get_output_embeddings(), "cpu" if embedding else device
    _fill(decoder.embed_tokens, "model.embed_tokens.", stored, place, dtype)
    if model.config.tie_word_embeddings:
        head.weight = decoder.embed_tokens.weight
    else:
        _fill(head, "lm_head.", stored, place, dtype)
    if embedding:
        _divide_embedding(decoder.embed_tokens, head, base, device)
    base.settle(torch.device(device))
    if quantization:
        model.is_loaded_in_4bit = True  # as from_pretrained: peft goes by it
    model.sharded_base = base
    return model.eval()


def _make_4bit(layer: Any, quantization: BitsAndBytesConfig) -> None:
    for parent in (layer.self_attn, layer.mlp):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                packed = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None,
                    compute_dtype=quantization.bnb_4bit_compute_dtype,
                    compress_statistics=quantization.bnb_4bit_use_double_quant,
                    quant_type=quantization.bnb_4bit_quant_type, device="meta",
                )  # fmt: skip
                setattr(parent, name, packed)


def _fill(module: Any, prefix: str, stored: dict[str, Stored], device: str, dtype: torch.dtype) -> None:
    """Read a module's parameters, one at a time; what is 4-bit is packed on the way."""
    for name, empty in list(module.named_parameters()):
        if prefix + name not in stored:
            raise UserError(f"model.name: no file of it holds {prefix}{name}; copy or download it again")
        value = stored[prefix + name].read().to(device, dtype)
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(empty, bitsandbytes.nn.Params4bit):
            packed: Any = bitsandbytes.nn.Params4bit(
                value, requires_grad=False, quant_type=empty.quant_type, compress_statistics=empty.compress_statistics,
                module=owner,
            )  # fmt: skip
            owner.weight = packed.to(device)
        else:
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=False))


def _large(weight: Any) -> list[Place]:
    """What of a weight is worth dividing: its packed bytes and the absmax of their blocks."""
    state = getattr(weight, "quant_state", None)
    return [(weight, "data")] if state is None else [(weight, "data"), (state, "absmax")]


def _divide_embedding(embedding: Any, head: Any, base: ShardedBase, device: str) -> None:
    weights = {id(module.weight): module.weight for module in (embedding, head)}  # one where they are tied
    divided = {key: ShardedRows(weight.data, torch.device(device), base) for key, weight in weights.items()}
    base.embedding, base.head = (divided[id(module.weight)] for module in (embedding, head))
    for weight in weights.values():
        base.parameters += weight.numel()
        weight.data = torch.empty(0, dtype=weight.dtype, device=device)


def sharded_base(model: Any) -> ShardedBase | None:
    """The parts of a PEFT or base model, or None for one that is whole."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "sharded_base", None)
