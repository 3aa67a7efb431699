"""Repeat what a lesson measures for several seeds, store it, and say what holds of all of them.

    python -m finetuning_lessons.rank_study --seeds 5

A lesson has a function that measures it for one seed, and returns {quantity: {item: number}}:

    def measure(seed: int) -> Measured:
        return {LOSS: {"rank 8": 5.73, "rank 16": 5.71}, TIME: {"rank 8": 1.8}}  # TIME ends with ", ms"

With `--seeds N` it runs for seeds 1 to N, and results/NAME.json keeps their values. Without, it runs for seed 0, which is none
of those, and what it prints and draws stands beside the stored means. All statements are computed from a Spread:

    add_flag(parser)
    one, results = measure_seeds(arguments, measure, {"steps": arguments.steps})
    gap = results.gap(LOSS, "rank 8", "rank 16")  # seed by seed, so that what they share cancels
    print_text(f"Rank 8 ends {gap.compared('+.3f')} nats above rank 16.")  # +0.020 ± 0.004, or +0.002 ± 0.004 (within noise)
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetuning_lessons.lesson import print_text, progress
from finetuning_lessons.words import text
from qlora_kit.errors import UserError

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
MILLISECONDS = ", ms"  # how the name of a quantity ends that is a time

Measured = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Spread:
    """One number for each seed. f"{spread:.3f}" is their mean with its standard error, "5.713 ± 0.004"."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Return the standard error of the mean: standard deviation / √seeds; NaN of one seed."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else math.nan

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_noise(self) -> bool:
        """Return whether another run may reverse the sign: it is not more than twice its error, or differs between seeds."""
        return not (abs(self.mean) > 2 * self.error and len({value > 0 for value in self.values}) == 1)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + ("" if math.isnan(self.error) else f" ± {self.error:{spec.lstrip('+')}}")

    def compared(self, spec: str, unit: str = "") -> str:
        """Format a difference and its unit, and say when it is noise."""
        if math.isnan(self.error):
            noise = text(" (one seed)", "（只有一個種子）")
        else:
            noise = text(" (within noise)", "（在誤差範圍內）") if self.is_noise else ""
        return f"{self:{spec}}{unit}{noise}"


@dataclass(frozen=True)
class Results:
    """The results that a lesson measured, for each seed."""

    seeds: tuple[int, ...]
    measured: tuple[Measured, ...]

    def spread(self, compute: Callable[[Measured], float]) -> Spread:
        """Compute a number from each seed's results alone, so that differences are those between runs of one seed."""
        return Spread(tuple(map(compute, self.measured)))

    def of(self, quantity: str, item: str) -> Spread:
        return self.spread(lambda one: one[quantity][item])

    def gap(self, quantity: str, item: str, other: str) -> Spread:
        """Return by how much an item exceeds the other, in each seed."""
        return self.spread(lambda one: one[quantity][item] - one[quantity][other])

    def median_range(self, quantity: str, item: str, digits: int) -> str:
        """Format a time: its median, and the least and the most of all seeds."""
        spread = self.of(quantity, item)
        least, most = min(spread.values), max(spread.values)
        return f"{spread.median:.{digits}f}" + ("" if least == most else f" ({least:.{digits}f}-{most:.{digits}f})")

    def order(self, quantity: str, names: Mapping[str, str]) -> str:
        """Return the items' names from the least to the most; ≈ stands between neighbours that another run may exchange."""
        items = sorted(names, key=lambda item: self.of(quantity, item).mean)
        words = names[items[0]]
        for less, more in itertools.pairwise(items):
            words += f" {'≈' if self.gap(quantity, more, less).is_noise else '<'} {names[more]}"
        if len(self.seeds) == 1:
            return words.replace("≈", "?") + text(" (one seed: no ranking)", "（只有一個種子，不能排名）")
        return words + (text(" (≈: within noise)", "（≈ 表示在誤差範圍內）") if "≈" in words else "")

    def label(self) -> str:
        """Return the label of means in a picture."""
        count = len(self.seeds)
        return text(f"{count} seeds: mean ± standard error", f"{count} 個種子：平均 ± 標準誤")

    def title(self) -> str:
        """Return the head of a column of means."""
        return (
            text(f"{len(self.seeds)} seeds", f"{len(self.seeds)} 個種子") if len(self.seeds) > 1 else text("one seed", "單一種子")
        )


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="run for seeds 1 to N and store the results with the lesson (seed 0, not stored)"
    )


