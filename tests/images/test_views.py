"""Views: pure functions of recipe, row key and index, that do what the recipe asks for."""

import hashlib
import json
import math
import re
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import functional as F

from hf_ibdistill import ViewRecipe
from hf_ibdistill.images import views
from hf_ibdistill.images.views import make_view, row_key


RECIPES = [
    ViewRecipe(),
    ViewRecipe(crop="resized", horizontal_flip=0.5, image_size=12),
    ViewRecipe(crop="none", photometric_ops=2, magnitude=9, erasing=0.5),
    ViewRecipe(image_size=10, padding=0.25, horizontal_flip=0.5, photometric_ops=1, erasing=1.0, seed=7),
    ViewRecipe(crop="none", geometric_ops=2, photometric_ops=1),
]


def image(seed=0, size=(16, 14)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@settings(max_examples=40, deadline=None)
@given(
    recipe=st.sampled_from(RECIPES),
    key=st.integers(-(2**63), 2**63 - 1),
    index=st.integers(0, 1000),
    global_seed=st.integers(0, 2**63 - 1),
    others=st.lists(st.integers(0, 50), max_size=3),
)
def test_a_view_depends_on_recipe_key_and_index_alone(recipe, key, index, global_seed, others):
    expected = make_view(image(), recipe, key, index)
    torch.manual_seed(global_seed)
    np.random.seed(global_seed % 2**32)
    for other in others:
        make_view(image(other), recipe, key, other)
    before = torch.get_rng_state()
    assert torch.equal(
        make_view(image(), ViewRecipe(**json.loads(json.dumps(recipe.to_dict()))), key, index), expected
    )
    # Making a view leaves the random numbers of others alone.
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_differ_by_index_key_and_seed(recipe):
    views = [make_view(image(), recipe, 5, index) for index in range(20)]
    assert len({view.numpy().tobytes() for view in views}) > 10
    others = [make_view(image(), recipe, 6, index) for index in range(20)]
    assert sum(torch.equal(a, b) for a, b in zip(views, others)) < 10
    reseeded = ViewRecipe(**{**recipe.to_dict(), "seed": recipe.seed + 1})
    assert sum(torch.equal(a, make_view(image(), reseeded, 5, i)) for i, a in enumerate(views)) < 10


def test_type_and_size():
    view = make_view(image(), ViewRecipe(), 0, 0)
    assert view.dtype == torch.uint8 and view.shape == (3, 14, 16)
    assert make_view(image(), ViewRecipe(image_size=9), 0, 0).shape == (3, 9, 9)
    assert make_view(image(), ViewRecipe(image_size=9, crop="resized"), 0, 0).shape == (3, 9, 9)


def test_no_operation_gives_the_image():
    pixels = np.asarray(image()).transpose(2, 0, 1)
    assert np.array_equal(make_view(image(), ViewRecipe(crop="none"), 1, 2).numpy(), pixels)


def test_pad_and_crop_shifts_by_whole_pixels_with_black_beside():
    # 12.5 % of 16 and of 14 pixels are 2 each.
    pixels = np.asarray(image()).transpose(2, 0, 1)
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    shifted = {padded[:, y : y + 14, x : x + 16].tobytes() for x in range(5) for y in range(5)}
    views = {make_view(image(), ViewRecipe(), 3, index).numpy().tobytes() for index in range(300)}
    assert views == shifted


def by_hand(view, size):
    """Resize along one axis after the other, each with whole weights, as the published code of Pillow and torch does."""
    for axis, end in ((2, size), (1, size)):
        start = view.shape[axis]
        if start == end:
            continue
        reach, weights = max(start / end, 1.0), np.zeros((end, start))
        for i in range(end):
            middle = start / end * (i + 0.5)
            covered = np.arange(max(int(middle - reach + 0.5), 0), min(int(middle + reach + 0.5), start))
            triangle = np.maximum(0, 1 - np.abs((covered - middle + 0.5) / reach))
            weights[i, covered] = triangle / triangle.sum()
        # As many bits as the largest weight leaves in an int16.
        bits = 0
        while bits < 22 and int(0.5 + weights.max() * 2 ** (bits + 1)) < 2**15:
            bits += 1
        weights = np.floor(weights * 2**bits + 0.5).astype(np.int64)
        sums = np.moveaxis(np.tensordot(weights, view.astype(np.int64), (1, axis)), 0, axis)
        view = ((sums + (1 << bits - 1)) >> bits).clip(0, 255)
    return view


@pytest.mark.parametrize("size", [(40, 30), (16, 14), (1, 9), (9, 1), (1, 1), (300, 2), (5, 80)])
def test_resizing_is_in_whole_numbers(size):
    for side in (1, 2, 12, 33):
        found = make_view(image(size=size), ViewRecipe(crop="none", image_size=side), 0, 0).numpy()
        np.testing.assert_array_equal(found, by_hand(np.asarray(image(size=size)).transpose(2, 0, 1), side))


@pytest.mark.parametrize("factor", [0.1, 0.28, 1.0, 1.45, 1.9])
def test_colors_follow_their_formulas(factor):
    view = pil_to_tensor(image())
    pixels = view.numpy().astype(np.float64)
    gray = np.floor(np.tensordot((0.2989, 0.587, 0.114), pixels, 1))
    np.testing.assert_array_equal(views._gray(view), gray)
    shifts = [(y, x) for y in range(3) for x in range(3)]
    sums = 4 * pixels[:, 1:-1, 1:-1] + sum(pixels[:, y : y + 12, x : x + 14] for y, x in shifts)
    blurred = pixels.copy()
    blurred[:, 1:-1, 1:-1] = np.rint(sums / 13)
    brightness, mean = views._blend(view, 0, factor), Fraction(int(gray.sum()), gray.size)
    contrast, saturation = views._blend(view, mean, factor), views._blend(view, views._gray(view), factor)
    sharpness = views._sharpen(view.clone(), factor)
    found = (brightness, contrast, saturation, sharpness)
    for result, other in zip(found, (0, gray.mean(), gray, blurred), strict=True):
        expected = (factor * pixels + (1 - factor) * other).clip(0, 255)
        # Rounded down, with a bias of 1/16384.
        assert np.abs(result.numpy() - expected + 0.5).max() < 0.5002


def turned(pixels, degrees):
    """Clockwise, and the same from torchvision."""
    angle, image = math.radians(degrees), torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    matrix = (math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))
    return views._sample(pixels, matrix), F.rotate(image.float(), -degrees, InterpolationMode.BILINEAR)


