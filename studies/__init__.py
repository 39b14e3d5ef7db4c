"""The studies: what the method is worth, measured. Each runs from the root of the repository by `python -m`."""
