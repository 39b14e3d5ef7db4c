"""Rows → batch."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import BaseImageProcessor

from ..images import pixel_values
from ..logits.encoding import column_name


class DistillationCollator:
    """Preprocess the images of decoded rows and stack their labels and teacher logits.

    Args:
        image_processor: prepares the student's images.
        image_column, label_column: columns of the rows.
        teacher_names: stack these teachers' logits, in this order, when the rows carry them.
        teacher_image_processors: name → image processor of each online teacher.

    A batch has `pixel_values` (N, channels, H, W), `labels` (N,), `teacher_logits` (N, T, C) in the type that they are
    stored in when the rows carry every teacher's column, and `teacher_pixel_values`, name → (N, channels, H, W), for
    online teachers.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        image_column: str = "image",
        label_column: str = "label",
        teacher_names: Sequence[str] = (),
        teacher_image_processors: Mapping[str, BaseImageProcessor] | None = None,
    ):
        self.image_processor = image_processor
        self.image_column, self.label_column = image_column, label_column
        self.logits_columns = [column_name(name) for name in teacher_names]
        self.teacher_image_processors = dict(teacher_image_processors or {})

    def __call__(self, rows: Sequence[dict]) -> dict:
        images = [row[self.image_column] for row in rows]
        # No teacher can be called "": a name is an identifier.
        tensors = pixel_values(images, {"": self.image_processor, **self.teacher_image_processors})
        batch = {
            "pixel_values": tensors.pop(""),
            "labels": torch.tensor([int(row[self.label_column]) for row in rows]),
        }
        if self.logits_columns and all(column in rows[0] for column in self.logits_columns):
            # Not float32 yet: what is stored in half of it also takes half the way to the device.
            logits = np.concatenate([row[column] for row in rows for column in self.logits_columns])
            logits = logits.reshape(len(rows), len(self.logits_columns), -1)
            batch["teacher_logits"] = torch.from_numpy(logits)
        if tensors:
            batch["teacher_pixel_values"] = tensors
        return batch
