"""The statistics that the studies report."""

from collections.abc import Sequence

import numpy as np
import scipy.stats


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """The mean of `first` − `second` over pairs, with its confidence interval by Student's t-distribution.

    Args:
        first, second: one value a pair (a seed, or a test image).
        confidence: the probability that the interval contains the true mean.

    Returns:
        Mean, lower end, upper end. The ends of a single pair are NaN.

    Raises:
        ValueError: `first` and `second` differ in length.
    """
    differences = np.array([a - b for a, b in zip(first, second, strict=True)])
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, float("nan"), float("nan")
    error = scipy.stats.sem(differences)
    if error == 0:
        return mean, mean, mean
    low, high = scipy.stats.t.interval(confidence, len(differences) - 1, loc=mean, scale=error)
    return mean, float(low), float(high)
