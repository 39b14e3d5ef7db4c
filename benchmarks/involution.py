"""The cost of the involution operator against the formulation in its paper, in time and in memory.

    python benchmarks/involution.py
    OMP_NUM_THREADS=1 python benchmarks/involution.py    # on a shared machine, where threads wait for each other
    python benchmarks/involution.py --repetitions 1    # a quick look
    python benchmarks/involution.py --device cuda    # on a GPU, as involution_gpu.py describes; only `--output_file` applies

The shapes are those of all involutions in RedNet-26 and in the small involution teacher, found by running the networks
without data. Each is computed forward, and forward and backward, in float32 and in bfloat16, in three ways:

    unfold     the published formulation: K² shifted copies of the input (`unfold`), multiplied by the kernels and summed
    eager      `involution2d`
    compiled   one `torch.compile(involution2d)` for all shapes, types and modes

Extra memory is the peak of what forward and backward allocate beyond the output and the gradients. The shares compare with
the limits of the machine, measured in the same run. The bandwidth is that of a large copy, if each operand, result and
gradient is moved once. The arithmetic rate is that of a large float32 matrix product, at 2·K² operations for each element of
the output, and three times as many with the backward pass.

Then a training step (forward, cross-entropy, backward, AdamW) of the small involution teacher, against one of its
convolution counterpart.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean

import involution_gpu
import numpy as np
import torch
from timing import Case, check, check_table, parse, quartiles, spread, time_in_turn, write_results
from torch._dynamo.utils import counters
from transformers.hf_argparser import HfArg

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, involution2d
from hf_ibdistill.models.involution import Involution2d
from hf_ibdistill.publishing.cards import markdown_table


WAYS, MODES = ("unfold", "eager", "compiled"), ("forward", "both")
FASTER = {"eager": 5.0, "compiled": 8.0}
FASTER_EACH, LESS_MEMORY, STEP_COST = 2.0, 1 / 5, 3.0
RUN_SECONDS = 0.05  # A shorter run would measure the clock and the caller.


@dataclass
class InvolutionArguments:
    output_file: str = HfArg(default="outputs/benchmark_involution.json", help="Where the results go.")
    device: str = HfArg(
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda; cuda measures other shapes and ways.",
    )
    large_size: int = HfArg(default=224, help="Side of RedNet-26's images.")
    large_batch_size: int = HfArg(default=8, help="Images in a batch of RedNet-26.")
    small_sizes: list[int] = HfArg(default_factory=lambda: [8, 28], help="Sides of the small teachers' images.")
    small_batch_size: int = HfArg(default=64, help="Images in a batch of the small teachers.")
    repetitions: int = HfArg(default=5, help="How often each case is timed.")
    seed: int = HfArg(default=0, help="Seed of inputs, weights and orders.")


@dataclass(frozen=True)
class Shape:
    network: str
    batch: int
    channels: int
    groups: int
    kernel_size: int
    stride: int
    height: int
    width: int


def find_shapes(preset: str, size: int, batch: int) -> list[Shape]:
    """Every distinct involution of a network."""
    with torch.device("meta"):
        model, images = build(preset), torch.zeros(batch, 3, size, size)
    shapes = {}

    def note(layer, args, output):
        kernel_size = math.isqrt(layer.expand.out_channels // layer.groups)
        batch, channels, height, width = args[0].shape
        shape = Shape(f"{preset} {size}", batch, channels, layer.groups, kernel_size, layer.stride, height, width)
        shapes[shape] = None

    for module in model.modules():
        if isinstance(module, Involution2d):
            module.register_forward_hook(note)
    model(images)
    return list(shapes)


def build(preset: str) -> IBResNetForImageClassification:
    return IBResNetForImageClassification(IBResNetConfig.from_preset(preset, num_labels=10))


def forward(operator: Callable, input, kernel, grad_output, stride) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return (operator(input, kernel, stride),)


def both(operator: Callable, input, kernel, grad_output, stride) -> tuple[torch.Tensor, ...]:
    output = operator(input, kernel, stride)
    return output, *torch.autograd.grad(output, (input, kernel), grad_output)


def extra_memory(compute: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Peak of the bytes that a computation allocates, its results not counted."""
    # The allocator's own record, because hooks and dispatch modes do not see inside an operator.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = compute()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())["traceEvents"]
    events = sorted((event for event in trace if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    sizes = [(event["args"]["Addr"], event["args"]["Bytes"]) for event in events]
    # An address may have been used before: results are what was put there last.
    last = {address: index for index, (address, size) in enumerate(sizes) if size > 0}
    of_results = {last[tensor.untyped_storage().data_ptr()] for tensor in results}
    return int(max(np.cumsum([0 if index in of_results else size for index, (_, size) in enumerate(sizes)])))


def repeat(name: str, compute: Callable[[], object]) -> Case:
    """A case that repeats a computation until it takes long enough to measure."""
    compute()  # compiles, fills caches
    begin = time.perf_counter()
    compute()
    times = math.ceil(RUN_SECONDS / (time.perf_counter() - begin))

    def compute_often(rng):
        for _ in range(times):
            compute()

    return Case(name, compute_often, times)


def measure_limits(bench: InvolutionArguments) -> dict[str, float]:
    """The largest bytes and floating point operations a second of this machine."""
    source, matrix = torch.rand(2**26), torch.rand(2048, 2048)
    target = torch.empty_like(source)
    copy, product = repeat("copy", lambda: target.copy_(source)), repeat("product", lambda: matrix @ matrix)
    time_in_turn([copy, product], bench.repetitions, bench.seed)
    return {
        "bytes_per_second": 2 * source.nbytes * copy.rate["median"],
        "flops_per_second": 2 * len(matrix) ** 3 * product.rate["median"],
    }


def measure_shape(shape: Shape, dtype: torch.dtype, operators: dict, limits: dict, bench: InvolutionArguments) -> dict:
    size = [-(-side // shape.stride) for side in (shape.height, shape.width)]
    input = torch.randn(shape.batch, shape.channels, shape.height, shape.width).to(dtype).requires_grad_()
    kernel = torch.randn(shape.batch, shape.groups, shape.kernel_size**2, *size).to(dtype).requires_grad_()
    grad_output = torch.randn(shape.batch, shape.channels, *size).to(dtype)
    operands = (input, kernel, grad_output, shape.stride)

    computations = {
        (way, mode.__name__): lambda mode=mode, operator=operator: mode(operator, *operands)
        for way, operator in operators.items()
        for mode in (forward, both)
    }
    cases = {key: repeat(" ".join(key), compute) for key, compute in computations.items()}
    time_in_turn(list(cases.values()), bench.repetitions, bench.seed)

    entry = {**asdict(shape), "dtype": str(dtype).removeprefix("torch.")}
    entry["extra_bytes"] = {way: extra_memory(computations[way, "both"]) for way in ("unfold", "eager")}
    moved = {"forward": input.nbytes + kernel.nbytes + grad_output.nbytes}
    flops = {"forward": 2 * shape.kernel_size**2 * grad_output.numel()}
    moved["both"], flops["both"] = 2 * moved["forward"], 3 * flops["forward"]
    for (way, mode), case in cases.items():
        seconds = quartiles(case.wall)
        entry.setdefault(way, {})[mode] = {
            "seconds": seconds,
            "wall_seconds": case.wall,
            "speed": case.speed_against(cases["unfold", mode]),
            "bandwidth_share": moved[mode] / seconds["median"] / limits["bytes_per_second"],
            "arithmetic_share": flops[mode] / seconds["median"] / limits["flops_per_second"],
        }
    return entry


def training_step(preset: str, size: int, dtype: torch.dtype, bench: InvolutionArguments) -> Callable[[], object]:
    torch.manual_seed(bench.seed)
    model = build(preset).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(bench.small_batch_size, 3, size, size), torch.arange(bench.small_batch_size) % 10

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step(size: int, dtype: torch.dtype, bench: InvolutionArguments) -> dict:
    presets = ("involution-small", "convolution-small")
    cases = [repeat(preset, training_step(preset, size, dtype, bench)) for preset in presets]
    time_in_turn(cases, bench.repetitions, bench.seed)
    involution, convolution = cases
    return {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {case.name: quartiles(case.wall) for case in cases},
        "wall_seconds": {case.name: case.wall for case in cases},
        "cost": convolution.speed_against(involution),
    }


def geometric_means(entries: list[dict]) -> list[dict]:
    """Of the speeds, for each type and over all."""
    means = []
    for dtype in (*dict.fromkeys(entry["dtype"] for entry in entries), "all"):
        chosen = [entry for entry in entries if dtype in (entry["dtype"], "all")]
        mean = {
            way: {mode: geometric_mean(entry[way][mode]["speed"]["median"] for entry in chosen) for mode in MODES}
            for way in WAYS[1:]
        }
        means.append({"dtype": dtype, **mean})
    return means


def check_all(entries: list[dict], means: list[dict], compiling: dict, steps: list[dict]) -> list[dict]:
    checks = []
    for way, limit in FASTER.items():
        for mean in means:
            what, speed = f"{way}, {mean['dtype']}: geometric mean at least {limit:g} × unfold", mean[way]["both"]
            checks.append(check(what, speed, speed >= limit))
        slowest = min(entry[way]["both"]["speed"]["median"] for entry in entries)
        checks.append(check(f"{way}: no shape below {FASTER_EACH:g} × unfold", slowest, slowest >= FASTER_EACH))
    extra = [entry["extra_bytes"] for entry in entries if entry["kernel_size"] == 7]
    share = max(of_way["eager"] / of_way["unfold"] for of_way in extra)
    what = f"K = 7: at most {LESS_MEMORY:g} × the extra memory of unfold"
    checks.append(check(what, share, share <= LESS_MEMORY))
    what = "compiled: so few compilations that the recompile limit is not hit"
    checks.append(check(what, compiling["compilations"], not compiling["limit_hit"]))
    for step in steps:
        cost = step["cost"]["median"]
        what = f"training step, {step['size']} px, {step['dtype']}: at most {STEP_COST:g} × that of convolution"
        checks.append(check(what, cost, cost <= STEP_COST))
    return checks


def report(entries, means, compiling, limits, steps, checks) -> str:
    rows = []
    for entry in entries:
        shape = f"{entry['batch']}×{entry['channels']}×{entry['height']}×{entry['width']}"
        cells = [entry["network"], shape, entry["kernel_size"], entry["stride"], entry["dtype"]]
        cells += [f"{1e3 * entry[way]['both']['seconds']['median']:,.2f}" for way in WAYS]
        cells += [spread(entry[way][mode]["speed"], 1) for way in WAYS[1:] for mode in MODES]
        cells += [f"{entry['extra_bytes'][way] / 1e6:,.2f}" for way in ("unfold", "eager")]
        for limit in ("bandwidth_share", "arithmetic_share"):
            cells.append(" / ".join(f"{100 * entry['eager'][mode][limit]:.0f}" for mode in MODES))
        rows.append(cells)
    header = ["network", "input", "K", "stride", "type", *(f"{way}, ms" for way in WAYS)]
    speeds = [f"{way}, {label}" for way in WAYS[1:] for label in ("forward ×", "both ×")]
    header += [*speeds, "unfold, extra MB", "eager, extra MB", "of bandwidth, %", "of arithmetic, %"]
    mean_rows = [[mean["dtype"], *(f"{mean[way][mode]:.2f}" for way in WAYS[1:] for mode in MODES)] for mean in means]
    step_rows = [
        [step["size"], step["dtype"], *(f"{1e3 * s['median']:,.2f}" for s in step["seconds"].values()), spread(step["cost"], 2)]
        for step in steps
    ]  # fmt: skip
    paragraphs = [
        "Forward and backward in ms, speed × unfold (quartiles), and eager's shares forward / both:",
        markdown_table(header, rows),
        "Geometric means of the speeds:",
        markdown_table(["type", *speeds], mean_rows),
        f"Limits: {limits['bytes_per_second'] / 1e9:.1f} GB/s, {limits['flops_per_second'] / 1e9:.0f} Gflop/s. "
        f"Compiled {compiling['compilations']} times, {compiling['graph_breaks']} graph breaks, "
        f"recompile limit {'hit' if compiling['limit_hit'] else 'not hit'}.",
        "A training step:",
        markdown_table(["size", "type", "involution, ms", "convolution, ms", "cost × (quartiles)"], step_rows),
        check_table(checks),
    ]
    return "\n\n".join(paragraphs)


def main():
    bench = parse(InvolutionArguments, __doc__)
    if bench.device == "cuda":
        measured = involution_gpu.measure()
        write_results(bench, **measured)
        header, *rows = involution_gpu.rows(measured)
        print(f"\n{markdown_table(header, rows)}\n\nA copy: {measured['copy_bytes_per_second'] / 1e9:,.0f} GB/s.")
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler's library prints lines for each profile.
    begin = time.perf_counter()
    torch.manual_seed(bench.seed)
    networks = [("rednet26", bench.large_size, bench.large_batch_size)]
    networks += [("involution-small", size, bench.small_batch_size) for size in bench.small_sizes]
    shapes = [shape for network in networks for shape in find_shapes(*network)]
    dtypes = (torch.float32, torch.bfloat16)
    limits = measure_limits(bench)
    counters.clear()
    operators = dict(zip(WAYS, (involution_gpu.unfold_formulation, involution2d, torch.compile(involution2d))))
    entries = [measure_shape(shape, dtype, operators, limits, bench) for shape in shapes for dtype in dtypes]
    compiling = {
        "compilations": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "limit_hit": any("recompile limit" in reason for reason in counters["unimplemented"]),
    }
    steps = [measure_step(size, dtype, bench) for size in bench.small_sizes for dtype in dtypes]
    means = geometric_means(entries)
    checks = check_all(entries, means, compiling, steps)
    measured = {"limits": limits, "entries": entries, "geometric_means": means, "compiling": compiling}
    seconds = time.perf_counter() - begin
    write_results(bench, **measured, training_steps=steps, checks=checks, seconds=seconds)
    print(f"\n{report(entries, means, compiling, limits, steps, checks)}")


if __name__ == "__main__":
    main()
