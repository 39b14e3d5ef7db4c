"""Logits columns as arrays, and logits by nothing but transformers, to compare them with."""

import numpy as np
import torch
from datasets import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_ibdistill.images.decoding import decode_image
from hf_ibdistill.images.views import make_view, row_key


def columns(table, names=("conv_logits", "inv_logits")):
    return {name: np.asarray(table.with_format("numpy")[name]) for name in names}


def same_bytes(first, second):
    """Whether two tables have the same columns with the same content, bit for bit."""
    first, second = (
        {name: table.with_format("arrow")[:][name].combine_chunks() for name in table.column_names}
        for table in (first, second)
    )
    return first.keys() == second.keys() and all(first[name].equals(second[name]) for name in first)


def logits_by_hand(folder, dataset, recipe=None):
    """(rows, classes), or (rows, views, classes) with a recipe, one image at a time through the folder's own image
    processor."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows = []
    for row in dataset.cast_column("image", Image(decode=False)):
        image = decode_image(row["image"])
        views = [image]
        if recipe is not None:
            views = [make_view(image, recipe, row_key(image), view) for view in range(recipe.num_views)]
        with torch.no_grad():
            rows.append([model(**processor(view, return_tensors="pt")).logits[0].numpy() for view in views])
    logits = np.array(rows)
    return logits[:, 0] if recipe is None else logits
