"""One micro-batch as a CUDA graph: captured at its first pass, replayed afterwards.

At micro-batch 1 the kernels of a pass take longer to launch than to run; a replay launches all of them at once. A captured pass
must not wait for the GPU and finds its tensors at fixed addresses, so inputs are copied into the buffers of MicroStep. A smaller
batch (the last of an epoch) is filled up with rows without labels, so that there is one shape only. The pass of a sharded base
model is several graphs, between which its weights are gathered.
"""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.errors import UserError, unsupported
from qlora_kit.fast.nf4 import why_no_triton
from qlora_kit.fast.projection import draw_keys
from qlora_kit.fast.training_pass import GROUPS, FastDecoder
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.loss import IGNORED

WARM_UP_RUNS = 2  # before capturing: libraries choose algorithms and allocate workspaces at their first call

Pass = Callable[[], torch.Tensor]


class StepSettings(NamedTuple):
    """Shape of a micro-batch, and how its pass runs."""

    rows: int
    length: int  # tokens of a row
    seed: int  # dropout depends on (seed, optimizer step, micro-step) alone, so a resumed run draws what an unbroken one draws
    captured: bool  # whether to use CUDA graphs
    most_records: int = 0  # in a row, if `starts` comes with each micro-batch (attention.py)
    rank: int = 0  # of this process; micro-step k here is micro-step k · processes + rank of the optimizer step
    processes: int = 1


