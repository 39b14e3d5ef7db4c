"""A way out: models as programs and as ONNX files, which run without this package."""

import copy
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from PIL.Image import new as new_image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from .images import pixel_values
from .logits.recording import write_beside
from .teachers import without_autocast


def check_installed(*names: str) -> None:
    """Raise `ImportError` unless these libraries are there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} must be installed for this: pip install "hf_ibdistill[onnx]".')


class _Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


def export_program(model: PreTrainedModel, image_processor: BaseImageProcessor) -> torch.export.ExportedProgram:
    """An image classifier as a program of PyTorch's own operators, in float32 and for prediction.

    Its one input is `pixel_values` (batch, channels, height, width), of the size that the image processor gives and of any
    batch; its output are the logits (batch, classes), of a student the fused prediction. What `torch.export.save` writes of it
    runs without this package. The model itself is left as it is.

    Args:
        model: a student, or any image classifier that `torch.export` can follow.
        image_processor: its image processor.

    Example:

    ```python
    >>> program = export_program(model, image_processor)
    >>> logits = program.module()(pixel_values=image_processor(images, return_tensors="pt")["pixel_values"])
    ```
    """
    model = copy.deepcopy(without_autocast(model)).float().cpu()
    # The images' own size matters to no processor that makes all images one size.
    pixels = pixel_values([new_image("RGB", (64, 64))] * 2, {"model": image_processor})["model"]
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(_Logits(model).eval(), (), {"pixel_values": pixels}, dynamic_shapes=shapes)


def export_onnx(model: PreTrainedModel, image_processor: BaseImageProcessor, path: str | os.PathLike) -> Path:
    """Write [`export_program`]'s program as an ONNX file, with the input `pixel_values` and the output `logits`. The Hub's tools
    look for it in `onnx/model.onnx` beside the model's configuration and image processor.

    Args:
        model: a student, or any image classifier whose operators ONNX has.
        image_processor: its image processor.
        path: the file; one that is there is replaced when the new one is complete.

    Returns:
        `path`.

    Raises:
        ImportError: onnx or onnxscript is not installed.

    Example:

    ```python
    >>> export_onnx(model, image_processor, "outputs/student/onnx/model.onnx")
    >>> session = onnxruntime.InferenceSession("outputs/student/onnx/model.onnx")
    >>> (logits,) = session.run(None, {"pixel_values": image_processor(images, return_tensors="np")["pixel_values"]})
    ```
    """
    check_installed("onnx", "onnxscript")
    program = export_program(model, image_processor)
    onnx_program = torch.onnx.export(
        program, input_names=["pixel_values"], output_names=["logits"], dynamo=True, verbose=False
    )
    write_beside(Path(path), onnx_program.save)
    return Path(path)


def quantize_onnx(source: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Write an ONNX file whose linear layers are 8-bit integers, by onnxruntime's dynamic quantisation: weights for each
    output channel, in 7 of the 8 bits, so that no processor's sums overflow; activations as they come. Measure it on your
    own data; some models bear it worse than others.

    Args:
        source: a file that [`export_onnx`] wrote.
        path: the new file; the Hub's tools look for `onnx/model_quantized.onnx`.

    Returns:
        `path`.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
    """
    check_installed("onnx", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def quantize(beside):
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "model.onnx"
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            # Convolutions too would make the whole more than twice as slow as in float32, as measured.
            # Weights of 7 bits: processors without VNNI add two products in 16 bits, which those of 8 bits overflow.
            quantize_dynamic(
                prepared,
                beside,
                ["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                reduce_range=True,
            )

    write_beside(Path(path), quantize)
    return Path(path)
