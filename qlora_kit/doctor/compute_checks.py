"""Checks of what a run computes, each against plain torch in fp32 on the CPU. Each raises Problem or Skipped.

`wanted` is a device as it was asked for: auto, cuda or cpu. Products are compared by the relative error |y - r| / |r| in the
Frobenius norm. A value rounded to bfloat16 is off by up to 2⁻⁹ of itself, 0.2 %, to float16 by 2⁻¹²; an output and the weights
behind it are rounded, and a wrong kernel is wrong by tens of percent: 1 % lies between.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from qlora_kit.doctor.machine_checks import reinstall
from qlora_kit.doctor.run_checks import Problem, Skipped
from qlora_kit.model.device import choose_device, usable_dtype

# QLoRA (arXiv 2305.14314), appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ADAM_ERROR = 0.05  # an 8-bit state is off by some percent of each value; measured below 1 % after four steps
ADAM_PARAMETERS = 2**17  # bitsandbytes pages states of 100,000 values and more
OUT, IN, TOKENS = 256, 512, 16


def four_bit_product(wanted: str) -> str:
    """x Wᵀ with NF4 weights and doubly quantized scales, for one token and for many, which take kernels of their own."""
    import bitsandbytes

    device, dtype = _device_and_dtype(wanted)
    weight, state, reference = packed_weight(device, dtype)
    errors = []
    for tokens in (1, TOKENS):
        x = _random(tokens, IN).to(dtype)
        y = bitsandbytes.matmul_4bit(x.to(device), weight.t(), quant_state=state)
        errors.append(_error(y, x.float() @ reference.T))
    return _within(errors, LARGEST_ERROR[dtype], f"on the {device} in {_name(dtype)}", reinstall("bitsandbytes"))


def packed_weight(device: str, dtype: torch.dtype) -> tuple[Any, Any, torch.Tensor]:
    """A packed (OUT, IN) weight, its state, and by hand what it stands for, fp32 on the CPU."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(_random(OUT, IN).to(device, dtype), compress_statistics=True, quant_type="nf4")
    outer = state.state2.absmax.cpu().repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    scales = state.state2.code.cpu()[state.absmax.cpu().view(-1).long()] * outer + state.offset.cpu()
    halves = torch.stack([packed.cpu().view(-1) >> 4, packed.cpu().view(-1) & 15], 1)  # two values a byte
    values = torch.tensor(NF4_LEVELS)[halves.view(-1).long()].view(-1, state.blocksize) * scales[:, None]
    return packed, state, values.view(OUT, IN)


def eight_bit_adam(wanted: str) -> str:
    """Four steps with the state in 8 bits, paged on a GPU, beside torch's AdamW."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    device = _device(wanted)
    start = _random(ADAM_PARAMETERS)
    ours, plain = torch.nn.Parameter(start.to(device, copy=True)), torch.nn.Parameter(start.clone())
    kind = PagedAdamW8bit if device == "cuda" else AdamW8bit
    optimizers = kind([ours], lr=1e-3, weight_decay=0.0), torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.0)
    for step in range(4):
        plain.grad = _random(ADAM_PARAMETERS, seed=step + 1)
        ours.grad = plain.grad.to(device)
        for optimizer in optimizers:
            optimizer.step()
    held = optimizers[0].state[ours]["state1"]
    if held.dtype != torch.uint8:
        raise Problem(f"the state is held in {_name(held.dtype)}, not in 8 bits", reinstall("bitsandbytes"))
    paged = getattr(held, "is_paged", False)
    if device == "cuda" and not paged:
        raise Problem("the state is not paged", reinstall("bitsandbytes"))
    error = _error(ours.detach().cpu() - start, plain.detach() - start)
    where = f"in the update of four steps on the {device}{', paged' if paged else ''}"
    return _within(error, ADAM_ERROR, where, reinstall("bitsandbytes"))


def bfloat16(wanted: str) -> str:
    """A product in bfloat16."""
    device = _device(wanted)
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Skipped(f"{torch.cuda.get_device_name()} lacks it: runs compute in float16")
    x, weight = _random(TOKENS, IN).bfloat16(), _random(OUT, IN).bfloat16()
    y = F.linear(x.to(device), weight.to(device))
    return _within(_error(y, x.float() @ weight.float().T), LARGEST_ERROR[torch.bfloat16], f"on the {device}", reinstall("torch"))


def attention(wanted: str) -> str:
    """Causal attention and its gradient by torch's kernels, beside the softmax written out."""
    device, dtype = _device_and_dtype(wanted)
    q, k, v = (_random(2, 4, 64, 64, seed=seed).to(dtype) for seed in range(3))  # (batch, heads, tokens, size)
    ours, plain = q.to(device, copy=True).requires_grad_(), q.to(torch.float32, copy=True).requires_grad_()
    y = F.scaled_dot_product_attention(ours, k.to(device), v.to(device), is_causal=True)
    y.float().square().sum().backward()
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    scores = (plain @ k.float().mT / math.sqrt(64)).masked_fill(hidden, -torch.inf)
    expected = scores.softmax(-1) @ v.float()
    expected.square().sum().backward()
    assert ours.grad is not None and plain.grad is not None
    errors = [_error(y, expected), _error(ours.grad, plain.grad)]
    return _within(errors, LARGEST_ERROR[dtype], f"on the {device} in {_name(dtype)}", reinstall("torch"))


