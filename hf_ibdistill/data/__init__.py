"""Open a dataset: its source, splits, columns and classes."""

from .classes import check_class_names, class_config, class_names
from .columns import as_image_table
from .loading import load_image_dataset
from .splits import select_per_class


__all__ = [
    "as_image_table",
    "check_class_names",
    "class_config",
    "class_names",
    "load_image_dataset",
    "select_per_class",
]
