"""Views: augmented versions of an image that recording and training make identically.

A view is a pure function of (recipe, row key, view index). The operations are those of torchvision. Their random numbers
come from a stream of their own, seeded for every view. So neither the order of the rows nor the number of workers nor
the batch size changes a pixel.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import PIL.Image
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor


CROPS = ("none", "pad", "resized")


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
        photometric_ops: number of color operations, applied in a row. Each is drawn from brightness, contrast,
            saturation, sharpness, posterize, solarize, autocontrast and equalize, as in RandAugment (arXiv 1909.13719)
            without its geometric operations.
        magnitude: strength of the color operations, 0 to 10.
        erasing: probability that a random rectangle becomes gray (arXiv 1708.04896).
        seed: another seed makes other views.

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

    def __post_init__(self):
        # JSON turns tuples into lists, and equal recipes must compare equal after a round trip.
        object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "ratio", tuple(self.ratio))
        if self.num_views < 1:
            raise ValueError(f"num_views={self.num_views} is too small. Choose at least 1.")
        if self.crop not in CROPS:
            raise ValueError(f'crop="{self.crop}" is not supported. Choose one of {", ".join(CROPS)}.')
        if not 0 <= self.padding < 1:
            raise ValueError(f"padding={self.padding} is not a share of the side. Choose at least 0 and less than 1.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale={self.scale} is not a smallest and a largest share of the area. Choose two numbers above 0 and up "
                "to 1, in ascending order."
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"ratio={self.ratio} is not a smallest and a largest ratio of the sides. Choose two numbers above 0, in "
                "ascending order."
            )
        for name in ("horizontal_flip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability. Choose 0 to 1.")
        if self.photometric_ops < 0:
            raise ValueError(f"photometric_ops={self.photometric_ops} is negative. Choose at least 0.")
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f"magnitude={self.magnitude} is out of range. Choose 0 to 10.")

    def to_dict(self) -> dict:
        """The recipe as a dict for JSON."""
        return {**asdict(self), "scale": list(self.scale), "ratio": list(self.ratio)}

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
    images: Sequence[PIL.Image.Image], recipe: ViewRecipe, keys: Sequence[int], indices: Sequence[int]
) -> list[torch.Tensor]:
    """Call [`make_view`] for each image with its key and index."""
    views = []
    with torch.random.fork_rng(devices=[]):
        for image, key, index in zip(images, keys, indices, strict=True):
            digest = hashlib.blake2b(struct.pack("<qqQ", recipe.seed, key, index), digest_size=8).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
            views.append(_transform(recipe, image.size)(pil_to_tensor(image)))
    return views


@lru_cache(maxsize=1024)
def _transform(recipe, image_size):
    width, height = image_size if recipe.image_size is None else (recipe.image_size, recipe.image_size)
    steps = []
    if recipe.crop == "resized":
        steps.append(v2.RandomResizedCrop((height, width), recipe.scale, recipe.ratio, antialias=True))
    elif (width, height) != image_size:
        steps.append(v2.Resize((height, width), antialias=True))
    if recipe.crop == "pad":
        padding = [round(recipe.padding * width), round(recipe.padding * height)]
        steps.append(v2.RandomCrop((height, width), padding=padding))
    if recipe.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(recipe.horizontal_flip))
    steps += [v2.RandomChoice(_photometric_ops(recipe.magnitude / 10)) for _ in range(recipe.photometric_ops)]
    if recipe.erasing:
        steps.append(v2.RandomErasing(recipe.erasing, value=127))
    return steps[0] if len(steps) == 1 else v2.Compose(steps or [v2.Identity()])


def _photometric_ops(strength):
    change = 0.9 * strength
    return [
        v2.ColorJitter(brightness=change),
        v2.ColorJitter(contrast=change),
        v2.ColorJitter(saturation=change),
        v2.RandomAdjustSharpness(1 + change, p=0.5),
        v2.RandomAdjustSharpness(1 - change, p=0.5),
        v2.RandomPosterize(8 - round(4 * strength), p=0.5),
        v2.RandomSolarize(255 - round(128 * strength), p=0.5),
        v2.RandomAutocontrast(p=0.5),
        v2.RandomEqualize(p=0.5),
    ]