def sheared(pixels, slope, axis):
    """Along the height (0) or the width, and the same from torchvision."""
    image, shear = torch.from_numpy(pixels.copy()).permute(2, 0, 1), [math.degrees(math.atan(slope)), 0.0]
    matrix = ((1, slope), (0, 1)) if axis == 0 else ((1, 0), (slope, 1))
    expected = F.affine(image.float(), 0, [0, 0], 1, shear[:: 1 if axis else -1], InterpolationMode.BILINEAR)
    return views._sample(pixels, matrix), expected


@pytest.mark.parametrize("size", [(32, 32), (40, 31), (5, 1), (1, 1), (70, 90)])
def test_rotations_and_shears_are_those_of_torchvision(size):
    pixels = np.asarray(image(size=size))
    pairs = [turned(pixels, degrees) for degrees in (-30, -7, 0, 13.3)]
    pairs += [sheared(pixels, slope, axis) for slope in (-0.3, 0.11) for axis in (0, 1)]
    for found, expected in pairs:
        difference = np.abs(found - expected.permute(1, 2, 0).numpy())
        # Noise differs by up to 255 from one pixel to the next, and places are rounded to 64ths of a pixel.
        assert difference.max() < 4 and difference.mean() < 1


def test_rotations_by_quarters_and_whole_shears_are_exact():
    pixels = np.asarray(image(size=(9, 9)))
    for quarters in range(4):
        np.testing.assert_array_equal(turned(pixels, 90 * quarters)[0], np.rot90(pixels, -quarters))
    rows = sheared(pixels, 1, axis=1)[0]
    for row, offset in enumerate(range(-4, 5)):
        padded = np.pad(pixels[row], ((9, 9), (0, 0)))
        np.testing.assert_array_equal(rows[row], padded[9 + offset : 18 + offset])


