"""Profile one micro-step of a random Qwen2.5-3B: GPU milliseconds for each kind of kernel.

    python benchmarks/step_profile.py --tokenizer DIR --micro-batch 16 --recomputed 0

Dropout 0.05, rank 16, 512 tokens, compiled and captured as in training. The name of a kernel decides its kind; `other` is every
name that matches none. The last line compares the sum with the time of a replay without the profiler: the rest is gaps between
kernels.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path

from runs import ROOT, checkpoint_parser, in_own_process, random_checkpoint, require_gpu

LENGTH, REPLAYS = 512, 8
KINDS = {  # the first whose word occurs in a kernel's name
    "unpacking 4-bit weights": ("_unpack_kernel",),
    "attention": ("sdpa", "flash", "fmha", "cudnn"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK", "cublas"),
    "fused elementwise": ("triton_", "_activate"),
    "copies": ("memcpy", "memset"),
}


def main() -> None:
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--micro-batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument("--recomputed", type=int, default=36, metavar="N", help="layers recomputed (default: all 36)")
    arguments = parser.parse_args()
    require_gpu()
    with random_checkpoint("3B", arguments.tokenizer, arguments.checkpoints) as checkpoint:
        print(in_own_process(profile_step, checkpoint, arguments.micro_batch, arguments.recomputed))


def profile_step(checkpoint: Path, micro_batch: int, recomputed: int) -> str:
    """Return a Markdown table of one micro-step."""
    sys.path.insert(0, str(ROOT))
    from qlora_kit.cli import prepare_libraries

    prepare_libraries()
    import torch
    from torch.profiler import ProfilerActivity, profile

    from qlora_kit.fast.micro_step import MicroStep, StepSettings
    from qlora_kit.fast.training_pass import FastDecoder
    from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training

    model, _ = load_model_and_tokenizer(str(checkpoint), create_bnb_config())
    model = prepare_model_for_training(model, create_lora_config(), use_gradient_checkpointing=False)
    settings = StepSettings(micro_batch, LENGTH, seed=0, captured=True)
    micro = MicroStep(FastDecoder(model, recomputed, compiled=True), settings)
    ids = torch.randint(150_000, (micro_batch, LENGTH)).pin_memory()
    loss_scale = torch.tensor(1.0 / ids.numel(), device="cuda")
    micro.begin_step(0)
    micro.train(ids, ids, loss_scale)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(REPLAYS):
        micro.train(ids, ids, loss_scale)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - started) / REPLAYS * 1e3
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        micro.train(ids, ids, loss_scale)
        torch.cuda.synchronize()
    spent, count = defaultdict(float), defaultdict(int)
    for kernel in recorded.key_averages():
        spent[kind_of(kernel.key)] += kernel.device_time_total / 1e3
        count[kind_of(kernel.key)] += kernel.count
    lines = [f"| {micro_batch} x {LENGTH}, {recomputed} layers recomputed | ms | kernels |", "|---|---|---|"]
    lines += [f"| {kind} | {spent[kind]:.1f} | {count[kind]:,} |" for kind in sorted(spent, key=lambda kind: -spent[kind])]
    lines.append(f"| sum, of {wall:.1f} ms a replay | {sum(spent.values()):.1f} | {sum(count.values()):,} |")
    return "\n".join(lines)


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in kernel for word in words)), "other")


if __name__ == "__main__":
    main()
