"""The line that shows how far a run is, tokens/s, and a line for each logged step and evaluation."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from transformers import TrainerCallback

from qlora_kit.model.perplexity import plus_minus
from qlora_kit.output.log import RunLog
from qlora_kit.output.metrics import best_evaluation, first_overfitted
from qlora_kit.training.machine import Machine

ECHO = 2  # columns left free at the end of the line, where a terminal shows ^C: else it would begin a new line
LEAST_BAR = 5  # columns


class ProgressLine:
    """The last line of a terminal: a bar as wide as there is room, and how far the run is.

    Attributes:
        loss: the last logged one, with its step.
        evaluated: blocks measured and all blocks, while an evaluation lasts.
    """

    def __init__(self, console: Console, steps: int, done: int, epochs: int):
        self.console, self.steps, self.first, self.done, self.epochs = console, steps, done, done, epochs
        self.epoch, self.loss = 0.0, ""
        self.evaluated: tuple[int, int] | None = None
        self.began = time.perf_counter()
        self.live = Live(console=console, get_renderable=self._render, transient=not steps)

    def _render(self) -> Table:  # another thread calls it, four times a second
        width = self.console.width - ECHO
        name, (done, total) = ("evaluating ", self.evaluated) if self.evaluated else ("training ", (self.done, self.steps))
        facts = {"share": f"{100 * done // max(total, 1)} %", "step": f"{done}/{total}"}
        facts |= {} if self.evaluated else self._times()
        for least in ("epoch", "elapsed", "name", "step", "left", "loss", "none"):
            room = width - len(name) - len(text := " " + " · ".join(facts.values()))
            if room >= LEAST_BAR:
                break
            name = "" if least == "name" else name
            facts.pop(least, None)
        line = Table.grid()
        line.add_row(*([name] if name else []), ProgressBar(max(total, 1), done, max(room, 1)), text)
        return line

    def _times(self) -> dict[str, str]:
        seconds, steps = time.perf_counter() - self.began, self.done - self.first
        facts = {"elapsed": clock(seconds)}
        if self.epochs > 1:
            facts = {"epoch": f"epoch {min(int(self.epoch) + 1, self.epochs)}/{self.epochs}"} | facts
        if steps and self.done < self.steps:
            facts["left"] = f"{clock(seconds / steps * (self.steps - self.done))} left"
        return facts | ({"loss": self.loss} if self.loss else {})


class ProgressCallback(TrainerCallback):
    """Show the progress on a terminal, and write every logged step to the screen and to the log files.

    Args:
        tokens_per_step: on average; the last step of an epoch may hold fewer.
    """

    def __init__(self, log: RunLog, machine: Machine, tokens_per_step: float):
        self.log, self.machine, self.tokens_per_step = log, machine, tokens_per_step
        self.line: ProgressLine | None = None
        self.speed = SpeedMeter()

    def _open_line(self, *counts: int) -> ProgressLine | None:
        """Return the line, shown; None where nobody looks at it."""
        console = Console(stderr=True, highlight=False)
        if not self.log.enabled or not console.is_terminal:
            return None
        line = ProgressLine(console, *counts)
        line.live.start()
        return line

    def on_train_begin(self, args, state, control, **rest):
        self.speed = SpeedMeter()
        self.total = state.max_steps
        self.line = self._open_line(state.max_steps, state.global_step, state.num_train_epochs)

    def on_step_begin(self, args, state, control, **rest):
        self.speed.resume()

    def on_step_end(self, args, state, control, **rest):
        self.speed.step_done()
        if self.line:
            self.line.done, self.line.epoch = state.global_step, state.epoch or 0.0

    def on_evaluate(self, args, state, control, **rest):
        self.speed.pause()

    on_save = on_evaluate

    def on_log(self, args, state, control, logs=None, **rest):
        values = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            values |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            values["tokens_per_second"] = round(self.speed.steps_per_second() * self.tokens_per_step, 1)
            held = self.machine.memory_gib()
            values["memory_gib"] = round(held["reserved"], 3) if held else None
        elif "eval_loss" in logs:
            values |= {key: value for key, value in logs.items() if key.startswith("eval_")}
        else:
            return  # the Trainer's closing summary
        self.log.write_metrics(values)
        self._show(values)
        if "eval_loss" in values and (found := first_overfitted(state.log_history)) and found["step"] == values["step"]:
            best = best_evaluation(state.log_history) or found
            self.log.write(
                f"The run overfits: since step {best['step']} the evaluation loss has risen by more than its standard error, and "
                f"the training loss has fallen"
            )

    def close(self) -> None:
        if self.line:
            self.line.live.stop()
            self.line = None

    def _show(self, values: dict[str, Any]) -> None:
        step = values["step"]
        if "eval_loss" in values:
            perplexity = plus_minus(values["eval_perplexity"], values["eval_standard_error"], ".3f")
            self.log.write(f"step {step}: eval loss {values['eval_loss']:.4f}, perplexity {perplexity}")
            return
        memory = "" if values["memory_gib"] is None else f", {values['memory_gib']:.2f} GiB"
        self.log.write(
            f"step {step}/{self.total}: loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, "
            f"{values['tokens_per_second']:,.0f} tokens/s{memory}, {self.speed.remaining(self.total - step)} left"
        )
        if self.line:
            self.line.loss = f"loss {values['loss']:.2f} @{step}"

    @contextmanager
    def evaluation(self, blocks: int) -> Iterator[Callable[[int], None]]:
        """Show how far an evaluation is; gives what to call with the blocks done."""
        line = self.line or self._open_line(0, 0, 0)

        def show(done: int) -> None:
            if line:
                line.evaluated = (done, blocks)

        try:
            show(0)
            yield show
        finally:
            if line:
                line.evaluated = None
            if line and not self.line:
                line.live.stop()


def clock(seconds: float) -> str:
    """Return a time as 0:31 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class SpeedMeter:
    """Steps per second between two readings; the time that evaluations and saves take is left out."""

    def __init__(self) -> None:
        self.started = self.last_step = time.perf_counter()
        self.paused = False
        self.steps = 0
        self.seconds_per_step = 0.0

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        if self.paused:
            self.started += time.perf_counter() - self.last_step
            self.paused = False

    def step_done(self) -> None:
        self.steps += 1
        self.last_step = time.perf_counter()

    def steps_per_second(self) -> float:
        """Read at a moment when the GPU has finished its work, which logging a loss sees to."""
        now = time.perf_counter()
        seconds, steps = max(now - self.started, 1e-9), self.steps
        self.started, self.last_step, self.steps = now, now, 0
        if steps:
            self.seconds_per_step = seconds / steps
        return steps / seconds

    def remaining(self, steps: int) -> str:
        return str(timedelta(seconds=round(self.seconds_per_step * steps)))
