"""Images and teachers small enough to be recorded in every test."""

import io

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from transformers import ViTImageProcessor

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, IBViTConfig, IBViTForImageClassification


NAMES = ["cat", "dog", "eel"]


def image_bytes(seed, size=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_images(num_rows=50, broken=()):
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES), "note": Value("string")})
    encoded = [b"not an image" if row in broken else image_bytes(row) for row in range(num_rows)]
    rows = {
        "image": [{"bytes": content, "path": None} for content in encoded],
        "label": [row % 3 for row in range(num_rows)],
        "note": [f"row {row}" for row in range(num_rows)],
    }
    return Dataset.from_dict(rows, features=features)


def make_teacher(folder, preset="convolution-small", seed=0, size=8, names=NAMES):
    torch.manual_seed(seed)
    config = IBResNetConfig.from_preset(
        preset, depths=(1, 1, 1), hidden_sizes=(16, 16, 32), id2label=dict(enumerate(names)), num_labels=len(names)
    )
    IBResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


def make_student(folder, names=NAMES, size=8):
    """A student with a token for "conv" and one for "inv"."""
    torch.manual_seed(2)
    shape = {"patch_size": 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    # Larger weights than for training, so that images differ in their prediction.
    config = IBViTConfig(image_size=size, **shape, initializer_range=0.5, id2label=dict(enumerate(names)))
    IBViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}, do_convert_rgb=True).save_pretrained(folder)
    return str(folder)
