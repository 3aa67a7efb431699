"""FSDP for a frozen base model: each process stores a shard of every layer, and gathers a layer while it computes with it.

Fully sharded data parallel: arXiv 2304.11277. The base model has no gradient and never changes, so its weights are gathered and
nothing is scattered back; adapters, their gradients and the optimizer are whole in every process. A layer is sharded as one
sequence of bytes, 4-bit weights with their absmax values; embedding and output head are sharded by rows. While one layer
computes, the next is gathered. No CUDA graph contains a gather: a captured pass ends a graph at each
(`ShardedBase.intercept_gathers`, micro_step.py). All processes must gather in the same order, so they run equally many passes.
"""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora_kit.errors import UserError
from qlora_kit.model.llama_modules import projections_of
from qlora_kit.model.weight_files import StoredTensor, read_base
from qlora_kit.planning.shape import HEAD_ROWS

ALIGNMENT = 512  # bytes, of each tensor in a layer's sequence: kernels read aligned memory faster
Attribute = tuple[Any, str]  # an object, and the name of its attribute that holds a tensor
Action = Callable[[], None]


class ShardedTensor:
    """A tensor of which each process stores an equal shard, in the order of ranks.

    Args:
        shard: (n, ...), on the device or in host memory.
        device: where the tensor is gathered, at the place that `set_buffer` chooses.

    Attributes:
        gathered: (processes · n, ...), in memory that other tensors use too; valid after `wait` until the next
            `start_gather` of one with the same buffer.
    """

    def __init__(self, shard: torch.Tensor, device: torch.device):
        self.shard, self.offloaded = shard, shard.device.type != device.type
        self.size = shard.nbytes * dist.get_world_size()
        self.gathered = shard.new_empty(0)
        self.work: dist.Work | None = None  # a gather that has begun

    def set_buffer(self, buffer: torch.Tensor) -> None:
        """Gather into the beginning of `buffer`, bytes on the device, from now on."""
        self.gathered = buffer[: self.size].view(self.shard.dtype).view(-1, *self.shard.shape[1:])

    def start_gather(self) -> None:
        """Begin to gather, while the device computes, unless a gather has begun."""
        if self.work is not None:
            return
        if not self.offloaded:
            self.work = dist.all_gather_into_tensor(self.gathered, self.shard, async_op=True)
            return
        stream = _make_copy_stream()
        stream.wait_stream(torch.cuda.current_stream())  # until the former contents of the buffer are no longer needed
        with torch.cuda.stream(stream):  # copies from host memory while the device computes
            shard = self.gathered.chunk(dist.get_world_size())[dist.get_rank()].copy_(self.shard, non_blocking=True)
            self.work = dist.all_gather_into_tensor(self.gathered, shard, async_op=True)

    def wait(self) -> None:
        """Let the device's further work wait until the tensor is gathered."""
        self.start_gather()
        assert self.work is not None
        self.work.wait()
        self.work = None


@cache
def _make_copy_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _wait_and_start_next(tensors: list[ShardedTensor], number: int, then: int) -> None:
    tensors[number].wait()
    if 0 <= then < len(tensors):
        tensors[then].start_gather()


