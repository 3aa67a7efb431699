"""Cross-entropy over a frozen output head, a few rows at a time: the full logits never exist.

At Qwen2.5-3B's vocabulary the library's loss holds 14 bytes for each of 151,936 logits a token: 1.01 GiB for 512 tokens.
Here a chunk of rows at a time goes through the head, and its gradient is taken while it is there. What is kept for the
backward pass is the gradient of the hidden states alone, (N, H) in their own dtype.

Covers models whose logits are the head's product with the decoder's last hidden state and nothing else: memory.LLAMA_LIKE.
"""

from typing import Any

import torch
import torch.nn.functional as F

from qlora_kit.memory import CHUNK_ROWS, GRAPH_READY, LLAMA_LIKE

IGNORED = -100


class ChunkedCrossEntropy(torch.autograd.Function):
    """losses[n] = logsumexp(hidden[n] Wᵀ) - (hidden[n] Wᵀ)[target[n]], zero where the target is ignored; W has no gradient.

    d losses[n] / d hidden[n] = (softmax(hidden[n] Wᵀ) - onehot(target[n])) W, the same in every chunk whatever is done with the
    losses later, so it is computed in the forward pass and scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int) -> torch.Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)  # (N,)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, H)
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            counted = targets[rows] != IGNORED
            target = targets[rows].where(counted, 0)[:, None]  # (rows, 1)
            logits = F.linear(hidden[rows], weight).float()  # (rows, V); what follows works in this one buffer
            logits.sub_(logits.amax(-1, keepdim=True))
            target_logit = logits.gather(1, target)  # (rows, 1)
            total = logits.exp_().sum(-1, keepdim=True)
            losses[rows] = torch.where(counted, (total.log() - target_logit)[:, 0], 0.0)
            if gradient is not None:
                softmax = logits.div_(total)
                softmax.scatter_add_(1, target, torch.full_like(total, -1.0))
                gradient[rows] = (softmax.to(weight.dtype) @ weight) * counted[:, None]
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None


def chunked_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int = CHUNK_ROWS
) -> torch.Tensor:
    """Loss of each token in nats, fp32.

    Args:
        hidden: (N, H), the decoder's output after its last norm.
        weight: (V, H), the frozen head.
        targets: (N,), the next token of each position; -100 counts as no loss and gives no gradient.
    """
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen here
        return ChunkedCrossEntropy.apply(hidden.to(weight.dtype), weight, targets, chunk_rows)


def token_losses(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each label but the first of each row, predicted from what stands before it.

    Args:
        model: a causal language model, with or without PEFT around it.
        ids, labels: (B, T).

    Returns:
        (B, T - 1), nats in fp32; zero where the label is -100.
    """
    targets = labels[:, 1:]  # (B, T - 1)
    parts = decoder_and_head(model)
    if parts is None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
        rows = zip(logits, targets, strict=True)  # a row at a time: its fp32 copy is the largest tensor
        return torch.stack([F.cross_entropy(row.float(), target, reduction="none", ignore_index=IGNORED) for row, target in rows])
    decoder, head = parts
    # Left to make its own mask, transformers waits for the GPU to see whether sequences are packed; here none are.
    mask = {"full_attention": None} if takes_mask_by_kind(decoder) else None
    hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, H)
    return chunked_losses(hidden.flatten(0, 1), head.weight, targets.flatten()).view_as(targets)


def takes_mask_by_kind(decoder: Any) -> bool:
    """Whether the decoder accepts a mask for each kind of attention, and has full causal attention only."""
    kinds = getattr(decoder.config, "layer_types", None)
    return decoder.config.model_type in GRAPH_READY and set(kinds or []) == {"full_attention"}


def decoder_and_head(model: Any) -> tuple[Any, torch.nn.Linear] | None:
    """The two parts between which the loss is taken, or None when the model does more between them, or its head is trained."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(base, "config", None), "model_type", None) not in LLAMA_LIKE:
        return None
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
        return None
    return base.get_decoder(), head
