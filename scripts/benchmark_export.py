"""Prediction speed of students and teachers: exported to onnxruntime, in float32 and in 8-bit integers, beside PyTorch in
float32; and of a teacher as the final model beside its student.

    python scripts/benchmark_export.py

All on the processor, with as many threads each, in turn, in another order each repetition. The models are untrained, since
what they have learned makes no difference to the time. A ratio is the median, with quartiles, over the repetitions of the
ratios within one.
"""

import tempfile
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import onnxruntime
import torch
from arguments import parse_arguments, run
from timing import Case, spread, time_in_turn, write_results
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_ibdistill import IBResNetConfig, IBViTConfig, export_onnx, quantize_onnx
from hf_ibdistill.report import markdown_table


SMALL = {"image_size": 28, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 192, "num_labels": 10}  # fmt: skip
# Those of one image size are timed together. The first of them is what the others are compared with.
MODELS = {
    28: {
        "student, convolution stem": IBViTConfig(patch_embedding="convolution", **SMALL),
        "student, both stems": IBViTConfig(patch_embedding="bias_stems", **SMALL),
        "convolution teacher": IBResNetConfig.from_preset("convolution-small", num_labels=10),
        "involution teacher": IBResNetConfig.from_preset("involution-small", num_labels=10),
    },
    224: {"student, deit-tiny": IBViTConfig.from_preset("deit-tiny", num_labels=1000)},
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
    for (side, configs), batch_size in product(MODELS.items(), bench.batch_sizes):
        processor = ViTImageProcessor(size={"height": side, "width": side})
        pixels = torch.randn(batch_size, 3, side, side)
        cases, megabytes = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for number, (title, config) in enumerate(configs.items()):
                model = AutoModelForImageClassification.from_config(config).eval()
                path = export_onnx(model, processor, Path(folder) / f"{number}.onnx")
                paths = {"onnxruntime": path, "8 bits": quantize_onnx(path, Path(folder) / f"{number}_quantized.onnx")}
                for name, case in make_cases(model, paths, pixels, bench.images).items():
                    cases[title, name] = case
                    megabytes[title, name] = f"{paths[name].stat().st_size / 1e6:.1f}" if name in paths else ""
            time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
        for (title, name), case in cases.items():
            first = cases[next(iter(configs)), name]
            ratios = [case.speed_against(other) for other in (cases[title, "PyTorch"], first)]
            entries.append({"model": title, "image_size": side, "batch_size": batch_size, "case": name})
            entries[-1] |= {"rate": case.rate, "against_pytorch": ratios[0], "against_first": ratios[1]}
            shown = [spread(case.rate, 0), *(spread(ratio, 2) for ratio in ratios)]
            rows.append([side, title, batch_size, name, megabytes[title, name], *shown])
    write_results(bench.output_file, {"arguments": asdict(bench), "entries": entries})
    header = ["pixels", "model", "batch", "", "MB", "images/s (quartiles)", "× PyTorch", "× the first model"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    run(main)
