"""How the benchmarks measure.

Time: all cases in turn, in another order each repetition, so that a drift of the machine's speed reaches every case. A ratio
is the median, with quartiles, over the repetitions of the ratios within one. The processor time, which varies less on a
shared machine, is that of this process and of its data loader workers. Peak memory: in a process of its own.
"""

import json
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field

import datasets
import numpy as np
from process_memory import STATUS
from transformers import HfArgumentParser

from hf_ibdistill.files import write_text
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.publishing.machine import describe_machine


# Small tables are mapped as large ones are, whatever the environment asks for.
datasets.config.IN_MEMORY_MAX_SIZE = 0
CLOCKS = ("wall", "cpu")
KINDS = {"RssAnon": "anonymous", "RssFile": "mapped_files", "VmHWM": "resident"}


@dataclass
class Case:
    """Something that is timed. `run` gets a random generator, in the same state for all cases of a repetition."""

    name: str
    run: Callable[[np.random.Generator], object]
    units: int = 1  # images, rows or steps of one run
    wall: list[float] = field(default_factory=list)  # seconds a unit, one for each repetition
    cpu: list[float] = field(default_factory=list)

    @property
    def rate(self) -> dict[str, float]:
        """Units a second on the wall."""
        return quartiles(1 / np.array(self.wall))

    @property
    def measured(self) -> dict:
        """The times, for JSON."""
        return {"units_per_second": self.rate, "wall_seconds_per_unit": self.wall, "cpu_seconds_per_unit": self.cpu}

    def ratios(self, baseline: "Case") -> dict[str, dict[str, float]]:
        """Speed as a multiple of the baseline's, by each of the clocks."""
        return {clock: quartiles(np.array(getattr(baseline, clock)) / getattr(self, clock)) for clock in CLOCKS}

    def speed_against(self, baseline: "Case") -> dict[str, float]:
        """Speed on the wall, as a multiple of the baseline's."""
        return self.ratios(baseline)["wall"]


def time_in_turn(cases: Sequence[Case], repetitions: int, seed: int = 0) -> None:
    """Fill in the times of the cases. A first round is not counted: it fills caches."""
    rng = np.random.default_rng(seed)
    for repetition in range(-1, repetitions):
        for index in rng.permutation(len(cases)):
            case, state = cases[index], np.random.default_rng((seed, repetition + 1))
            wall, cpu = time.perf_counter(), processor_seconds()
            case.run(state)
            wall, cpu = time.perf_counter() - wall, processor_seconds() - cpu
            if repetition >= 0:
                case.wall.append(wall / case.units)
                case.cpu.append(cpu / case.units)


def processor_seconds() -> float:
    """Of this process and of its data loader workers that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_memory(function: Callable, *arguments) -> dict[str, int]:
    """The peaks of memory, in bytes, of a new process that calls a function of a module.

    Returns:
        `"anonymous"`: what the process allocated, including its libraries, looked up every 20 ms while the function runs
        (Linux only). `"mapped_files"`: memory of mapped files, in the same way. `"resident"`: both, since the process began.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_watch_memory, function, *arguments).result()


def _watch_memory(function, *arguments):
    peaks, is_done = {}, threading.Event()

    def look():
        for line in STATUS.read_text().splitlines() if STATUS.exists() else ():
            name, _, value = line.partition(":")
            if name in KINDS:
                peaks[KINDS[name]] = max(peaks.get(KINDS[name], 0), int(value.split()[0]) * 1024)

    def watch():
        while not is_done.wait(0.02):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function(*arguments)
    finally:
        is_done.set()
        watcher.join()
    look()
    if "resident" not in peaks:
        # Bytes on macOS, kilobytes elsewhere. On Linux this one is at least that of the parent process.
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peaks


def parse(kind: type, description: str):
    """The arguments of a benchmark, a dataclass, from its command line."""
    (bench,) = HfArgumentParser(kind, description=description.splitlines()[0]).parse_args_into_dataclasses()
    return bench


def quartiles(values) -> dict[str, float]:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "lower_quartile": float(low), "upper_quartile": float(high)}


def spread(values: dict[str, float], digits: int) -> str:
    """Median and quartiles as a table shows them."""
    return f"{values['median']:,.{digits}f} ({values['lower_quartile']:,.{digits}f}–{values['upper_quartile']:,.{digits}f})"


def check(requirement: str, measured: float, met: bool) -> dict:
    return {"requirement": requirement, "measured": float(measured), "met": bool(met)}


def check_table(checks: Sequence[dict]) -> str:
    rows = [[check["requirement"], f"{check['measured']:.4g}", "yes" if check["met"] else "no"] for check in checks]
    return markdown_table(["requirement", "measured", "met"], rows)


def write_results(bench, **results) -> None:
    """Write the results, the arguments, and the machine that they were measured on, as JSON to `bench.output_file`."""
    content = {"machine": describe_machine(), "arguments": asdict(bench), **results}
    write_text(bench.output_file, json.dumps(content, indent=2))
