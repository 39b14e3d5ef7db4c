"""What a training step on a CPU costs, with and without memory that the C library keeps between steps.

    OMP_NUM_THREADS=1 python benchmarks/freed_memory.py

The commands that train keep it. Each measurement is a process of its own, with and without in turn: random images, forward and
backward pass, AdamW. The time is that of the fastest step.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from process_memory import peak_bytes
from timing import parse, quartiles, spread, write_results
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, set_seed
from transformers.hf_argparser import HfArg

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, IBViTConfig, IBViTForImageClassification
from hf_ibdistill.processes import keep_freed_memory
from hf_ibdistill.publishing.cards import markdown_table


@dataclass
class FreedMemoryArguments:
    output_file: str = HfArg(default="outputs/benchmark_freed_memory.json", help="Where the results go.")
    models: list[str] = HfArg(default_factory=lambda: list(MODELS), help="Which models to train.")
    batch_size: int = HfArg(default=32, help="Images in a step.")
    steps: int = HfArg(default=4, help="Steps of a process.")
    repetitions: int = HfArg(default=5, help="How often each process runs.")


def teacher(preset: str):
    return IBResNetForImageClassification(IBResNetConfig.from_preset(preset, num_labels=10))


def student(image_size: int, patch_size: int, hidden_size: int):
    return IBViTForImageClassification(
        IBViTConfig(
            teacher_names=("conv", "inv"), image_size=image_size, patch_size=patch_size, hidden_size=hidden_size,
            num_hidden_layers=4, num_attention_heads=4, intermediate_size=2 * hidden_size,
            patch_embedding="convolution", num_labels=10,
        )
    )  # fmt: skip


# The side of the images in pixels, and the model.
MODELS = {
    "convolution teacher": (28, lambda: teacher("convolution-small")),
    "involution teacher": (28, lambda: teacher("involution-small")),
    "IBViT": (28, lambda: student(28, 4, 96)),
    "large IBViT": (224, lambda: student(224, 16, 192)),
    "MobileNetV2": (224, lambda: MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=10))),
}


def train(bench: FreedMemoryArguments, name: str, is_kept: bool) -> tuple[float, int]:
    """Seconds of the fastest step, and the peak of memory in bytes."""
    if is_kept and not keep_freed_memory():
        raise OSError(
            "What is kept cannot be set here. Run this under glibc, without MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ and "
            "GLIBC_TUNABLES in the environment."
        )
    torch.set_num_threads(1)
    set_seed(0)
    image_size, build = MODELS[name]
    model, seconds = build().train(), []
    optimizer = torch.optim.AdamW(model.parameters())
    pixels = torch.randn(bench.batch_size, 3, image_size, image_size)
    labels = torch.randint(10, (bench.batch_size,))
    for _ in range(bench.steps):
        begin = time.process_time()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begin)
    return min(seconds), peak_bytes()


def main():
    bench = parse(FreedMemoryArguments, __doc__)
    measured = {name: {False: [], True: []} for name in bench.models}
    for repetition in range(bench.repetitions):
        for name, of_model in measured.items():
            # The other way around each time, because the machine's speed drifts.
            for is_kept in sorted(of_model, reverse=repetition % 2 == 1):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    of_model[is_kept].append(pool.submit(train, bench, name, is_kept).result())
    rows, figures = [], []
    for name, of_model in measured.items():
        (given_back, _), (kept, _) = found = [np.array(of_model[is_kept]).T for is_kept in (False, True)]
        peaks = [float(np.median(memory)) for _, memory in found]
        ratio = quartiles(given_back / kept)
        cells = [f"{1e3 * np.median(seconds):,.0f}" for seconds in (given_back, kept)]
        rows.append([name, MODELS[name][0], *cells, spread(ratio, 2), *(f"{peak / 1e6:,.0f}" for peak in peaks)])
        figures.append(
            {"model": name, "seconds": [given_back.tolist(), kept.tolist()], "speed": ratio, "peaks": peaks}
        )
    header = ["model", "pixels", "ms a step, given back", "ms, kept", "speed", "peak MB, given back", "peak MB, kept"]
    print(markdown_table(header, rows))
    write_results(bench, figures=figures)


if __name__ == "__main__":
    main()
