"""The cost of the involution operator on a GPU.

    python benchmarks/involution.py --device cuda    # writes the results, with the machine
    python benchmarks/involution_gpu.py    # prints them only; needs nothing but torch and the models

Each shape is computed forward, and forward and backward, in float32 and in bfloat16, in four ways:

    triton     `involution2d`
    generic    what `involution2d` does without Triton
    unfold     the published formulation: K² shifted copies of the input, multiplied by the kernels and summed
    depthwise  a depthwise convolution of the same size, which has one kernel for all positions

Times are medians between two events on the GPU, which include the time that it waits for the caller. The caches are cleared
before each run. The bandwidth is that of the fewest bytes: each pass reads each of its operands once, and writes each result
once. Its share is of the bandwidth of a large copy.
"""

import json
import math
import statistics
import time
from collections.abc import Callable

import torch

from hf_ibdistill import involution2d
from hf_ibdistill.models import involution


WAYS, MODES = ("triton", "generic", "unfold", "depthwise"), ("forward", "both")
# batch, channels, height, width, kernel size; 16 channels a group
SHAPES = [(64, 64, 56, 56, 7), (64, 128, 28, 28, 7), (64, 256, 14, 14, 7), (64, 32, 16, 16, 7)]
GROUP_CHANNELS = 16
# More bytes than any cache has.
CACHE_BYTES = 2**28
CASE_SECONDS, MOST_RUNS = 0.08, 50


class _Generic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, kernel):
        ctx.save_for_backward(input, kernel)
        return involution._generic_forward(input, kernel, 1)

    @staticmethod
    def backward(ctx, grad_output):
        return involution._generic_backward(grad_output, *ctx.saved_tensors, 1)


def unfold_formulation(input: torch.Tensor, kernel: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Involution as its paper writes it."""
    batch, groups, taps, *size = kernel.shape
    kernel_size = math.isqrt(taps)
    columns = torch.nn.functional.unfold(input, kernel_size, padding=kernel_size // 2, stride=stride)
    return (kernel.unsqueeze(2) * columns.view(batch, groups, -1, taps, *size)).sum(3).view(batch, -1, *size)


def depthwise(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv2d(input, weight, padding=weight.shape[2] // 2, groups=len(weight))


def median_seconds(compute: Callable[[], object], cache: torch.Tensor) -> tuple[float, int]:
    """The median time of a computation and the number of runs."""
    for _ in range(2):  # compiles, and lets the allocator find its memory
        compute()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    compute()
    torch.cuda.synchronize()
    runs = min(MOST_RUNS, max(3, int(CASE_SECONDS / (time.perf_counter() - begin))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        cache.zero_()
        start.record()
        compute()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3, runs


def measure_copy(cache: torch.Tensor) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), cache)[0]


def measure_shape(shape: tuple[int, ...], dtype: torch.dtype, cache: torch.Tensor, copied: float) -> dict:
    batch, channels, height, width, kernel_size = shape
    groups = channels // GROUP_CHANNELS
    options = {"dtype": dtype, "device": "cuda"}
    input = torch.randn(batch, channels, height, width, **options).requires_grad_()
    kernel = torch.randn(batch, groups, kernel_size**2, height, width, **options).requires_grad_()
    weight = torch.randn(channels, 1, kernel_size, kernel_size, **options).requires_grad_()
    grad_output = torch.randn_like(input)
    operators = dict(zip(WAYS, (involution2d, _Generic.apply, unfold_formulation, depthwise)))
    entry = {"shape": list(shape), "groups": groups, "dtype": str(dtype).removeprefix("torch.")}

    def both(operator, operands):
        output = operator(*operands)
        return output.detach(), *torch.autograd.grad(output, operands, grad_output)

    expected = both(involution2d, (input, kernel))
    for way, operator in operators.items():
        operands = (input, weight if way == "depthwise" else kernel)
        moved = {"forward": sum(tensor.nbytes for tensor in (*operands, grad_output))}
        moved["both"] = 2 * moved["forward"] + sum(tensor.nbytes for tensor in operands)
        entry[way] = {}
        if way in ("generic", "unfold"):
            # A wrong result would make the times worthless.
            errors = [
                (a.float() - b.float()).norm() / b.float().norm() for a, b in zip(both(operator, operands), expected)
            ]
            entry[way]["difference"] = float(max(errors))

        def forward(operator=operator, operands=operands):
            with torch.no_grad():
                return operator(*operands)

        for mode, compute in zip(MODES, (forward, lambda o=operator, p=operands: both(o, p))):
            seconds, runs = median_seconds(compute, cache)
            rate = moved[mode] / seconds
            entry[way][mode] = {
                "seconds": seconds,
                "runs": runs,
                "bytes_per_second": rate,
                "copy_share": rate / copied,
            }
    return entry


def measure() -> dict:
    begin = time.perf_counter()
    torch.manual_seed(0)
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    copied = measure_copy(cache)
    dtypes = (torch.float32, torch.bfloat16)
    entries = [measure_shape(shape, dtype, cache, copied) for shape in SHAPES for dtype in dtypes]
    return {
        "gpu": torch.cuda.get_device_name(),
        "triton_is_used": involution._has_triton(torch.device("cuda", torch.cuda.current_device())),
        "copy_bytes_per_second": copied,
        "entries": entries,
        "seconds": time.perf_counter() - begin,
    }


def rows(measured: dict) -> list[list[str]]:
    """A header and a row for each shape, type and mode."""
    table = [["input, K", "type", "mode", *(f"{way}, µs" for way in WAYS), "× unfold", "triton, GB/s", "of a copy, %"]]
    for entry in measured["entries"]:
        for mode in MODES:
            times = [entry[way][mode]["seconds"] for way in WAYS]
            triton = entry["triton"][mode]
            cells = ["×".join(map(str, entry["shape"][:4])) + f", {entry['shape'][4]}", entry["dtype"], mode]
            cells += [f"{1e6 * seconds:,.0f}" for seconds in times]
            cells += [f"{times[2] / times[0]:.1f}", f"{triton['bytes_per_second'] / 1e9:,.0f}"]
            table.append([*cells, f"{100 * triton['copy_share']:.0f}"])
    return table


def main():
    measured = measure()
    print(json.dumps(measured, indent=1))
    for row in rows(measured):
        print(" | ".join(row))
    print(f"copy: {measured['copy_bytes_per_second'] / 1e9:,.0f} GB/s; {measured['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
