"""Checks of the 4-bit product, 8-bit Adam, bfloat16, attention, Triton, torch.compile and CUDA graphs, against fp32 on the CPU.

Each check returns its measurement, or raises CheckFailed or CheckSkipped. `requested` is the device that the user requested:
auto, cuda or cpu. Results y are compared with a reference r by the relative error |y - r| / |r| in the Frobenius norm. Rounding
to bfloat16 changes a number by up to 2⁻⁹ of itself (0.2 %), rounding to float16 by 2⁻¹², and both the output and the weights are
rounded; a wrong kernel is wrong by tens of percent. The limit of 1 % separates the two.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from qlora_kit.doctor.machine_checks import INSTALL_COMPILER, reinstall
from qlora_kit.doctor.run_checks import CheckFailed, CheckSkipped
from qlora_kit.model.device import choose_device, usable_dtype

# QLoRA (arXiv 2305.14314), appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ADAM_ERROR = 0.05  # 8 bits change a state by some percent; measured: below 1 % after four steps
ADAM_PARAMETERS = 2**17  # bitsandbytes pages only states of at least 100,000 values
OUT, IN, TOKENS = 256, 512, 16


def four_bit_product(requested: str) -> str:
    """Check x Wᵀ with NF4 weights and double quantization, for one token and for several: the kernels differ."""
    import bitsandbytes

    device, dtype = _device_and_dtype(requested)
    weight, state, reference = packed_weight(device, dtype)
    errors = []
    for tokens in (1, TOKENS):
        x = _random(tokens, IN).to(dtype)
        y = bitsandbytes.matmul_4bit(x.to(device), weight.t(), quant_state=state)
        errors.append(_error(y, x.float() @ reference.T))
    return _within(errors, LARGEST_ERROR[dtype], f"on the {device} in {_name(dtype)}", reinstall("bitsandbytes"))


def packed_weight(device: str, dtype: torch.dtype) -> tuple[Any, Any, torch.Tensor]:
    """Return a packed (OUT, IN) weight, its state, and the weight dequantized by hand, in fp32 on the CPU."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(_random(OUT, IN).to(device, dtype), compress_statistics=True, quant_type="nf4")
    outer = state.state2.absmax.cpu().repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    scales = state.state2.code.cpu()[state.absmax.cpu().view(-1).long()] * outer + state.offset.cpu()
    halves = torch.stack([packed.cpu().view(-1) >> 4, packed.cpu().view(-1) & 15], 1)  # two values a byte
    values = torch.tensor(NF4_LEVELS)[halves.view(-1).long()].view(-1, state.blocksize) * scales[:, None]
    return packed, state, values.view(OUT, IN)


def eight_bit_adam(requested: str) -> str:
    """Check four steps with an 8-bit state, paged on a GPU, against torch's AdamW."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    device = _device(requested)
    start = _random(ADAM_PARAMETERS)
    ours, plain = torch.nn.Parameter(start.to(device, copy=True)), torch.nn.Parameter(start.clone())
    kind = PagedAdamW8bit if device == "cuda" else AdamW8bit
    optimizers = kind([ours], lr=1e-3, weight_decay=0.0), torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.0)
    for step in range(4):
        plain.grad = _random(ADAM_PARAMETERS, seed=step + 1)
        ours.grad = plain.grad.to(device)
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[0].state[ours]["state1"]
    if state.dtype != torch.uint8:
        raise CheckFailed(f"the state is stored in {_name(state.dtype)}, not in 8 bits", reinstall("bitsandbytes"))
    if device == "cuda" and not getattr(state, "is_paged", False):
        raise CheckFailed("the state is not paged", reinstall("bitsandbytes"))
    error = _error(ours.detach().cpu() - start, plain.detach() - start)
    where = f"in the update of four steps on the {device}{', paged' if device == 'cuda' else ''}"
    return _within(error, ADAM_ERROR, where, reinstall("bitsandbytes"))


def bfloat16(requested: str) -> str:
    """Check a product in bfloat16."""
    device = _device(requested)
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise CheckSkipped(f"{torch.cuda.get_device_name()} does not support it: runs compute in float16")
    x, weight = _random(TOKENS, IN).bfloat16(), _random(OUT, IN).bfloat16()
    y = F.linear(x.to(device), weight.to(device))
    return _within(_error(y, x.float() @ weight.float().T), LARGEST_ERROR[torch.bfloat16], f"on the {device}", reinstall("torch"))


def attention(requested: str) -> str:
    """Check torch's kernels for causal attention, with the gradient of the queries, against the formula."""
    device, dtype = _device_and_dtype(requested)
    q, k, v = (_random(2, 4, 64, 64, seed=seed).to(dtype) for seed in range(3))  # (batch, heads, tokens, size)
    ours, plain = q.to(device, copy=True).requires_grad_(), q.to(torch.float32, copy=True).requires_grad_()
    y = F.scaled_dot_product_attention(ours, k.to(device), v.to(device), is_causal=True)
    y.float().square().sum().backward()
    future = torch.ones(64, 64, dtype=torch.bool).triu(1)
    scores = (plain @ k.float().mT / math.sqrt(64)).masked_fill(future, -torch.inf)
    expected = scores.softmax(-1) @ v.float()
    expected.square().sum().backward()
    assert ours.grad is not None and plain.grad is not None
    errors = [_error(y, expected), _error(ours.grad, plain.grad)]
    return _within(errors, LARGEST_ERROR[dtype], f"on the {device} in {_name(dtype)}", reinstall("torch"))


