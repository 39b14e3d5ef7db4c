"""Views: augmented versions of an image that recording and training make identically.

A view is a pure function of (recipe, row key, view index). The operations are those of torchvision. Their random numbers
come from a stream of their own, seeded for every view. So neither the order of the rows nor the number of workers nor
the batch size changes a pixel.

Nor does the processor. Kernels of torch round and draw floats differently on other processors. So images are resized and
colors are changed in whole numbers, and random numbers are rounded once.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np
import PIL.Image
import torch
from torchvision.transforms.v2 import functional as F

from ..checks import check_numbers


CROPS = ("none", "pad", "resized")
# Bits of a fraction. 255 times the largest factor, 1.9, fits into the others of an int32.
_BITS = 22
_ONE = 1 << _BITS


@dataclass(frozen=True)
class ViewRecipe:
    """How to make views, and how many of each image are stored.

    Args:
        num_views: V, the views of each image. Training uses one in each epoch, in turn.
        image_size: side of a view in pixels. `None` keeps the height and width of the image.
        crop: one of
            - `"pad"`: shift the image by up to `padding` of its side and fill the gap with black;
            - `"resized"`: cut out a random part and resize it (arXiv 1409.4842);
            - `"none"`: keep the whole image.
        padding: for `"pad"`, the largest shift, as a share of the side.
        scale: for `"resized"`, the smallest and the largest share of the area of the image.
        ratio: for `"resized"`, the smallest and the largest ratio of width to height.
        horizontal_flip: probability of a mirrored view.
        photometric_ops: number of color operations in a row, drawn from brightness, contrast, saturation, sharpness,
            posterize, solarize, autocontrast and equalize: those of RandAugment (arXiv 1909.13719).
        magnitude: strength of the color and the geometric operations, 0 to 10.
        erasing: probability that a random rectangle becomes gray (arXiv 1708.04896).
        seed: another seed makes other views.
        geometric_ops: number of geometric operations in a row, drawn from shear and shift along each axis and rotation:
            those of RandAugment.

    Raises:
        ValueError: a value out of range.
    """

    num_views: int = 1
    image_size: int | None = None
    crop: str = "pad"
    padding: float = 0.125
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.0
    photometric_ops: int = 0
    magnitude: float = 5.0
    erasing: float = 0.0
    seed: int = 0
    geometric_ops: int = 0

    def __post_init__(self):
        image_size = 1 if self.image_size is None else self.image_size
        check_numbers(1, whole=True, num_views=self.num_views, image_size=image_size)
        check_numbers(0, whole=True, photometric_ops=self.photometric_ops, geometric_ops=self.geometric_ops)
        check_numbers(-(2**63), 2**63 - 1, whole=True, seed=self.seed)
        check_numbers(0, 10, magnitude=self.magnitude)
        check_numbers(0, 1, horizontal_flip=self.horizontal_flip, erasing=self.erasing, padding=self.padding)
        if self.padding == 1:
            raise ValueError(f"padding={self.padding} is the whole side. Choose less than 1.")
        if self.crop not in CROPS:
            raise ValueError(f'crop="{self.crop}" is not supported. Choose one of {", ".join(CROPS)}.')
        for name, high in {"scale": 1, "ratio": math.inf}.items():
            pair = getattr(self, name)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"{name}={pair!r} is not a pair. Choose the smallest and the largest.")
            for value in pair:
                check_numbers(0, high, **{name: value})
            if not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name}={pair}: both must be above 0, in ascending order.")
            # JSON turns tuples into lists, and equal recipes must compare equal after a round trip.
            object.__setattr__(self, name, tuple(pair))

    def to_dict(self) -> dict:
        """The recipe as a dict for JSON."""
        fields = {**asdict(self), "scale": list(self.scale), "ratio": list(self.ratio)}
        # Records of earlier versions lack it, and equal recipes must have equal records.
        if self.geometric_ops == 0:
            del fields["geometric_ops"]
        return fields

    def same_views(self, other: "ViewRecipe") -> bool:
        """Whether both recipes make the same views, apart from their number."""
        return {**self.to_dict(), "num_views": 0} == {**other.to_dict(), "num_views": 0}


def row_key(image: PIL.Image.Image) -> int:
    """A hash of 64 bits of the size and the pixels of an RGB image. The encoding of its file does not matter."""
    digest = hashlib.blake2b(struct.pack("<II", *image.size), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def make_view(image: PIL.Image.Image, recipe: ViewRecipe, key: int, index: int) -> torch.Tensor:
    """Make view number `index` of an RGB image with this row key: (3, height, width), uint8."""
    return make_views([image], recipe, [key], [index])[0]


def make_views(
    images: Sequence[PIL.Image.Image | np.ndarray], recipe: ViewRecipe, keys: Sequence[int], indices: Sequence[int]
) -> list[torch.Tensor]:
    """Call [`make_view`] for each image with its key and index. Views of one image, one after another, share their start.

    An image is an RGB image, or its pixels (height, width, 3).
    """
    random, views, last, whole = torch.Generator(), [], None, None
    for image, key, index in zip(images, keys, indices, strict=True):
        if image is not last and recipe.crop != "resized":
            last, whole = image, _resize(np.asarray(image), *_shape(image, recipe))
        digest = hashlib.blake2b(struct.pack("<qqQ", recipe.seed, key, index), digest_size=8).digest()
        views.append(_view(image, whole, recipe, random.manual_seed(int.from_bytes(digest, "little"))))
    return views


def _size(image):
    """The width and the height."""
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


def _shape(image, recipe):
    """The height and the width of a view."""
    return _size(image)[::-1] if recipe.image_size is None else (recipe.image_size, recipe.image_size)


def _view(image, whole, recipe, random):
    height, width = _shape(image, recipe)
    if recipe.crop == "resized":
        left, top, right, bottom = _resized_box(random, *_size(image), recipe.scale, recipe.ratio)
        is_array = isinstance(image, np.ndarray)
        part = image[top:bottom, left:right] if is_array else np.asarray(image.crop((left, top, right, bottom)))
        view = _resize(part, height, width).copy()
    elif recipe.crop == "pad":
        paddings = round(recipe.padding * height), round(recipe.padding * width)
        view = _shift(whole, *(_integer(random, 2 * padding + 1) - padding if padding else 0 for padding in paddings))
    else:
        view = whole.copy()
    if recipe.horizontal_flip and _share(random) < recipe.horizontal_flip:
        view = view[:, ::-1].copy()
    for _ in range(recipe.geometric_ops):
        view = _move(view, recipe.magnitude / 10, random)
    view = torch.from_numpy(view).permute(2, 0, 1)
    for _ in range(recipe.photometric_ops):
        view = _change_colors(view, recipe.magnitude / 10, random)
    if recipe.erasing and _share(random) < recipe.erasing:
        _erase(view, random)
    return view


# In NumPy: for small images, an operation of torch takes longer than to start it here.
def _shift(pixels, top, left):
    """Pixel (y, x) is that at (y + top, x + left), or black outside."""
    height, width, _ = pixels.shape
    shifted = np.zeros_like(pixels, order="C")
    rows, columns = (slice(max(0, -by), size - max(0, by)) for by, size in ((top, height), (left, width)))
    shifted[rows, columns] = pixels[rows.start + top : rows.stop + top, columns.start + left : columns.stop + left]
    return shifted


def _move(pixels, strength, random):
    """Shift or shear along one axis, or rotate."""
    operation, amount = _integer(random, 5), _uniform(random, -strength, strength)
    if operation < 2:
        shift = round(0.45 * amount * pixels.shape[operation])
        return _shift(pixels, *((shift, 0) if operation == 0 else (0, shift)))
    slope, angle = 0.3 * amount, math.radians(30 * amount)
    if operation == 2:
        return _sample(pixels, ((1, slope), (0, 1)))
    if operation == 3:
        return _sample(pixels, ((1, 0), (slope, 1)))
    return _sample(pixels, ((math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))))


def _sample(pixels, matrix):
    """Pixel p, a position (y, x) from the middle, is that at matrix · p, bilinear, or black outside."""
    height, width, _ = pixels.shape
    # One number holds the three colors, 21 bits each: 8 of the color, and 6 for the share of a neighbor along each axis.
    # Two black pixels around, so that all four neighbors of each position exist.
    packed = np.zeros((height + 4, width + 4), np.int64)
    for channel in range(3):
        packed[2:-2, 2:-2] |= pixels[..., channel].astype(np.int64) << 21 * channel
    # Twice a position from the middle is a whole number. Places are rounded to 64ths of a pixel.
    rows, columns = (2 * np.arange(size, dtype=np.int64) - (size - 1) for size in (height, width))
    index, shares = 0, []
    for size, stride, factors in zip((height, width), (width + 4, 1), matrix):
        by_row, by_column = (round(factor * _ONE) for factor in factors)
        place = (by_row * rows)[:, None] + (by_column * columns + (size + 3) * _ONE + (1 << _BITS - 6))
        place = (place >> _BITS - 5).clip(0, size + 2 << 6)
        index = index + (place >> 6) * stride
        shares.append(place & 63)
    down, right = shares
    upper, lower = (
        packed.take(index + start) * (64 - right) + packed.take(index + start + 1) * right for start in (0, width + 4)
    )
    sums = upper * (64 - down) + lower * down
    # Rounded to the nearest; the conversion keeps the last 8 bits.
    channels = [sums + (1 << 21 * channel + 11) >> 21 * channel + 12 for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _resize(pixels, height, width):
    """(height, width, 3); what it is given, if that has this size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # A copy, because what a PIL image returns cannot be written to, and torch warns. Batch of (1, 3, height, width) with
    # these strides: the kernel for bytes calculates in whole numbers on every processor, but torchvision calls it on some
    # only. If a side is 1, it needs them to know the order of the memory.
    batch = torch.from_numpy(np.array(pixels, order="C"))
    batch = batch.as_strided((1, 3, *pixels.shape[:2]), (batch.numel(), 1, 3 * pixels.shape[1], 3))
    resized = torch.nn.functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _share(random):
    return torch.rand((), generator=random).item()


