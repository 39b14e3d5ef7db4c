"""Open a dataset: its source, splits, columns, classes, and images without labels."""

import importlib


_MODULE_OF = {
    "as_image_table": "columns",
    "check_class_names": "classes",
    "class_config": "classes",
    "class_names": "classes",
    "load_image_dataset": "loading",
    "select_per_class": "splits",
}

__all__ = list(_MODULE_OF)


# On first use, because `images` imports the columns from here, and `loading` imports `images`.
def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
