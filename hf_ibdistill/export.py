"""Export models as programs of PyTorch and as ONNX files, which run without this package."""

import copy
import os
import tempfile
from pathlib import Path

import torch
from PIL.Image import new as new_image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from .checks import check_installed
from .files import write_whole
from .images.preprocessing import pixel_values
from .teachers import without_autocast


class _Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        outputs = self.model(pixel_values=pixel_values)
        return outputs[0] if isinstance(outputs, tuple) else outputs.logits


def export_program(model: PreTrainedModel, image_processor: BaseImageProcessor) -> torch.export.ExportedProgram:
    """Export an image classifier as a program of operators of PyTorch, in float32 and evaluation mode.

    The model itself is not changed. `torch.export.save` writes the program to a file that runs without this package.

    Args:
        model: a student, or any image classifier that `torch.export` can trace.
        image_processor: its image processor.

    Returns:
        The program, with the input `pixel_values` (N, channels, height, width) and the output logits (N, classes). N is any
        number from 1. The height and width are those that the image processor gives. The logits of a student are the fused
        prediction.

    Raises:
        ValueError: `torch.export` cannot trace the model.

    Example:

    ```python
    >>> program = export_program(model, image_processor)
    >>> logits = program.module()(pixel_values=image_processor(images, return_tensors="pt")["pixel_values"])
    ```
    """
    model = copy.deepcopy(without_autocast(model)).float().cpu()
    # Any size will do, because the processor makes all images one size.
    pixels = pixel_values([new_image("RGB", (64, 64))] * 2, {"model": image_processor})["model"]
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        try:
            return torch.export.export(_Logits(model).eval(), (), {"pixel_values": pixels}, dynamic_shapes=shapes)
        except Exception as error:  # whatever the code of any model raises
            raise ValueError(f"{type(model).__name__} cannot be traced by torch.export: {error}") from error


def export_onnx(model: PreTrainedModel, image_processor: BaseImageProcessor, path: str | os.PathLike) -> Path:
    """Write the program of [`export_program`] as an ONNX file, with the input `pixel_values` and the output `logits`.

    The tools of the Hub look for it in `onnx/model.onnx`, beside the configuration and the image processor.

    Args:
        model: a student, or any image classifier whose operators ONNX has.
        image_processor: its image processor.
        path: the file. An existing file is replaced once the new one is complete.

    Returns:
        `path`.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: as from [`export_program`], or ONNX lacks an operator of the model.

    Example:

    ```python
    >>> export_onnx(model, image_processor, "outputs/student/onnx/model.onnx")
    >>> session = onnxruntime.InferenceSession("outputs/student/onnx/model.onnx")
    >>> (logits,) = session.run(None, {"pixel_values": image_processor(images, return_tensors="np")["pixel_values"]})
    ```
    """
    check_installed("onnx", "onnxscript", extra="onnx")
    program = export_program(model, image_processor)
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    try:
        exported = torch.onnx.export(program, **names, dynamo=True, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be written as ONNX ({type(error).__name__}: {error.__cause__}). Use export_program."
        ) from error
    write_whole(path, exported.save)
    return Path(path)


def quantize_onnx(source: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Write an ONNX file whose linear layers are 8-bit integers, by the dynamic quantization of onnxruntime.

    Weights are quantized for each output channel, activations when the model runs. Weights use 7 of the 8 bits, so that sums
    overflow on no processor. Measure the accuracy on your data, because models differ in how much they lose.

    Args:
        source: a file that [`export_onnx`] wrote.
        path: the new file. The tools of the Hub look for `onnx/model_quantized.onnx`.

    Returns:
        `path`.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
    """
    check_installed("onnx", "onnxruntime", extra="onnx")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def quantize(beside):
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "model.onnx"
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            # Not the convolutions, which would be slower than in float32. And 7 bits, because processors without VNNI add two
            # products in 16 bits, which products of 8 bits would overflow.
            how = {"per_channel": True, "weight_type": QuantType.QInt8, "reduce_range": True}
            quantize_dynamic(prepared, beside, ["MatMul", "Gemm"], **how)

    write_whole(path, quantize)
    return Path(path)