def _integer(random, end):
    return int(torch.randint(end, (), generator=random))


def _uniform(random, low, high):
    # One rounding to float32, as processors that fuse multiplication and addition do it.
    low, high = np.float32(low), np.float32(high)
    return float(np.float32(_share(random) * float(high - low) + float(low)))


def _sides(random, area, scale, ratio):
    """The two sides of a box with a share of the area in `scale` and a ratio of its sides in `ratio`."""
    area *= _uniform(random, *scale)
    ratio = float(np.float32(math.exp(_uniform(random, *(math.log(np.float32(end)) for end in ratio)))))
    return round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))


def _resized_box(random, width, height, scale, ratio):
    for _ in range(10):
        box_width, box_height = _sides(random, width * height, scale, ratio)
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = _integer(random, height - box_height + 1), _integer(random, width - box_width + 1)
            break
    else:
        box_width, box_height = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        top, left = (height - box_height) // 2, (width - box_width) // 2
    return left, top, left + box_width, top + box_height


def _erase(view, random):
    _, height, width = view.shape
    for _ in range(10):
        box_height, box_width = _sides(random, width * height, (0.02, 0.33), (0.3, 3.3))
        if box_height < height and box_width < width:
            top, left = _integer(random, height - box_height + 1), _integer(random, width - box_width + 1)
            view[:, top : top + box_height, left : left + box_width] = 127
            return


