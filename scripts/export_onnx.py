"""Write a saved model as an ONNX file and measure it in onnxruntime, beside the model itself.

    python scripts/export_onnx.py --model outputs/student
    python scripts/export_onnx.py --model outputs/student --quantize

The file is MODEL/onnx/model.onnx, and with 8-bit integers model_quantized.onnx, where the Hub's tools look for them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from arguments import DataArguments, parse_arguments, result_split, run
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_ibdistill import export_onnx, predict, quantize_onnx
from hf_ibdistill.export import check_installed
from hf_ibdistill.images import ImageRows, pixel_values


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    output_dir: str | None = field(default=None, metadata={"help": "By default the model's folder, in it onnx."})
    quantize: bool = field(default=False, metadata={"help": "Also write the linear layers in 8-bit integers."})
    max_accuracy_drop: float = field(
        default=0.003, metadata={"help": "A quantised file that is less accurate by more than this is not kept."}
    )
    batch_size: int = field(default=256, metadata={"help": "Images a forward pass."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that the Hub repository brings."})

    def folder(self) -> Path:
        if self.output_dir is None and not Path(self.model).is_dir():
            raise ValueError(f"{self.model} is no folder here; say with --output_dir where the ONNX file goes.")
        return Path(self.output_dir or Path(self.model) / "onnx")


def onnx_logits(paths: list[Path], images: ImageRows, processor, batch_size: int) -> dict[str, np.ndarray]:
    """File's name → logits of all images, which are decoded once."""
    import onnxruntime

    sessions = {path.name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths}
    logits = {name: [] for name in sessions}
    for start in range(0, len(images), batch_size):
        rows = images.__getitems__(range(start, min(start + batch_size, len(images))))
        pixels = pixel_values([row[images.image_column] for row in rows], {"model": processor})["model"].numpy()
        for name, session in sessions.items():
            logits[name] += session.run(["logits"], {"pixel_values": pixels})
    return {name: np.concatenate(batches) for name, batches in logits.items()}


def main():
    data, export = parse_arguments(DataArguments, ExportArguments)
    check_installed("onnxruntime")
    folder, splits = export.folder(), data.load()
    split = splits[result_split(splits)]
    trust = {"trust_remote_code": export.trust_remote_code}
    model = AutoModelForImageClassification.from_pretrained(export.model, dtype="float32", **trust)
    processor = AutoImageProcessor.from_pretrained(export.model, **trust)
    columns = {"image_column": data.image_column, "label_column": data.label_column}

    paths = [export_onnx(model, processor, folder / "model.onnx")]
    if export.quantize:
        paths.append(quantize_onnx(paths[0], folder / "model_quantized.onnx"))
    outputs = predict(model, processor, split, batch_size=export.batch_size, **columns)
    accuracy = float((outputs["logits"].argmax(-1) == outputs["labels"]).mean())
    report = {"images": len(split), "accuracy": accuracy}
    found = onnx_logits(paths, ImageRows(split, data.image_column), processor, export.batch_size)
    for path in paths:
        logits = found[path.name]
        report[path.name] = {
            "bytes": path.stat().st_size,
            "accuracy": float((logits.argmax(-1) == outputs["labels"]).mean()),
            "largest_difference": float(np.abs(logits - outputs["logits"]).max()),
        }
    print(json.dumps(report, indent=2))
    if export.quantize and report[paths[1].name]["accuracy"] < accuracy - export.max_accuracy_drop:
        paths[1].unlink()
        raise ValueError(
            f"{paths[1]} was not kept: it is less accurate than the model by more than {export.max_accuracy_drop}. "
            "Give --max_accuracy_drop to keep it anyway."
        )


if __name__ == "__main__":
    run(main)
