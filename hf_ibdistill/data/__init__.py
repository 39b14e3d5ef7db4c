"""Open a dataset: its source, splits, columns, classes, and images without labels."""
