"""How the benchmarks time things: all cases in turn, in another order each repetition, so that a machine whose speed drifts
is as fast for one as for another; ratios are taken within a repetition."""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hf_ibdistill.report import describe_machine


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