def triton_kernel(wanted: str) -> str:
    """The project's own kernel, which unpacks 4-bit weights."""
    from qlora_kit.fast.nf4 import unpack_stacked, why_no_triton

    device, dtype = _device_and_dtype(wanted)
    if device == "cpu":
        raise Skipped("needs a CUDA GPU")
    if reason := why_no_triton():
        raise Problem(f"{reason}; runs go on without, slower", "sudo apt install gcc python3-dev")
    weight, state, reference = packed_weight(device, dtype)
    weight.quant_state = state
    unpacked = unpack_stacked((weight,), (None,), 0, dtype)
    return _within(_error(unpacked, reference), LARGEST_ERROR[dtype], f"in {_name(dtype)}", reinstall("torch"))


def compiled_function(wanted: str) -> str:
    """A function fused by torch.compile."""
    from qlora_kit.fast.micro_step import why_not_compiled

    device, dtype = _device_and_dtype(wanted)
    if device == "cpu":
        raise Skipped("needs a CUDA GPU")
    if reason := why_not_compiled(device):
        raise Problem(f"{reason}; runs go on without, slower", "sudo apt install gcc python3-dev")
    gate, up = _random(TOKENS, IN).to(dtype), _random(TOKENS, IN, seed=1).to(dtype)
    y = torch.compile(lambda a, b: F.silu(a) * b)(gate.to(device), up.to(device))
    return _within(_error(y, F.silu(gate.float()) * up.float()), LARGEST_ERROR[dtype], f"in {_name(dtype)}", reinstall("torch"))


def captured_graph(wanted: str) -> str:
    """A product captured in a CUDA graph, replayed with other inputs."""
    from qlora_kit.fast.micro_step import why_not_graphed

    device, dtype = _device_and_dtype(wanted)
    if reason := why_not_graphed(device):
        raise Skipped(reason)
    x, weight = torch.zeros(TOKENS, IN, dtype=dtype, device=device), _random(OUT, IN).to(dtype)
    there = weight.to(device)
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        F.linear(x, there)  # the library makes its workspace at its first call, which may not be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = F.linear(x, there)
    inputs = _random(TOKENS, IN, seed=1).to(dtype)
    x.copy_(inputs)
    graph.replay()
    error = _error(y, inputs.float() @ weight.float().T)
    return _within(
        error, LARGEST_ERROR[dtype], f"in {_name(dtype)}", "update the driver, or train with --set performance.cuda_graphs=false"
    )


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Skipped("torch sees no GPU")
    return choose_device(wanted)


def _device_and_dtype(wanted: str) -> tuple[str, torch.dtype]:
    """The dtype is that of a run with quantization.compute_dtype auto."""
    device = _device(wanted)
    return device, usable_dtype("auto", device)[0]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().cpu().float() - expected.detach()).norm() / expected.detach().norm())


def _within(errors: float | list[float], largest: float, what: str, fix: str) -> str:
    error = float(torch.tensor(errors).max())  # NaN where one of them is
    measured = f"relative error {error:.1e} {what}"
    if not error <= largest:  # nor is NaN
        raise Problem(f"{measured}, more than {largest:.0e}", fix)
    return measured


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
