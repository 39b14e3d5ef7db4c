"""Prediction speed of exported students in onnxruntime, in float32 and in 8-bit integers, beside PyTorch in float32.

    python scripts/benchmark_export.py

All on the processor, with as many threads each, in turn, in another order each repetition. The students are untrained, since
what they have learned makes no difference to the time. A ratio is the median, with quartiles, over the repetitions of the
ratios within one.
"""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnxruntime
import torch
from arguments import parse_arguments, run
from timing import Case, spread, time_in_turn, write_results
from transformers import ViTImageProcessor

from hf_ibdistill import IBViTConfig, IBViTForImageClassification, export_onnx, quantize_onnx
from hf_ibdistill.report import markdown_table


SMALL = {"image_size": 28, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 192, "num_labels": 10}  # fmt: skip
STUDENTS = {
    "28 pixels, 96 wide, convolution stem": IBViTConfig(patch_embedding="convolution", **SMALL),
    "28 pixels, 96 wide, both stems": IBViTConfig(patch_embedding="bias_stems", **SMALL),
    "224 pixels, deit-tiny": IBViTConfig.from_preset("deit-tiny", num_labels=1000),
}


@dataclass
class ExportBenchmarkArguments:
    output_file: str = field(default="outputs/benchmark_export.json", metadata={"help": "Where the figures go."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Images a forward pass."})
    images: int = field(default=64, metadata={"help": "Images that each runs over in a repetition."})
    repetitions: int = field(default=9, metadata={"help": "How often each is timed."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, images and orders."})


def make_cases(model, paths: dict[str, Path], pixels: torch.Tensor, images: int) -> dict[str, Case]:
    options, rounds = onnxruntime.SessionOptions(), -(-images // len(pixels))
    options.intra_op_num_threads = torch.get_num_threads()

    def run_torch(_):
        with torch.no_grad():
            for _ in range(rounds):
                model(pixel_values=pixels)

    def runner(path):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run_onnx(_):
            for _ in range(rounds):
                session.run(["logits"], {"pixel_values": pixels.numpy()})

        return run_onnx

    runs = {"PyTorch": run_torch, **{name: runner(path) for name, path in paths.items()}}
    return {name: Case(name, timed, rounds * len(pixels)) for name, timed in runs.items()}


def main():
    (bench,) = parse_arguments(ExportBenchmarkArguments)
    torch.manual_seed(bench.seed)
    entries, rows = [], []
    for title, config in STUDENTS.items():
        model, side = IBViTForImageClassification(config).eval(), config.image_size
        processor = ViTImageProcessor(size={"height": side, "width": side})
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(model, processor, Path(folder) / "model.onnx")
            paths = {"onnxruntime": path, "8 bits": quantize_onnx(path, Path(folder) / "model_quantized.onnx")}
            megabytes = {"PyTorch": "", **{name: f"{path.stat().st_size / 1e6:.1f}" for name, path in paths.items()}}
            for batch_size in bench.batch_sizes:
                pixels = torch.randn(batch_size, 3, side, side)
                cases = make_cases(model, paths, pixels, bench.images)
                time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
                for name, case in cases.items():
                    ratio = case.speed_against(cases["PyTorch"])
                    entries.append({"student": title, "batch_size": batch_size, "case": name, "rate": case.rate})
                    entries[-1]["ratio"] = ratio
                    rows.append([title, batch_size, name, megabytes[name], spread(case.rate, 0), spread(ratio, 2)])
    write_results(bench.output_file, {"arguments": asdict(bench), "entries": entries})
    print(markdown_table(["student", "batch", "", "MB", "images/s (quartiles)", "× PyTorch"], rows))


if __name__ == "__main__":
    run(main)
