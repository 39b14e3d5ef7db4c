"""Class ids and differences of logits ↔ bytes of few bits."""

import numpy as np


LEVEL_BITS = 3
# Differences as shares of the largest one: dense near 0, where the probabilities are. The first stands for 0 as well, so that
# only the class of the largest logit, which is stored apart, has a difference of 0.
_LEVELS = ((np.arange(2**LEVEL_BITS) / (2**LEVEL_BITS - 1)) ** 1.5).astype(np.float32)
_LEVELS[0] = _LEVELS[1] / 4
# A share below the first bound is nearest to the first level, and so on.
_BOUNDS = (_LEVELS[1:] + _LEVELS[:-1]) / 2
# The largest difference, at most 9 % above what is needed: 2 to the power of (code − 199) / 8. Code 0 is 0, the last is 128, at
# which a probability is 0 in float32.
_SCALES = np.concatenate([[0], 2 ** (np.arange(-198, 57) / 8)]).astype(np.float32)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers (…, n) below 2^bits → bytes (…, ⌈n · bits / 8⌉), lowest bits first."""
    places = np.arange(bits, dtype=np.uint32)
    each = (values.astype(np.uint32)[..., None] >> places & 1).astype(np.uint8)
    return np.packbits(each.reshape(*values.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """What [`pack_bits`] packed: bytes (…, ⌈count · bits / 8⌉) → (…, count), uint32."""
    first, shift = np.divmod(np.arange(count) * bits, 8)
    words, last = packed[..., first].astype(np.uint32), packed.shape[-1] - 1
    # A value may end in one of the next bytes. Behind the last one is none, and the bits of another are cut off.
    for i in range(1, (bits + 14) // 8):
        words |= packed[..., np.minimum(first + i, last)].astype(np.uint32) << 8 * i
    return words >> shift.astype(np.uint32) & (2**bits - 1)


def _high_bits(num_classes):
    return max(0, (num_classes - 1).bit_length() - 8)


def split_ids(ids: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Class ids (…, k) → their low bytes (…, k) and, with more than 256 classes, their high bits, packed."""
    bits = _high_bits(num_classes)
    low = (ids & 255).astype(np.uint8)
    return [low, pack_bits(ids >> 8, bits)] if bits else [low]


def join_ids(parts: list[np.ndarray], num_classes: int) -> np.ndarray:
    """What [`split_ids`] split, int64.

    Raises:
        ValueError: the ids are those of another number of classes.
    """
    low, *high = parts
    bits, count = _high_bits(num_classes), low.shape[-1]
    if (high[0].shape[-1] if high else 0) != -(-bits * count // 8):
        raise ValueError(f"The packed class ids are not those of {num_classes} classes.")
    ids = low.astype(np.int64)
    return ids | unpack_bits(high[0], bits, count).astype(np.int64) << 8 if bits else ids


def pack_levels(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differences (…, k), none above 0, → the packed levels nearest to them (…, ⌈3k / 8⌉), and the code of their scale
    (…, 1). Those below −128 become −128."""
    codes = np.searchsorted(_SCALES, -differences.min(-1, keepdims=True)).clip(0, 255).astype(np.uint8)
    scales = _SCALES[codes]
    levels = np.searchsorted(_BOUNDS, -differences / np.where(scales > 0, scales, 1))
    return pack_bits(levels, LEVEL_BITS), codes


def unpack_levels(levels: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """What [`pack_levels`] packed: differences (…, count), float32."""
    return -_LEVELS[unpack_bits(levels, LEVEL_BITS, count)] * _SCALES[codes]


def level_bounds(levels: np.ndarray, codes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The differences (…, count), and the smallest and the largest that are packed like each."""
    numbers, scales = unpack_bits(levels, LEVEL_BITS, count), _SCALES[codes]
    low, high = np.append(_BOUNDS, 1)[numbers] * scales, np.insert(_BOUNDS, 0, 0)[numbers] * scales
    low[(low == _SCALES[-1]) & (numbers == len(_LEVELS) - 1)] = np.inf
    return -_LEVELS[numbers] * scales, -low, -high
