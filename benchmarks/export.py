"""Prediction speed of students and teachers: exported to onnxruntime, in float32 and in 8 bits, against PyTorch.

    python benchmarks/export.py

All run on the CPU with as many threads each. The models are untrained, because weights do not change the time.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from timing import Case, parse, spread, time_in_turn, write_results
from transformers import AutoModelForImageClassification, ViTImageProcessor
from transformers.hf_argparser import HfArg

from hf_ibdistill import IBResNetConfig, IBViTConfig, export_onnx, quantize_onnx
from hf_ibdistill.publishing.cards import markdown_table


SMALL = {"image_size": 28, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 192, "num_labels": 10}  # fmt: skip
# The models of one image size are timed together. The first is the baseline of the others.
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
class ExportArguments:
    output_file: str = HfArg(default="outputs/benchmark_export.json", help="Where the results go.")
    batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 32], help="Images a forward pass.")
    images: int = HfArg(default=64, help="Images of each model in a repetition.")
    repetitions: int = HfArg(default=9, help="How often each is timed.")
    seed: int = HfArg(default=0, help="Seed of weights, images and orders.")


def export(model, processor, folder: Path) -> dict[str, Path]:
    path = export_onnx(model, processor, folder / "model.onnx")
    return {"onnxruntime": path, "8 bits": quantize_onnx(path, folder / "model_quantized.onnx")}


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
    bench = parse(ExportArguments, __doc__)
    torch.manual_seed(bench.seed)
    entries, rows = [], []
    for side, configs in MODELS.items():
        processor = ViTImageProcessor(size={"height": side, "width": side})
        build = AutoModelForImageClassification.from_config
        models = {title: build(config).eval() for title, config in configs.items()}
        with tempfile.TemporaryDirectory() as folder:
            paths = {title: export(model, processor, Path(folder) / title) for title, model in models.items()}
            for batch_size in bench.batch_sizes:
                pixels, cases = torch.randn(batch_size, 3, side, side), {}
                for title, model in models.items():
                    timed = make_cases(model, paths[title], pixels, bench.images)
                    cases |= {(title, name): case for name, case in timed.items()}
                time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
                for (title, name), case in cases.items():
                    entry = {"model": title, "image_size": side, "batch_size": batch_size, "case": name}
                    against = {"against_pytorch": (title, "PyTorch"), "against_first": (next(iter(models)), name)}
                    ratios = {what: case.speed_against(cases[baseline]) for what, baseline in against.items()}
                    entries.append({**entry, "rate": case.rate, **ratios})
                    megabytes = f"{paths[title][name].stat().st_size / 1e6:.1f}" if name in paths[title] else ""
                    shown = [spread(case.rate, 0), *(spread(ratio, 2) for ratio in ratios.values())]
                    rows.append([side, title, batch_size, name, megabytes, *shown])
    write_results(bench, entries=entries)
    header = ["pixels", "model", "batch", "", "MB", "images/s (quartiles)", "× PyTorch", "× the first model"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