def triton_kernel(requested: str) -> str:
    """Check the project's own kernel, which unpacks 4-bit weights."""
    from qlora_kit.fast.nf4 import unpack_stacked

    device, dtype = _gpu_and_dtype_for_triton(requested)
    weight, state, reference = packed_weight(device, dtype)
    weight.quant_state = state
    unpacked = unpack_stacked((weight,), (None,), 0, dtype)
    return _within(_error(unpacked, reference), LARGEST_ERROR[dtype], f"in {_name(dtype)}", reinstall("torch"))


def compiled_function(requested: str) -> str:
    """Check a function that torch.compile fuses."""
    device, dtype = _gpu_and_dtype_for_triton(requested)
    gate, up = _random(TOKENS, IN).to(dtype), _random(TOKENS, IN, seed=1).to(dtype)
    y = torch.compile(lambda a, b: F.silu(a) * b)(gate.to(device), up.to(device))
    return _within(_error(y, F.silu(gate.float()) * up.float()), LARGEST_ERROR[dtype], f"in {_name(dtype)}", reinstall("torch"))


def captured_graph(requested: str) -> str:
    """Check a product that is captured in a CUDA graph and replayed with other inputs."""
    from qlora_kit.fast.micro_step import why_not_graphed

    device, dtype = _device_and_dtype(requested)
    if reason := why_not_graphed(device):
        raise CheckSkipped(reason)
    x, weight = _random(TOKENS, IN, seed=1).to(dtype), _random(OUT, IN).to(dtype)
    on_gpu = weight.to(device)
    replay: Any = torch.cuda.make_graphed_callables(
        lambda inputs: F.linear(inputs, on_gpu), (torch.zeros_like(x, device=device),)
    )
    error = _error(replay(x.to(device)), x.float() @ weight.float().T)
    fix = "update the driver, or train with --set performance.cuda_graphs=false"
    return _within(error, LARGEST_ERROR[dtype], f"in {_name(dtype)}", fix)


def _device(requested: str) -> str:
    if requested == "cuda" and not torch.cuda.is_available():
        raise CheckSkipped("torch finds no GPU")
    return choose_device(requested)


def _device_and_dtype(requested: str) -> tuple[str, torch.dtype]:
    """Return the device, and the dtype of a run with quantization.compute_dtype auto."""
    device = _device(requested)
    return device, usable_dtype("auto", device)[0]


def _gpu_and_dtype_for_triton(requested: str) -> tuple[str, torch.dtype]:
    from qlora_kit.fast.nf4 import why_no_triton

    device, dtype = _device_and_dtype(requested)
    if device == "cpu":
        raise CheckSkipped("needs a CUDA GPU")
    if reason := why_no_triton():
        raise CheckFailed(f"{reason}; runs continue without it, slower", INSTALL_COMPILER)
    return device, dtype


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().cpu().float() - expected.detach()).norm() / expected.detach().norm())


def _within(errors: float | list[float], largest: float, what: str, fix: str) -> str:
    error = float(torch.tensor(errors).max())  # NaN if one of them is
    measured = f"relative error {error:.1e} {what}"
    if not error <= largest:  # true for NaN as well
        raise CheckFailed(f"{measured}, more than {largest:.0e}", fix)
    return measured


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