def test_each_geometric_operation_is_drawn_up_to_its_strength():
    # A wave along each axis: every operation of another strength gives another image.
    y, x = np.mgrid[:24, :20]
    pixels = np.stack([128 + 120 * np.sin(y / 3), 128 + 120 * np.sin(x / 3), 255 - 5 * y - 5 * x], -1).astype(np.uint8)
    steps = np.arange(-1, 1.01, 0.02)
    candidates = {"rotation": [turned(pixels, 30 * step)[1] for step in steps]}
    for axis, size in enumerate((24, 20)):
        candidates[f"shear {axis}"] = [sheared(pixels, 0.3 * step, axis)[1] for step in steps]
        candidates[f"shift {axis}"] = shifts = []
        for shift in range(-round(0.45 * size), round(0.45 * size) + 1):
            translate = [0, -shift] if axis == 0 else [-shift, 0]
            shifts.append(F.affine(torch.from_numpy(pixels).permute(2, 0, 1), 0, translate, 1, [0, 0]).float())
    recipe = ViewRecipe(crop="none", geometric_ops=1, magnitude=10)
    found = {name: [] for name in candidates}
    for index in range(200):
        view = make_view(PIL.Image.fromarray(pixels), recipe, 4, index).float()
        distances = {name: [(view - other).abs().mean() for other in others] for name, others in candidates.items()}
        name = min(distances, key=lambda name: min(distances[name]))
        assert min(distances[name]) < 3
        found[name].append(int(np.argmin(distances[name])) / (len(distances[name]) - 1))
    for shares in found.values():
        # Each as often as the others, and to both sides.
        assert 20 < len(shares) < 60 and min(shares) < 0.1 and max(shares) > 0.9 and 0.3 < np.mean(shares) < 0.7


def test_records_without_geometry_are_those_of_earlier_versions():
    assert "geometric_ops" not in ViewRecipe().to_dict()
    assert ViewRecipe(geometric_ops=2).to_dict()["geometric_ops"] == 2
    assert not ViewRecipe().same_views(ViewRecipe(geometric_ops=1))


EARLIER = (
    ViewRecipe(horizontal_flip=0.5, erasing=0.5),
    ViewRecipe(crop="resized", image_size=32),
    ViewRecipe(crop="none", image_size=72),
    ViewRecipe(crop="resized", image_size=40, photometric_ops=3, magnitude=9, horizontal_flip=0.5, erasing=0.5),
)
GEOMETRIC = (ViewRecipe(geometric_ops=1, magnitude=10), ViewRecipe(geometric_ops=3, photometric_ops=1, erasing=0.5))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("recipes", "expected"),
    [
        (EARLIER, "fd9ddf5989b9c8df63e9caba98928dc2f3824e0cae82b488ceb82627a682cc55"),
        (GEOMETRIC, "589410109ba51e8e4b98fbc1c17be414facced536d5b600290dc17aa2693cb5a"),
    ],
)
def test_every_processor_makes_the_same_views(recipes, expected, threads):
    y, x = np.mgrid[:48, :60]
    pixels = np.stack([(5 * x + y * y // 9) % 256, (x * y // 7) % 256, (3 * y + x) % 256], axis=-1)
    picture, digest = PIL.Image.fromarray(pixels.astype(np.uint8)), hashlib.sha256()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for recipe in recipes:
        for index in range(40):
            digest.update(make_view(picture, recipe, 11, index).contiguous().numpy())
    torch.set_num_threads(before)
    # The same with AVX2 and, by ATEN_CPU_CAPABILITY=default, without vector instructions.
    assert digest.hexdigest() == expected


def test_flips_are_as_frequent_as_asked():
    mirrored = np.asarray(image()).transpose(2, 0, 1)[:, :, ::-1].tobytes()
    recipe = ViewRecipe(crop="none", horizontal_flip=0.25)
    flipped = sum(make_view(image(), recipe, 9, i).numpy().tobytes() == mirrored for i in range(400))
    assert 60 < flipped < 140


def test_row_key_is_of_the_pixels():
    assert row_key(image(1)) == row_key(image(1)) and -(2**63) <= row_key(image(1)) < 2**63
    assert len({row_key(image(seed)) for seed in range(100)}) == 100
    # The same bytes in another shape are another image.
    assert row_key(PIL.Image.new("RGB", (2, 8))) != row_key(PIL.Image.new("RGB", (8, 2)))


def test_same_views_whatever_their_number():
    assert ViewRecipe(num_views=3).same_views(ViewRecipe(num_views=30))
    assert not ViewRecipe(seed=1).same_views(ViewRecipe(seed=2))
    assert ViewRecipe(scale=[0.5, 1.0]) == ViewRecipe(scale=(0.5, 1.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_views": 0},
        {"crop": "middle"},
        {"padding": 1.5},
        {"padding": -0.1},
        {"scale": (0.9, 0.5)},
        {"scale": (0.5, 1.1)},
        {"ratio": (0, 1)},
        {"horizontal_flip": 2},
        {"erasing": -1},
        {"magnitude": 11},
        {"photometric_ops": -1},
        {"geometric_ops": -1},
    ],
)
def test_wrong_recipes_are_refused(settings):
    ((name, value),) = settings.items()
    shown = {"crop": '"middle"', "scale": "(" if value == (0.9, 0.5) else "1.1"}.get(name, str(value))
    with pytest.raises(ValueError, match=re.escape(f"{name}={shown}")):
        ViewRecipe(**settings)
