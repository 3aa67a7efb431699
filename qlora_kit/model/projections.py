"""The projections of a model: which of their weights are in 4 bits.

A projection is a matrix that a decoder multiplies its activations with: every linear layer but the output head, and the matrices
of experts, which many models keep in one tensor (experts, out, in) that bitsandbytes does not pack.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from torch.nn import Linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

NO_PROJECTIONS = (torch.nn.Embedding, torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._NormBase)
EXPERTS = "experts"


class Projection(NamedTuple):
    """One matrix, or one matrix of each expert in one tensor."""

    name: str  # of the layer, or of the tensor where the layer is none of torch's
    kind: str  # last part of the layer's or of the tensor's name, or EXPERTS
    weights: int
    owner: Any  # the module that holds it
    bits: int  # of each weight


@dataclass
class Packing:
    """How many of a model's projection weights are in 4 bits."""

    packed: int = 0
    unpacked: Counter[str] = field(default_factory=Counter)  # weights by kind
    bits: int = 16  # of a weight that is not packed

    @property
    def weights(self) -> int:
        return self.packed + self.unpacked.total()

    def as_json(self) -> dict[str, Any]:
        return {"weights": self.weights, "weights_in_4bit": self.packed, "other_weights": dict(self.unpacked)}

    @property
    def kinds(self) -> str:
        """Return what is not packed, the largest first."""
        named = ", ".join(f"{kind} ({count:,})" for kind, count in self.unpacked.most_common(5))
        return named + (f" and {len(self.unpacked) - 5} more kinds" if len(self.unpacked) > 5 else "")

    def __str__(self) -> str:
        if not self.unpacked:
            return f"all {self.packed:,} weights in 4 bits"
        left = f"{self.unpacked.total():,} of {self.weights:,} stay in {self.bits} bits: {self.kinds}"
        return f"{self.packed:,} of {self.weights:,} weights in 4 bits; {left}"


def find_projections(model: PreTrainedModel) -> list[Projection]:
    """Return every projection of a model, in the order of its modules."""
    head, found = model.get_output_embeddings(), []
    for name, module in model.named_modules():
        if module is head or isinstance(module, NO_PROJECTIONS):
            continue
        if isinstance(module, Linear):  # whose weight may be packed, or sharded over processes
            bits = 4 if isinstance(module, Linear4bit) else 8 * module.weight.element_size()
            found.append(Projection(name, _last(name), module.in_features * module.out_features, module, bits))
            continue
        for own, tensor in module.named_parameters(recurse=False):
            if tensor.dim() > 2 or (tensor.dim() == 2 and own.endswith(("weight", "proj"))):  # no bias of experts, no A_log
                full = name if isinstance(module, Conv1D) else f"{name}.{own}"
                found.append(Projection(full, _kind(name, own, tensor), tensor.numel(), module, 8 * tensor.element_size()))
    return found


def _kind(owner: str, own: str, tensor: torch.Tensor) -> str:
    if tensor.dim() == 3 and len(tensor) > 1:
        return EXPERTS
    return _last(owner) if own == "weight" else own


def _last(name: str) -> str:
    """Return the last part of a module's name that is no number."""
    parts = [part for part in name.split(".") if not part.isdigit() and part != "base_layer"]  # which peft inserts
    return parts[-1] if parts else name


def count_packed(model: PreTrainedModel) -> Packing:
    """Count the projection weights of a loaded model, or of a packed skeleton, that are in 4 bits, and the others by kind."""
    packing = Packing()
    for projection in find_projections(model):
        if projection.bits == 4:
            packing.packed += projection.weights
        else:
            packing.unpacked[projection.kind] += projection.weights
            packing.bits = projection.bits
    return packing
