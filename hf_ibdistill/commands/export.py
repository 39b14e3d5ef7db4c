"""Write a saved model as an ONNX file, and measure it in onnxruntime.

hf-ibdistill export --model outputs/student
hf-ibdistill export --model outputs/student --quantize

The files are MODEL/onnx/model.onnx and, with 8-bit integers, MODEL/onnx/model_quantized.onnx. The
tools of the Hub look for these names.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoImageProcessor
from transformers.hf_argparser import HfArg

from ..checks import check_installed
from ..data.classes import labelled_rows
from ..data.columns import IMAGE
from ..evaluation import predict
from ..export import export_onnx, quantize_onnx
from ..images.preprocessing import pixel_values
from ..rows import ImageRows
from ..teachers import load_classifier
from .arguments import DataArguments, parse, result_split, run
from .display import metric_text, show_results, uses_of


@dataclass
class ExportArguments:
    _argument_group_name = "export"

    model: str = HfArg(help="Folder or Hub id of the model.")
    output_dir: str | None = HfArg(default=None, help="By default the folder onnx in that of the model.")
    quantize: bool = HfArg(default=False, help="Also write the linear layers in 8-bit integers.")
    max_accuracy_drop: float = HfArg(
        default=0.003, help="Delete a quantized file whose accuracy is lower by more than this."
    )
    batch_size: int = HfArg(default=256, help="Images in a batch.")
    trust_remote_code: bool = HfArg(default=False, help="Run the code of the model repository.")

    def folder(self) -> Path:
        if self.output_dir is None and not Path(self.model).is_dir():
            raise ValueError(f"model={self.model} is no local folder. Give --output_dir for the ONNX file.")
        return Path(self.output_dir or Path(self.model) / "onnx")


def onnx_logits(paths: list[Path], images: ImageRows, processor, batch_size: int) -> dict[str, np.ndarray]:
    """Name of the file → logits of all images, (N, classes). Every image is decoded once."""
    import onnxruntime

    sessions = {path.name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths}
    logits = {name: [] for name in sessions}
    for start in range(0, len(images), batch_size):
        rows = images.__getitems__(range(start, min(start + batch_size, len(images))))
        pixels = pixel_values([row[IMAGE] for row in rows], {"model": processor})["model"].numpy()
        for name, session in sessions.items():
            logits[name] += session.run(["logits"], {"pixel_values": pixels})
    return {name: np.concatenate(batches) for name, batches in logits.items()}


def main(arguments):
    data, export = parse("export", __doc__, arguments, DataArguments, ExportArguments)
    check_installed("onnxruntime", extra="onnx")
    folder, splits = export.folder(), data.load()
    split = result_split(splits)
    split = labelled_rows(splits[split], f"The {split} split")
    trust = {"trust_remote_code": export.trust_remote_code}
    model = load_classifier(export.model, dtype="float32", **trust)
    processor = AutoImageProcessor.from_pretrained(export.model, **trust)

    outputs = predict(model, processor, split, batch_size=export.batch_size)
    paths = [export_onnx(model, processor, folder / "model.onnx")]
    if export.quantize:
        paths.append(quantize_onnx(paths[0], folder / "model_quantized.onnx"))
    accuracy = float((outputs["logits"].argmax(-1) == outputs["labels"]).mean())
    report = {"images": len(split), "accuracy": accuracy}
    found = onnx_logits(paths, ImageRows(split), processor, export.batch_size)
    for path in paths:
        logits = found[path.name]
        report[path.name] = {
            "bytes": path.stat().st_size,
            "accuracy": float((logits.argmax(-1) == outputs["labels"]).mean()),
            "largest_difference": float(np.abs(logits - outputs["logits"]).max()),
        }
    rows = [["PyTorch", metric_text("accuracy", accuracy), "", ""]]
    for path in paths:
        found = report[path.name]
        size = f"{found['bytes'] / 1e6:.2f} MB"
        rows.append([path, metric_text("accuracy", found["accuracy"]), f"{found['largest_difference']:.2g}", size])
    header = [f"{len(split):,} images", "accuracy", "largest difference of a logit", "size"]
    show_results(report, header, rows, *uses_of(export.model)[1:])
    if export.quantize and report[paths[1].name]["accuracy"] < accuracy - export.max_accuracy_drop:
        paths[1].unlink()
        raise ValueError(
            f"{paths[1]} was not kept: its accuracy is lower than that of the model by more than "
            f"max_accuracy_drop={export.max_accuracy_drop}. Raise --max_accuracy_drop to keep it."
        )


if __name__ == "__main__":
    run("export", main)
