"""Decoded images → the pixel values of each model."""

import numpy as np
import PIL.Image
import pytest
import torch
from cells import cell_table, encoded, gray, random_image, random_pixels
from transformers import ConvNextImageProcessor, ViTImageProcessor, ViTImageProcessorPil

from hf_ibdistill import build_image_processor
from hf_ibdistill.images.preprocessing import pixel_values


# A processor for a new model


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [((8, 8), None, 8), ((20, 30), None, 30), ((64, 10), None, 64), ((65, 10), None, 224), ((8, 8), 17, 17)],
)
def test_image_processor_sizes(size, image_size, expected):
    table = cell_table([gray(0, size), gray(0, (9, 9))]).rename_column("image", "scan")
    processor = build_image_processor(table, image_size=image_size)
    images = [image.convert("RGB") for image in table["scan"]]
    assert processor(images, return_tensors="pt")["pixel_values"].shape == (2, 3, expected, expected)


def test_the_image_column_can_be_chosen_and_labels_do_not_matter():
    table = cell_table([gray(0, (8, 8))])
    table = table.rename_column("image", "scan").add_column("mask", [gray(0, (9, 9))]).add_column("class", ["cat"])
    table = table.cast_column("mask", table.features["scan"]).add_column("target", [0])
    assert build_image_processor(table, "mask").size["height"] == 9
    assert build_image_processor(table, "scan").size["height"] == 8
    with pytest.raises(ValueError, match="scan, mask"):
        build_image_processor(table)


def test_image_processor_scales_pixels_to_minus_one_and_one():
    pixels = random_pixels(8, 8, 3)
    processor = build_image_processor(cell_table([encoded(PIL.Image.fromarray(pixels))]))
    batch = processor([PIL.Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(batch.permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-5)


def test_image_processor_takes_images_of_every_mode(tmp_path):
    build_image_processor(cell_table([gray(0, (8, 8))])).save_pretrained(tmp_path)
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    images = [PIL.Image.new(mode, (8, 8)) for mode in ("RGB", "L", "RGBA", "P", "1")]
    assert processor(images, return_tensors="pt")["pixel_values"].shape == (5, 3, 8, 8)


# Batches


def test_equal_image_processors_share_a_batch_and_others_do_not():
    def vit(**settings):
        return ViTImageProcessor(size={"height": 8, "width": 8}, **settings)

    processors = {
        "student": vit(),
        "same": vit(),
        "mean": vit(image_mean=[0.1, 0.5, 0.5]),
        "size": ViTImageProcessor(size={"height": 4, "width": 4}),
        "filter": vit(resample=PIL.Image.Resampling.NEAREST),
        "class": ConvNextImageProcessor(size={"shortest_edge": 8}),
    }
    images = [random_image((10, 10)), PIL.Image.new("RGB", (6, 7), (250, 100, 0))]
    batches = pixel_values(images, processors)
    assert list(batches) == list(processors)
    assert batches["same"] is batches["student"]
    distinct = [batches[name] for name in processors if name != "same"]
    assert len({id(batch) for batch in distinct}) == len(distinct)
    for name, processor in processors.items():
        assert torch.equal(batches[name], processor(images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("size", [8, 64, 65])
def test_small_and_large_images_are_preprocessed_alike(size):
    # Small ones go through the processor together, large ones one by one.
    processor = ViTImageProcessor(size={"height": 20, "width": 20})
    images = [random_image((size, size), seed) for seed in range(5)]
    expected = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    torch.testing.assert_close(pixel_values(images, {"a": processor})["a"], expected, rtol=0, atol=0)


def test_views_are_preprocessed_as_the_images_with_their_pixels():
    processor = ViTImageProcessor(size={"height": 20, "width": 20})
    images = [random_image((8, 8), seed) for seed in range(3)]
    views = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    assert torch.equal(pixel_values(views, {"a": processor})["a"], pixel_values(images, {"a": processor})["a"])


@pytest.mark.parametrize("kind", [ViTImageProcessor, ViTImageProcessorPil])
def test_a_processor_that_keeps_the_aspect_ratio_is_named_with_its_settings(kind):
    images = [random_image(size) for size in ((30, 20), (20, 20))]
    processor = kind(size={"shortest_edge": 16})
    with pytest.raises(ValueError, match=rf"{kind.__name__} .*'shortest_edge': 16.*do_center_crop=True") as error:
        pixel_values(images, {"a": processor})
    assert "\n" not in str(error.value)
    # Images of one shape are a batch.
    assert pixel_values(images[:1] * 2, {"a": processor})["a"].shape == (2, 3, 16, 24)
    cropped = kind(size={"shortest_edge": 16}, do_center_crop=True, crop_size={"height": 12, "width": 12})
    assert pixel_values(images, {"a": cropped})["a"].shape == (2, 3, 12, 12)


def test_other_errors_of_a_processor_come_through():
    with pytest.raises(ValueError, match="`crop_size` must be specified"):
        pixel_values([random_image((30, 20))] * 2, {"a": ViTImageProcessor(do_center_crop=True)})


def test_large_images_are_preprocessed_in_groups(monkeypatch):
    images = [random_image((30, 20 + number), seed=number) for number in range(7)]
    processors = {
        "a": ViTImageProcessor(size={"height": 8, "width": 8}),
        "b": ConvNextImageProcessor(size={"shortest_edge": 16}),
    }
    expected = pixel_values(images, processors)
    for budget in (1, 1500, 10_000):
        monkeypatch.setattr("hf_ibdistill.images.preprocessing.PIXELS", budget)
        found = pixel_values(iter(images), processors)
        assert all(torch.equal(found[name], expected[name]) for name in processors)
    assert pixel_values(iter([]), processors) == {}
    keeps_sides = {"": ViTImageProcessor(do_resize=False)}
    monkeypatch.setattr("hf_ibdistill.images.preprocessing.PIXELS", 1)
    with pytest.raises(ValueError, match="ViTImageProcessor makes images of several sizes"):
        pixel_values(images[:2], keeps_sides)
