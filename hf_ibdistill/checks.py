"""Check numbers that a user gives, and optional libraries."""

import importlib.util
import math
from numbers import Integral, Real


def check_numbers(low: float, high: float = math.inf, *, whole: bool = False, **values: object) -> None:
    """Refuse an argument that is no finite number in this range.

    Args:
        low: the smallest number allowed.
        high: the largest.
        whole: whether only whole numbers are allowed.
        values: argument → its value.

    Raises:
        ValueError: the first argument that does not fit.
    """
    for name, value in values.items():
        is_number = isinstance(value, Integral) and not isinstance(value, bool) if whole else isinstance(value, Real)
        if not is_number or not low <= value <= high or not -math.inf < value < math.inf:
            kind = "a whole number" if whole else "a number"
            upper = "" if high == math.inf else f" and at most {high}"
            raise ValueError(f"{name}={value!r} is out of range. Choose {kind} of at least {low}{upper}.")


def check_installed(*names: str, extra: str) -> None:
    """Raise `ImportError` unless these libraries, which an extra of the package installs, can be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'Not installed: {", ".join(missing)}. Run pip install "hf_ibdistill[{extra}]".')