class ShardedLayer:
    """Tensors that are sharded as one sequence of bytes; they are empty except between `fill` and `clear`.

    Args:
        attributes: where the tensors are, all on one device.
        offload: whether to store this process's shard in host memory.
    """

    def __init__(self, attributes: list[Attribute], offload: bool):
        tensors = [getattr(owner, name) for owner, name in attributes]
        self.attributes, device = attributes, tensors[0].device
        self.formats = [(tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors]
        self.empty = [torch.empty(0, dtype=tensor.dtype, device=device) for tensor in tensors]
        self.padded_sizes = [ALIGNMENT * math.ceil(tensor.nbytes / ALIGNMENT) for tensor in tensors]
        self.padded_sizes.append(-sum(self.padded_sizes) % (ALIGNMENT * dist.get_world_size()))  # for equal shards
        content = torch.zeros(sum(self.padded_sizes), dtype=torch.uint8, device=device)
        for piece, tensor in zip(content.split(self.padded_sizes), tensors, strict=False):
            piece[: tensor.nbytes] = tensor.detach().contiguous().view(-1).view(torch.uint8)
        shard = content.chunk(dist.get_world_size())[dist.get_rank()]
        self.bytes = ShardedTensor(shard.cpu().pin_memory() if offload else shard.clone(), device)
        self.clear()

    def fill(self) -> None:
        """Make the tensors views of the gathered bytes."""
        pieces = self.bytes.gathered.split(self.padded_sizes)
        for (owner, name), (dtype, shape, size), piece in zip(self.attributes, self.formats, pieces, strict=False):
            setattr(owner, name, piece[:size].view(dtype).view(shape))

    def clear(self) -> None:
        for (owner, name), empty in zip(self.attributes, self.empty, strict=True):
            setattr(owner, name, empty)


class ShardedRows:
    """A frozen matrix (length, columns), read in chunks of `rows`; of each chunk every process stores `own_rows`."""

    def __init__(self, matrix: torch.Tensor, device: torch.device, base: "ShardedBase"):
        processes = dist.get_world_size()
        self.length, self.dtype, self.device, self.base = len(matrix), matrix.dtype, device, base
        self.own_rows = math.ceil(HEAD_ROWS / processes)
        self.rows = self.own_rows * processes
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % self.rows))
        shards = padded.view(-1, processes, self.own_rows, padded.shape[1])[:, dist.get_rank()]  # (chunks, own_rows, columns)
        self.shards = shards.cpu().pin_memory() if base.offload else shards.to(device, copy=True)
        self.chunks = [ShardedTensor(shard, device) for shard in self.shards]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield each chunk, (rows or fewer, columns), to be used before the next."""
        for number, chunk in enumerate(self.chunks):
            self.base.run_gather(partial(_wait_and_start_next, self.chunks, number, number + 1))
            yield chunk.gathered[: self.length - number * self.rows]

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows of the matrix, (B, T, columns), of the ids (B, T) of this process.

        All processes call this at once, with ids of one shape: each looks up its own rows for all of them.
        """
        all_ids = torch.empty(dist.get_world_size(), *ids.shape, dtype=ids.dtype, device=self.device)
        dist.all_gather_into_tensor(all_ids, ids[None].to(self.device).contiguous())
        chunk, row = all_ids // self.rows, all_ids % self.rows
        stored_here = row // self.own_rows == dist.get_rank()
        index = chunk * self.own_rows + row % self.own_rows
        found = self.shards.flatten(0, 1)[index.to(self.shards.device)].to(self.device)
        found = torch.where(stored_here[..., None], found, 0.0)
        dist.all_reduce(found)  # one process has the row, the others have zeros
        return found[dist.get_rank()]


class ShardedBase:
    """The sharded layers of a base model, and its embedding and head if they are sharded too.

    Attributes:
        parameters: weights that are sharded; a packed byte counts as two.
    """

    def __init__(self, offload: bool):
        self.offload = offload
        self.layers: list[ShardedLayer] = []
        self.layer_bytes: list[ShardedTensor] = []
        self.embedding: ShardedRows | None = None
        self.head: ShardedRows | None = None
        self.parameters = 0
        self.run_gather: Callable[[Action], None] = operator.call

    def allocate_buffers(self, device: torch.device) -> None:
        """Allocate two buffers after everything is sharded, so that one layer is gathered while the one before it is used."""
        self.layer_bytes = [layer.bytes for layer in self.layers]
        sequences = [self.layer_bytes, *(matrix.chunks for matrix in (self.embedding, self.head) if matrix)]
        size = max(tensor.size for tensors in sequences for tensor in tensors)
        buffers = torch.empty(2, ALIGNMENT * math.ceil(size / ALIGNMENT), dtype=torch.uint8, device=device)
        for tensors in sequences:
            for number, tensor in enumerate(tensors):
                tensor.set_buffer(buffers[number % 2])

    @contextmanager
    def intercept_gathers(self, handle: Callable[[Action], None]) -> Iterator[None]:
        """Pass each gather to `handle` instead of running it, while the context lasts."""
        self.run_gather = handle
        try:
            yield
        finally:
            self.run_gather = operator.call

    @contextmanager
    def gathered(self, number: int, then: int) -> Iterator[None]:
        """Fill layer `number` while the context lasts, and start to gather layer `then`."""
        self.run_gather(partial(_wait_and_start_next, self.layer_bytes, number, then))
        self.layers[number].fill()
        try:
            yield
        finally:
            self.layers[number].clear()