def measure_seeds(
    arguments: argparse.Namespace, measure: Callable[[int], Measured], settings: Mapping[str, Any]
) -> tuple[Measured, Results]:
    """Measure for the seeds that --seeds asks for, and store them; or for seed 0, and read what is stored.

    Args:
        settings: what decides the results besides the seed. Stored results of other settings are left aside.

    Returns:
        What this run measured (of its first seed), and the results of all seeds; of seed 0 alone if none fit.

    Raises:
        UserError: --seeds is less than 3, or the results cannot be written.
    """
    if arguments.seeds is None:
        one = measure(0)
        return one, load_results(arguments.name, settings) or Results((0,), (one,))
    if arguments.seeds < 3:
        raise UserError("--seeds", arguments.seeds, "says nothing about noise", "use 3 or more")
    check_folder()
    seeds, measured = range(1, arguments.seeds + 1), []
    for seed in seeds:
        progress(text(f"seed {seed} of {seeds[-1]}", f"第 {seed} 個種子，共 {seeds[-1]} 個"))
        measured.append(measure(seed))
    results = Results(tuple(seeds), tuple(measured))
    store_results(arguments.name, results, settings)
    return measured[0], results


def check_folder() -> None:
    """Check that results can be stored, before minutes are spent on them.

    Raises:
        UserError: they cannot.
    """
    remedy = "run it where this package's files may be changed"
    try:
        RESULTS.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError("--seeds", RESULTS, f"cannot be written ({error.strerror})", remedy) from error
    if not os.access(RESULTS, os.W_OK):
        raise UserError("--seeds", RESULTS, "cannot be written", remedy)


def print_place(one: Measured, results: Results, quantity: str) -> None:
    """Say how a run that is not stored lies among those that are."""
    if one in results.measured:
        return
    spreads = {item: results.of(quantity, item) for item in one[quantity]}
    spreads = {item: spread for item, spread in spreads.items() if spread.error > 0}  # what no seed changes says nothing
    near = sum(abs(one[quantity][item] - spread.mean) < 2 * statistics.stdev(spread.values) for item, spread in spreads.items())
    print_text(
        text(
            f"This run is one more seed: {near} of its {len(spreads)} losses lie within two standard deviations of the mean.",
            f"這一次是另一個種子：{len(spreads)} 個損失中有 {near} 個落在儲存平均的兩個標準差之內。",
        )
    )


def load_results(name: str, settings: Mapping[str, Any]) -> Results | None:
    """Return the stored results of a lesson, or None if there are none of these settings."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["settings"] != dict(settings):
        print(text("The stored results are of other settings.", "儲存的結果來自其他設定。"))
        return None
    quantities = stored["quantities"]
    measured: list[Measured] = [
        {quantity: {item: one["values"][i] for item, one in items.items()} for quantity, items in quantities.items()}
        for i in range(len(stored["seeds"]))
    ]
    return Results(tuple(stored["seeds"]), tuple(measured))


def store_results(name: str, results: Results, settings: Mapping[str, Any]) -> None:
    """Write results/NAME.json: command, date, versions, hardware, and of each quantity the values and what they say together."""
    quantities: dict[str, dict[str, Any]] = {}
    for quantity, items in results.measured[0].items():
        quantities[quantity] = {}
        for item in items:
            spread = results.of(quantity, item)
            if quantity.endswith(MILLISECONDS):
                together: dict[str, Any] = {"median": spread.median, "range": [min(spread.values), max(spread.values)]}
            else:
                together = {"mean": spread.mean, "standard_error": spread.error}
            quantities[quantity][item] = {"values": list(spread.values)} | together
    record = {
        "command": f"python -m finetuning_lessons.{name} --seeds {len(results.seeds)}",
        "date": datetime.date.today().isoformat(),
        "hardware": describe_processor(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "settings": dict(settings),
        "seeds": list(results.seeds),
        "quantities": _rounded(quantities),
    }
    # Each list of numbers on one line.
    written = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(record, indent=1))
    (RESULTS / f"{name}.json").write_text(written + "\n", encoding="utf-8")
    print(f"{text('results', '結果')}  {os.path.relpath(RESULTS / f'{name}.json')}")


def _rounded(value: Any) -> Any:
    """Keep six digits of each number; more are not measured."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}")


def describe_processor() -> str:
    """Return such as "two cores of an AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = {1: "one core", 2: "two cores"}.get(cores, f"{cores} cores")
    return f"{count} of a{'n' if model[:1] in 'AEIO' else ''} {model}"


def time_in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median CPU milliseconds of each function over `rounds` in which all of them run in turn.

    Turns spread what slows the machine down over all of them, and CPU time leaves out other programs.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.process_time()
            function()
            times[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def draw_spreads(axes: Any, places: Sequence[float], spreads: Sequence[Spread], color: str, label: str) -> None:
    """Draw the mean of each spread with a bar of one standard error up and down."""
    means, errors = [spread.mean for spread in spreads], [spread.error for spread in spreads]
    axes.errorbar(places, means, yerr=errors, fmt="o", color=color, capsize=4, label=label)
