"""Progress bar and tokens/s; every logged step goes to the log files."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback

from qlora_kit.model.perplexity import plus_minus
from qlora_kit.output.log import RunLog
from qlora_kit.training.machine import Machine


class ProgressCallback(TrainerCallback):
    """Show a progress bar on a terminal, plain lines elsewhere, and write every logged step to the log files.

    Args:
        tokens_per_step: on average; the last step of an epoch may hold fewer.
    """

    def __init__(self, log: RunLog, machine: Machine, tokens_per_step: float):
        self.log, self.machine, self.tokens_per_step = log, machine, tokens_per_step
        self.console = Console(stderr=True, quiet=not self.log.enabled)
        self.bar: Progress | None = None
        self.speed = SpeedMeter()

    def on_train_begin(self, args, state, control, **rest):
        self.speed = SpeedMeter()
        self.total = state.max_steps
        if self.console.is_terminal and self.log.enabled:
            # In a narrow window the loss is cut at its end, and step and time stay.
            narrow, wide = Column(ratio=1, min_width=4), Column(ratio=8, no_wrap=True, overflow="ellipsis")
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(None, table_column=narrow), MofNCompleteColumn(),
                TimeRemainingColumn(compact=True), TextColumn("{task.fields[info]}", table_column=wide),
                console=self.console, speed_estimate_period=600, expand=True,
            )  # fmt: skip
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, info="")
            self.bar.start()

    def on_step_begin(self, args, state, control, **rest):
        self.speed.resume()

    def on_step_end(self, args, state, control, **rest):
        self.speed.step_done()
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_evaluate(self, args, state, control, **rest):
        self.speed.pause()

    on_save = on_evaluate

    def on_log(self, args, state, control, logs=None, **rest):
        values = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            values |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            values["tokens_per_second"] = round(self.speed.steps_per_second() * self.tokens_per_step, 1)
            values["memory_gib"] = round(self.machine.memory_gib().get("reserved", 0.0), 3)
        elif "eval_loss" in logs:
            values |= {key: value for key, value in logs.items() if key.startswith("eval_")}
        else:
            return  # the Trainer's closing summary
        self.log.write_metrics(values)
        self._show(values)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _show(self, values: dict[str, Any]) -> None:
        if "eval_loss" in values:
            perplexity = plus_minus(values["eval_perplexity"], values["eval_standard_error"], ".3f")
            info = f"step {values['step']}: eval loss {values['eval_loss']:.4f}, perplexity {perplexity}"
        else:
            memory = f", {values['memory_gib']:.2f} GiB" if self.machine.device == "cuda" else ""
            speed = f"{values['tokens_per_second']:,.0f} tokens/s"
            info = f"loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, {speed}{memory}"
            if self.bar:
                self.bar.update(self.task, info=info)
                self.log.write_to_file(f"step {values['step']}/{self.total}: {info}")
                return
            info = f"step {values['step']}/{self.total}: {info}, {self.speed.remaining(self.total - values['step'])} left"
        self.console.print(info, highlight=False, soft_wrap=True)
        self.log.write_to_file(info)

    @contextmanager
    def evaluation(self, blocks: int) -> Iterator[Callable[[int], None]]:
        """Show how far an evaluation is, within the training bar when there is one; gives what to call with the blocks done."""
        own = Progress(TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console,
                       transient=True, disable=self.console.quiet or not self.console.is_terminal)  # fmt: skip
        bar = self.bar or own
        with nullcontext() if self.bar else own:
            task = bar.add_task("evaluating", total=blocks, info="")
            try:
                yield lambda done: bar.update(task, completed=done)
            finally:
                bar.remove_task(task)


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
