"""Micro-steps of one fixed shape, each captured once as a CUDA graph (of a divided base: as several) and then replayed.

At micro-batch 1 the kernels of a step take longer to launch than to run; a replay launches them as one. Under capture nothing may
wait for the GPU and every tensor keeps its place, so inputs are copied into buffers of this module. A batch that is smaller than
the shape (the last of an epoch) is filled up with rows that count for nothing: there is one shape only.
"""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

from qlora_kit.errors import UserError, unsupported
from qlora_kit.fast.nf4 import why_no_triton
from qlora_kit.fast.projection import draw_keys
from qlora_kit.fast.training_pass import GROUPS, FastDecoder
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.loss import IGNORED

WARM_UP_RUNS = 2  # outside the graph: libraries choose algorithms and allocate workspaces at their first call


class MicroStep:
    """Forward and backward, or the losses alone, of one micro-batch of (batch, length) tokens or fewer rows.

    Args:
        packed: whether `starts` comes with each micro-batch (attention.py).
        seed: of dropout, which follows from (seed, optimizer step, micro-step): a resumed run draws what an unbroken one drew.
        captured: whether to use CUDA graphs; without, the same functions run one kernel after the other.
        turn: (r, n) where n processes take turns and this is number r: the k-th micro-step here is number k · n + r of the step.
        give_up: told why compiling or capturing failed, before the plain functions take over; None: the error is raised.
    """

    def __init__(
        self,
        decoder: FastDecoder,
        batch: int,
        length: int,
        seed: int,
        captured: bool,
        give_up: Callable[[str], None] | None = None,
        packed: bool = False,
        turn: tuple[int, int] = (0, 1),
    ):
        self.decoder, self.seed, self.captured, self.give_up = decoder, seed, captured, give_up
        self.turn = turn
        device = decoder.adapters.flat.device
        ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.inputs = ids
        if decoder.embedded_before:
            self.inputs = torch.zeros(batch, length, decoder.hidden, dtype=decoder.dtype, device=device)
        self.labels = torch.full_like(ids, IGNORED)
        self.starts = torch.zeros_like(ids) if packed else None
        self.share = torch.zeros((), device=device)
        self.keys = torch.zeros(len(decoder.layers), len(GROUPS), dtype=torch.int32, device=device)
        self.step, self.number = 0, 0  # of the optimizer step, and of the micro-step within it
        self.ways: dict[str, Callable[[], torch.Tensor]] = {}  # how to run what ran before: by replay, or plainly
        self.stream: Any = torch.cuda.Stream() if captured else None
        self.pool: Any = torch.cuda.MemPool() if captured else None

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch of an optimizer step."""
        self.decoder.adapters.clear_gradients()
        self.step, self.number = step, 0

    def train(
        self, ids: torch.Tensor, labels: torch.Tensor, share: torch.Tensor, starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add the gradients of share · Σ losses to the adapters'; returns that loss, (), which the next call overwrites."""
        self._fill(ids, labels, starts)
        self.share.copy_(share, non_blocking=True)
        number = self.number * self.turn[1] + self.turn[0]
        self.keys.copy_(draw_keys((self.seed, self.step, number), self.keys.numel()).view_as(self.keys), non_blocking=True)
        self.number += 1
        return self._run("train", lambda: self.decoder.accumulate(self.inputs, self.labels, self.share, self.keys, self.starts))

    def losses(self, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Loss of each label but the first of each row, (rows, length - 1), nats in fp32; the next call overwrites it."""
        self._fill(ids, labels, starts)
        return self._run("losses", lambda: self.decoder.losses(self.inputs, self.labels, self.starts))[: len(ids), :-1]

    def smaller(self, batch: int) -> "MicroStep":
        """The same for fewer rows; this one gives its graphs and their memory up and is of no more use."""
        self.ways.clear()
        self.pool = None
        self.decoder.keep_weights = False  # they are no fewer for a smaller batch
        packed = self.starts is not None
        return MicroStep(self.decoder, batch, self.labels.shape[1], self.seed, self.captured, self.give_up, packed, self.turn)

    def _fill(self, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None) -> None:
        rows = len(ids)
        if self.decoder.embedded_before:
            every = self.decoder.embed(F.pad(ids, (0, 0, 0, len(self.labels) - rows)))  # as many rows in each process
            self.inputs.copy_(every.pin_memory() if every.is_cpu and self.inputs.is_cuda else every, non_blocking=True)
        else:
            self.inputs[:rows].copy_(ids, non_blocking=True)
        self.labels[:rows].copy_(labels, non_blocking=True)
        if self.starts is not None:
            self.starts[:rows].copy_(starts, non_blocking=True) if starts is not None else self.starts.zero_()
        if rows < len(self.labels):
            self.labels[rows:].fill_(IGNORED)

    def _run(self, name: str, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self.ways:
            self.ways[name] = self._prepare(name, function)
        return self.ways[name]()

    def _prepare(self, name: str, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The way to run `function` from now on: by replay, or plainly where capturing or compiling fails."""
        assert name == "losses" or self.number == 1, "the trial adds to the gradient, which is empty at a step's first micro-step"
        try:
            if self.captured:
                return self._capture(function)
            if self.give_up:
                function()
        except Exception as error:
            if self.give_up is None or is_out_of_memory(error):
                raise
            self.give_up(" ".join(str(error).split())[:200])
            self.decoder.compiled, self.captured, self.give_up = False, False, None
        finally:
            if name == "train":
                self.decoder.adapters.gradient.zero_()
        return function

    def _capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        torch.cuda.empty_cache()  # a pool of its own cannot use what others hold back
        self.stream.wait_stream(torch.cuda.current_stream())
        recording = Recording(self.pool, self.stream)
        # One pool and one stream for warm-up and capture, training and evaluation: each reuses what the others left. (The warm-up
        # of the attention's backward pass runs in autograd's own thread, which does not see the pool.)
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            for _ in range(WARM_UP_RUNS):
                function()
        torch.cuda.synchronize()
        with self.decoder.gathering(recording.step_out):
            result = recording.record(function)
        torch.cuda.current_stream().wait_stream(self.stream)

        def replay() -> torch.Tensor:
            for piece in recording.pieces:
                piece()
            return result

        return replay


class Recording:
    """A pass captured as CUDA graphs, and in their order what no graph holds: the gathering of a divided base (sharding.py)."""

    def __init__(self, pool: Any, stream: Any):
        self.pool, self.stream = pool, stream
        self.pieces: list[Callable[[], None]] = []
        self.capture = ExitStack()

    def record(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `function` returns; it has its values after each run of `pieces`."""
        with warnings.catch_warnings(), self.capture:
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # before the first gathering
            self._begin()
            return function()

    def step_out(self, action: Callable[[], None]) -> None:
        """Run it at once, between two graphs, and then at every replay."""
        self.capture.close()
        action()
        self.pieces.append(action)
        self._begin()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread goes on asking about what was gathered before.
        capture = torch.cuda.graph(graph, self.pool.id, self.stream, capture_error_mode="thread_local")
        self.capture.enter_context(capture)
        self.pieces.append(graph.replay)


def why_not_compiled(device: str) -> str | None:
    """Return why torch.compile cannot work on a device type, or None."""
    return why_no_triton() if device == "cuda" else "needs a CUDA GPU"


def why_not_graphed(device: str) -> str | None:
    """Return why CUDA graphs cannot work on a device type, or None."""
    return None if device == "cuda" else "needs a CUDA GPU"


def why_not_used(key: str, value: bool | str, reason: str | None) -> str | None:
    """Return why a technique is not used, or None if it is.

    Args:
        key: its setting, true, false or "auto".
        reason: why it cannot work, or None if it can.

    Raises:
        UserError: the setting is true and the technique cannot work.
    """
    if value is True and reason:
        raise UserError.of([unsupported(key, reason, "auto or false")])
    return reason if value else f"{key} is false"
