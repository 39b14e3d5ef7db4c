"""How the benchmarks measure. Time: all cases in turn, in another order each repetition, so that a machine whose speed drifts
is as fast for one as for another; ratios are taken within a repetition. Peak memory: of a process of its own."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hf_ibdistill.report import describe_machine


STATUS = Path("/proc/self/status")
KINDS = {"RssAnon": "anonymous", "RssFile": "mapped_files", "VmHWM": "resident"}


@dataclass
class Case:
    """Something that is timed. `run` gets a random generator, in the same state for all cases of a repetition."""

    name: str
    run: Callable[[np.random.Generator], object]
    units: int = 1  # images, rows or steps that a run goes through
    wall: list[float] = field(default_factory=list)  # seconds a unit, one for each repetition
    cpu: list[float] = field(default_factory=list)

    @property
    def rate(self) -> dict[str, float]:
        """Units a second on the wall."""
        return quartiles(1 / np.array(self.wall))

    def speed_against(self, baseline: "Case", clock: str = "wall") -> dict[str, float]:
        """How many times faster than the baseline, by the `"wall"` or the `"cpu"` clock."""
        return quartiles(np.array(getattr(baseline, clock)) / getattr(self, clock))


def time_in_turn(cases: Sequence[Case], repetitions: int, seed: int = 0) -> None:
    """Fill in the cases' times. A first round is not counted: it fills caches."""
    rng = np.random.default_rng(seed)
    for repetition in range(-1, repetitions):
        for index in rng.permutation(len(cases)):
            case, state = cases[index], np.random.default_rng((seed, repetition + 1))
            wall, cpu = time.perf_counter(), _processor_seconds()
            case.run(state)
            wall, cpu = time.perf_counter() - wall, _processor_seconds() - cpu
            if repetition >= 0:
                case.wall.append(wall / case.units)
                case.cpu.append(cpu / case.units)


def _processor_seconds() -> float:
    """Of this process and of its data loader workers that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_memory(function: Callable[[], object]) -> dict[str, int]:
    """The peaks in bytes while the function runs; of the resident memory since the process began."""
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
        function()
    finally:
        is_done.set()
        watcher.join()
    look()
    if "resident" not in peaks:  # On Linux this one would be at least that of the process that started this one.
        # Bytes on macOS, kilobytes elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peaks


def measure_in_process(script: str, arguments: Mapping) -> dict:
    """What a script prints last, as JSON, when it is run with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arguments.json"
        path.write_text(json.dumps(dict(arguments)))
        # Nothing may be kept in memory because it was small enough to.
        environment = {**os.environ, "HF_DATASETS_IN_MEMORY_MAX_SIZE": "0"}
        done = subprocess.run([sys.executable, script, str(path)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def quartiles(values) -> dict[str, float]:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "lower_quartile": float(low), "upper_quartile": float(high)}


def spread(values: dict[str, float], digits: int) -> str:
    """Median and quartiles as a table shows them."""
    return f"{values['median']:,.{digits}f} ({values['lower_quartile']:,.{digits}f}–{values['upper_quartile']:,.{digits}f})"


def write_results(path: str | Path, results: dict) -> None:
    """Results with the machine that they were measured on, as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe_machine(), **results}, indent=2))