def load_sharded(
    folder: Path, quantization: BitsAndBytesConfig | None, device: str, dtype: torch.dtype, offload: bool, embedding: bool
) -> PreTrainedModel:
    """Load a Llama-like model layer by layer, keeping this process's shard of each; `sharded_base` returns the shards.

    Args:
        folder: with config.json and *.safetensors.
        offload: whether to store the shards in host memory.
        embedding: whether to shard embedding and head too.

    Raises:
        UserError: files or tensors are missing or damaged.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    stored, base, decoder = read_base(folder), ShardedBase(offload), model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(device)  # its angles are in no file
    for number, layer in enumerate(decoder.layers):
        if quantization:  # pack_skeleton would mark the model as one that the Trainer refuses
            replace_with_bnb_linear(layer, quantization_config=quantization)
        _read_parameters(layer, f"model.layers.{number}.", stored, device, dtype)
        projections = [module for group in projections_of(layer) for module in group]
        base.parameters += sum(module.in_features * module.out_features for module in projections)
        attributes = [attribute for module in projections for attribute in _large_tensors(module.weight)]
        base.layers.append(ShardedLayer(attributes, offload))
    _read_parameters(decoder.norm, "model.norm.", stored, device, dtype)
    head, place = model.get_output_embeddings(), "cpu" if embedding else device
    _read_parameters(decoder.embed_tokens, "model.embed_tokens.", stored, place, dtype)
    if model.config.tie_word_embeddings:
        head.weight = decoder.embed_tokens.weight
    else:
        _read_parameters(head, "lm_head.", stored, place, dtype)
    if embedding:
        _shard_embedding(decoder.embed_tokens, head, base, device)
    base.allocate_buffers(torch.device(device))
    if quantization:
        model.is_loaded_in_4bit = True  # as from_pretrained sets it, for peft
    model.sharded_base = base
    return model.eval()


def _read_parameters(module: Any, prefix: str, stored: dict[str, StoredTensor], device: str, dtype: torch.dtype) -> None:
    """Read a module's parameters one at a time, and pack those that are 4-bit."""
    for name, empty in list(module.named_parameters()):
        value = _find(prefix + name, tuple(empty.shape), stored).read().to(device, dtype)
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(empty, bitsandbytes.nn.Params4bit):
            packed: Any = bitsandbytes.nn.Params4bit(
                value, requires_grad=False, quant_type=empty.quant_type, compress_statistics=empty.compress_statistics,
                module=owner,
            )  # fmt: skip
            owner.weight = packed.to(device)
        else:
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=False))


def _find(name: str, shape: tuple[int, ...], stored: dict[str, StoredTensor]) -> StoredTensor:
    """Return a tensor of the files; raises UserError if they have none, or one of another shape."""
    if name not in stored:
        raise UserError("model.name", None, f"has no {name} in its files", "copy or download the model again")
    if stored[name].shape != shape:
        found, expected = (" x ".join(map(str, sizes)) for sizes in (stored[name].shape, shape))
        problem = f"has {name} of {found} in its files, and its config.json makes it {expected}"
        raise UserError("model.name", None, problem, "restore its config.json, or copy or download the model again")
    return stored[name]


def _large_tensors(weight: Any) -> list[Attribute]:
    """Return the tensors of a weight that are worth sharding: its packed bytes, and the absmax of their blocks."""
    state = getattr(weight, "quant_state", None)
    return [(weight, "data")] if state is None else [(weight, "data"), (state, "absmax")]


def _shard_embedding(embedding: Any, head: Any, base: ShardedBase, device: str) -> None:
    weights = {id(module.weight): module.weight for module in (embedding, head)}  # one entry if they are tied
    sharded = {key: ShardedRows(weight.data, torch.device(device), base) for key, weight in weights.items()}
    base.embedding, base.head = (sharded[id(module.weight)] for module in (embedding, head))
    for weight in weights.values():
        base.parameters += weight.numel()
        weight.data = torch.empty(0, dtype=weight.dtype, device=device)


def sharded_base(model: Any) -> ShardedBase | None:
    """Return the shards of a PEFT or base model, or None if it is not sharded."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "sharded_base", None)