class MicroStep:
    """Forward and backward pass, or the losses alone, of micro-batches of one shape.

    Args:
        on_fallback: called with the reason when compiling or capturing fails, before the pass runs without them; None: the
            error is raised.
    """

    def __init__(self, decoder: FastDecoder, settings: StepSettings, on_fallback: Callable[[str], None] | None = None):
        self.decoder, self.settings, self.on_fallback = decoder, settings, on_fallback
        device = decoder.adapters.flat.device
        ids = torch.zeros(settings.rows, settings.length, dtype=torch.long, device=device)
        self.inputs = ids
        if decoder.embeds_outside_graph:
            self.inputs = torch.zeros(*ids.shape, decoder.hidden, dtype=decoder.dtype, device=device)
        self.labels = torch.full_like(ids, IGNORED)
        self.starts = torch.zeros_like(ids) if settings.most_records else None
        self.loss_scale = torch.zeros((), device=device)
        self.keys = torch.zeros(len(decoder.layers), len(GROUPS), dtype=torch.int32, device=device)
        self.step, self.number = 0, 0  # the optimizer step, and the micro-step within it
        self.runners: dict[str, Pass] = {}  # graph replay, or the plain function
        self.stream = torch.cuda.Stream() if settings.captured else None
        self.pool = torch.cuda.MemPool() if settings.captured else None

    def begin_step(self, step: int) -> None:
        """Clear the gradients before the first micro-batch of optimizer step `step`."""
        self.decoder.adapters.clear_gradients()
        self.step, self.number = step, 0

    def train(
        self, ids: torch.Tensor, labels: torch.Tensor, loss_scale: torch.Tensor, starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add the gradients of loss_scale · Σ losses to the adapters', and return that scaled loss.

        Args:
            ids, labels, starts: (rows or fewer, length).
            loss_scale: (), 1 / the tokens that the optimizer step predicts; in float16 times the scale of the GradScaler.

        Returns:
            (), which the next call overwrites.
        """
        self._fill(ids, labels, starts)
        self.loss_scale.copy_(loss_scale, non_blocking=True)
        number = self.number * self.settings.processes + self.settings.rank
        keys = draw_keys((self.settings.seed, self.step, number), self.keys.numel())
        self.keys.copy_(keys.view_as(self.keys), non_blocking=True)
        self.number += 1
        given = (self.inputs, self.labels, self.loss_scale, self.keys, self.starts, self.settings.most_records)
        return self._run("train", lambda: self.decoder.accumulate(*given))

    def losses(self, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss of each label but the first of each row, (rows, length - 1), nats in fp32.

        The next call overwrites it.
        """
        self._fill(ids, labels, starts)
        given = (self.inputs, self.labels, self.starts, self.settings.most_records)
        return self._run("losses", lambda: self.decoder.losses(*given))[: len(ids), :-1]

    def smaller(self, rows: int) -> "MicroStep":
        """Return a MicroStep for fewer rows, and free the graphs of this one, which must not be used any more."""
        self.runners.clear()
        self.pool = None
        return MicroStep(self.decoder, self.settings._replace(rows=rows), self.on_fallback)

    def _fill(self, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None) -> None:
        rows, missing = len(ids), self.settings.rows - len(ids)
        if self.decoder.embeds_outside_graph:
            embedded = self.decoder.embed(F.pad(ids, (0, 0, 0, missing)))  # the same number of rows in each process
            self.inputs.copy_(embedded.pin_memory() if embedded.is_cpu and self.inputs.is_cuda else embedded, non_blocking=True)
        else:
            self.inputs[:rows].copy_(ids, non_blocking=True)
        self.labels[:rows].copy_(labels, non_blocking=True)
        if self.starts is not None:
            self.starts[:rows].copy_(starts, non_blocking=True) if starts is not None else self.starts.zero_()
        if missing:
            self.labels[rows:].fill_(IGNORED)

    def _run(self, name: str, function: Pass) -> torch.Tensor:
        if name not in self.runners:
            self.runners[name] = self._prepare(name, function)
        return self.runners[name]()

    def _prepare(self, name: str, function: Pass) -> Pass:
        """Return what runs `function` from now on: graph replay, or the function itself, also if capturing or compiling fails."""
        assert name == "losses" or self.number == 1, "a trial run adds to the gradient, so the gradient must be zero"
        try:
            if self.settings.captured:
                return self._capture(function)
            if self.on_fallback:
                function()
        except Exception as error:
            if self.on_fallback is None or is_out_of_memory(error):
                raise
            self.on_fallback(" ".join(str(error).split())[:200])
            self.decoder.compiled, self.settings, self.on_fallback = False, self.settings._replace(captured=False), None
        finally:
            if name == "train":
                self.decoder.adapters.gradient.zero_()
        return function

    def _capture(self, function: Pass) -> Pass:
        assert self.pool is not None and self.stream is not None
        torch.cuda.empty_cache()  # the graph's own pool cannot use memory that the common pool has reserved
        self.stream.wait_stream(torch.cuda.current_stream())
        recording = Recording(self.pool, self.stream)
        # One pool and one stream for warm-up and capture, training and evaluation: each reuses the memory of the others. (The
        # warm-up of the attention's backward pass runs in a thread of autograd, which does not use the pool.)
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            for _ in range(WARM_UP_RUNS):
                function()
        torch.cuda.synchronize()
        with self.decoder.intercept_gathers(recording.run_outside_graph):
            result = recording.record(function)
        torch.cuda.current_stream().wait_stream(self.stream)

        def replay() -> torch.Tensor:
            for piece in recording.pieces:
                piece()
            return result

        return replay


class Recording:
    """A pass as a sequence of CUDA graphs and, between them, the gathers of a sharded base model (sharding.py)."""

    def __init__(self, pool: torch.cuda.MemPool, stream: torch.cuda.Stream):
        self.pool: Any = pool.id  # torch has no public name for its type
        self.stream = stream
        self.pieces: list[Callable[[], None]] = []
        self.capture = ExitStack()

    def record(self, function: Pass) -> torch.Tensor:
        """Capture `function`, and return its result, which has values after each run of `pieces`."""
        with warnings.catch_warnings(), self.capture:
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # the one before the first gather
            self._begin_graph()
            return function()

    def run_outside_graph(self, action: Callable[[], None]) -> None:
        """End the current graph, run `action` now and at every replay, and begin the next graph."""
        self.capture.close()
        action()
        self.pieces.append(action)
        self._begin_graph()

    def _begin_graph(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's thread continues to query earlier gathers, which the global mode forbids during capture.
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
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