def _change_colors(view, strength, random):
    change = 0.9 * strength
    # The draw of `torch.multinomial` on processors for which torch calls no other library.
    operation = int(torch.rand(9, dtype=torch.float64, generator=random).argmin())
    if operation < 3:
        torch.randperm(4, generator=random)  # keeps the draws of torchvision's ColorJitter
        if not change:
            return view
        factor = _uniform(random, 1 - change, 1 + change)
        if operation == 0:
            return _blend(view, 0, factor)
        gray = _gray(view)
        return _blend(view, gray if operation == 2 else Fraction(int(gray.sum()), gray.numel()), factor)
    if _share(random) >= 0.5:
        return view
    if operation < 5:
        return _sharpen(view, 1 + change if operation == 3 else 1 - change)
    # These are whole numbers in torchvision, or one rounding.
    if operation == 5:
        return F.posterize(view, 8 - round(4 * strength))
    if operation == 6:
        return F.solarize(view, 255 - round(128 * strength))
    return F.autocontrast(view) if operation == 7 else F.equalize(view)


def _blend(view, other, factor):
    """factor · view + (1 − factor) · other, rounded down, for factors below 2."""
    factor = round(factor * _ONE)
    rest = other * (_ONE - factor)
    # The bias, 1/16384, keeps whole numbers whole if the factor was rounded down.
    rest = (math.floor(rest) if isinstance(rest, (int, Fraction)) else rest) + (_ONE >> 14)
    return ((view.int() * factor + rest) >> _BITS).clamp_(0, 255).to(torch.uint8)


def _gray(view):
    red, green, blue = view.int()
    return (red * round(0.2989 * _ONE) + green * round(0.587 * _ONE) + blue * round(0.114 * _ONE)) >> _BITS


def _sharpen(view, factor):
    """Blend with the image blurred over 3×3 pixels, of which the middle one counts five times. The edge stays."""
    if min(view.shape[1:]) <= 2:
        return view
    pixels = view.short()
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    middle = pixels[:, 1:-1, 1:-1]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * middle
    # Division by 13, rounded to the nearest, as a multiplication.
    blurred = ((sums.int() + 6) * 40330) >> 19
    view[:, 1:-1, 1:-1] = _blend(middle, blurred, factor)
    return view
