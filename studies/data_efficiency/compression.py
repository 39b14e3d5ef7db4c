"""What a student costs beside its teachers: parameters, operations, size, speed and accuracy, in float32 and in 8 bits.

    python -m studies.data_efficiency.compression --name cifar10 --dataset FOLDER --images 5000 --methods conv inv both_all

The models are those of one seed, which the study left in WORK_DIR. Their speed is that of onnxruntime with one thread: all models
in turn, medians, for one image and for a batch. The last row is both teachers together, whose probabilities are averaged.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser
from transformers.hf_argparser import HfArg

from hf_ibdistill import export_onnx, quantize_onnx
from hf_ibdistill.commands.export import onnx_logits
from hf_ibdistill.data.classes import label_ids
from hf_ibdistill.evaluation import log_mean_probability
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.publishing.machine import describe_machine
from hf_ibdistill.rows import ImageRows

from .recipes import DATASETS, METHODS, TEACHERS
from .runs import Study, study_folders, write


BATCH_SIZES = (1, 32)
FILES = {"float32": "model.onnx", "int8": "model_quantized.onnx"}


@dataclass
class CompressionArguments:
    name: str = HfArg(help=f"The data set: {', '.join(DATASETS)}.")
    dataset: str | None = HfArg(default=None, help="Its folder; by default its Hub id.")
    images: int = HfArg(default=5000, help="Size of the training subset.")
    methods: list[str] = HfArg(
        default_factory=lambda: [*TEACHERS, "undistilled", "both_views", "both_all"],
        help="Models: METHOD or METHOD_VARIATION.",
    )
    seed: int = HfArg(default=0, help="Seed of the models.")
    repetitions: int = HfArg(default=15, help="How often each model is timed.")
    results_dir: str | None = HfArg(default=None, help="By default results/data_efficiency/NAME.")
    work_dir: str | None = HfArg(default=None, help="By default outputs/data_efficiency/NAME.")


def count_operations(model, pixels: torch.Tensor) -> int:
    """Multiplications and additions of a forward pass: those of matrix products, convolutions and involutions."""

    def of_involution(input_shape, kernel_shape, *_, out_shape=None, **__):
        batch, _, taps, height, width = kernel_shape
        return 2 * batch * input_shape[1] * taps * height * width

    involution = torch.ops.hf_ibdistill.involution2d
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={involution: of_involution}) as counter:
        model(pixel_values=pixels)
    return counter.get_total_flops()


def time_files(files: dict[str, Path], pixels: torch.Tensor, repetitions: int) -> dict[str, float]:
    """Name → median milliseconds of a pass over the pixels in onnxruntime with one thread."""
    options, seconds = onnxruntime.SessionOptions(), {name: [] for name in files}
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }
    random, given = np.random.default_rng(0), {"pixel_values": pixels.numpy()}
    for _ in range(repetitions):
        for name in random.permutation(list(sessions)):
            start = time.perf_counter()
            sessions[name].run(["logits"], given)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * float(np.median(measured)) for name, measured in seconds.items()}


def measure(folders: dict[str, Path], rows, repetitions: int) -> dict[str, dict]:
    """Name of a model → its parameters, operations of an image, and for each kind of file its bytes, accuracy and milliseconds
    of a pass; "teachers" is both of them."""
    labels, found, logits, timed = np.array(label_ids(rows)), {}, {}, {}
    with tempfile.TemporaryDirectory() as work:
        for name, folder in folders.items():
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            processor = AutoImageProcessor.from_pretrained(folder)
            pixels = torch.randn(1, 3, processor.size["height"], processor.size["width"])
            path = export_onnx(model, processor, Path(work) / name / FILES["float32"])
            paths = {"float32": path, "int8": quantize_onnx(path, path.with_name(FILES["int8"]))}
            outputs = onnx_logits(list(paths.values()), ImageRows(rows), processor, batch_size=100)
            found[name] = {"parameters": model.num_parameters(), "operations": count_operations(model, pixels)}
            for kind, path in paths.items():
                logits[name, kind] = outputs[path.name]
                found[name][kind] = {"bytes": path.stat().st_size}
                timed[name, kind] = path
        for size in BATCH_SIZES:
            files = {f"{name} {kind}": path for (name, kind), path in timed.items()}
            seconds = time_files(files, torch.randn(size, *pixels.shape[1:]), repetitions)
            for name, kind in timed:
                found[name][kind][f"milliseconds_of_{size}"] = seconds[f"{name} {kind}"]
    if set(TEACHERS) <= set(found):
        teachers = [found[name] for name in TEACHERS]
        both = {key: sum(one[key] for one in teachers) for key in ("parameters", "operations")}
        for kind in FILES:
            both[kind] = {key: sum(one[kind][key] for one in teachers) for key in teachers[0][kind]}
            logits["teachers", kind] = log_mean_probability(np.stack([logits[name, kind] for name in TEACHERS]))
        found["teachers"] = both
    for (name, kind), values in logits.items():
        found[name][kind]["accuracy"] = float((values.argmax(-1) == labels).mean())
    return found


def table(found: dict[str, dict]) -> str:
    header = ["model", "parameters", "million operations an image"]
    for kind in FILES:
        header += [f"{kind}: accuracy (%)", "MB", *(f"ms, batch {size}" for size in BATCH_SIZES)]
    rows = []
    for name, one in found.items():
        method, _, variation = name.partition("_base")
        title = (
            METHODS[method].title if method in METHODS else "both teachers together" if name == "teachers" else name
        )
        row = [title + variation.replace("_", ", "), f"{one['parameters']:,}", f"{one['operations'] / 1e6:.0f}"]
        for kind in FILES:
            times = [f"{one[kind][f'milliseconds_of_{size}']:.2f}" for size in BATCH_SIZES]
            row += [f"{100 * one[kind]['accuracy']:.1f}", f"{one[kind]['bytes'] / 1e6:.2f}", *times]
        rows.append(row)
    return markdown_table(header, rows)


def main(arguments=None):
    (args,) = HfArgumentParser(CompressionArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(
        arguments
    )
    results_dir, work_dir = study_folders(args.name, args.results_dir, args.work_dir)
    study = Study(args.name, args.dataset or DATASETS[args.name].source, results_dir, work_dir)
    folder = work_dir / f"{args.images}_{args.seed}"
    folders = {name: folder / (f"{name}_base" if name in METHODS else name) for name in args.methods}
    for name, path in folders.items():
        if not (path / "config.json").exists():
            raise ValueError(f"methods={name}: there is no model in {path}. Make its cell with --stage grid first.")
    found = measure(folders, study.test_rows(), args.repetitions)
    write(
        results_dir / f"compression_{args.images}.json",
        {"machine": describe_machine(), "seed": args.seed, "models": found},
    )
    print(table(found))


if __name__ == "__main__":
    main()
