"""Decoding images of every mode, reading them row by row, and preparing them for models."""

import io
import multiprocessing
import os

import numpy as np
import PIL.features
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, load_from_disk
from transformers import ConvNextImageProcessor, ViTImageProcessor, ViTImageProcessorPil

from hf_ibdistill.images import (
    ImageRows,
    build_image_processor,
    decode_image,
    default_num_workers,
    pixel_values,
)
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.logits.views import ViewRecipe, make_view, row_key


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, format="PNG", **options):
    """An image as an undecoded table cell."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def grey(value, size=(2, 2)):
    return encoded(PIL.Image.new("L", size, value))


UNREADABLE = {"bytes": b"not an image", "path": None}


def table(cells, **columns):
    """A row for each cell, numbered in the column "row"."""
    features = Features({"image": Image(decode=False), "row": Value("int64")})
    dataset = Dataset.from_dict({"image": cells, "row": range(len(cells))}, features=features)
    for name, values in columns.items():
        feature = List(Value(values.dtype.name), length=values.shape[1])
        dataset = dataset.add_column(name, list(values), feature=feature)
    return dataset.cast_column("image", Image())


def decoded_pixels(cell):
    image = decode_image(cell)
    assert image.mode == "RGB"
    return np.asarray(image)


# Modes


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("RGB", False), ("RGBA", False), ("L", False), ("LA", False), ("P", False), ("P", True), ("1", False)],
)
def test_every_mode_becomes_rgb(mode, transparency):
    bands = {"RGB": 3, "RGBA": 4, "LA": 2}.get(mode, 1)
    pixels = random_pixels(8, 8, bands)
    palette = random_pixels(256, 3)
    if mode == "1":
        pixels = np.where(pixels >= 128, 255, 0).astype(np.uint8)
        image = PIL.Image.frombytes("L", (8, 8), pixels.tobytes()).convert("1")
    else:
        image = PIL.Image.frombytes(mode, (8, 8), pixels.tobytes())
    # The colours without their alpha, as in `Image.convert`.
    expected = pixels[..., :3] if bands >= 3 else pixels[..., :1].repeat(3, axis=-1)
    if mode == "P":
        image.putpalette(palette.tobytes())
        expected = palette[pixels[..., 0]]
    cell = encoded(image, **({"transparency": bytes(range(256))} if transparency else {}))
    with PIL.Image.open(io.BytesIO(cell["bytes"])) as stored:
        assert stored.mode == mode and ("transparency" in stored.info) == transparency
    np.testing.assert_array_equal(decoded_pixels(cell), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_greyscale_keeps_its_brightness(format):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = decoded_pixels(encoded(PIL.Image.fromarray(values), format))
    assert pixels.min() == 0 and pixels.max() == 255
    np.testing.assert_allclose(pixels, (values / 65535 * 255)[..., None].repeat(3, axis=-1), atol=1)


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (200, 30, 90, 0), (0, 0, 0, 200), (50, 100, 150, 60)])
def test_cmyk_jpeg(ink):
    cell = encoded(PIL.Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    cyan, magenta, yellow, black = ink
    expected = [255 * (1 - colour / 255) * (1 - black / 255) for colour in (cyan, magenta, yellow)]
    np.testing.assert_allclose(decoded_pixels(cell), np.broadcast_to(expected, (16, 16, 3)), atol=4)


def test_rgb_jpeg():
    cell = encoded(PIL.Image.new("RGB", (16, 16), (200, 30, 90)), "JPEG", quality=95)
    np.testing.assert_allclose(decoded_pixels(cell), np.broadcast_to((200, 30, 90), (16, 16, 3)), atol=4)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_cameras_orientation_is_applied(orientation):
    # As `datasets.Image` and `pipeline` do; otherwise a model would be trained on images lying on their side.
    pixels = random_pixels(6, 9, 3)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    cell = encoded(PIL.Image.fromarray(pixels), exif=exif)
    upright = {1: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}[orientation]
    np.testing.assert_array_equal(np.asarray(Image().decode_example(cell)), upright)
    np.testing.assert_array_equal(decoded_pixels(cell), upright)


# Images that cannot be decoded


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        pytest.param(UNREADABLE, "cannot be decoded: cannot identify image file", id="not an image"),
        pytest.param({"bytes": b"", "path": None}, "cannot be decoded: cannot identify image file", id="no bytes"),
        pytest.param({"bytes": None, "path": "gone.png"}, r"The image \(gone.png\) cannot be decoded: .*No such file", id="no file"),
        pytest.param(None, "cannot be decoded: the row has no image", id="null"),
    ],
)  # fmt: skip
def test_unreadable_images_are_explained_and_their_row_named(cell, message):
    with pytest.raises(ValueError, match=message):
        decode_image(cell)
    rows = ImageRows(table([grey(0), grey(1), cell, grey(3)]), "image", ["row"])
    with pytest.raises(ValueError, match=f"Row 2: .*{message}"):
        rows[2]
    with pytest.raises(ValueError, match="Row 2: "):
        rows.__getitems__([3, 2, 0])
    assert rows[3]["row"] == 3


def test_a_cell_with_neither_bytes_nor_path_is_explained():
    with pytest.raises(ValueError, match="cannot be decoded: the row has no image"):
        decode_image({"bytes": None, "path": None})


def test_a_truncated_file_is_refused():
    cell = encoded(PIL.Image.fromarray(random_pixels(32, 32, 3)))
    with pytest.raises(ValueError, match="cannot be decoded: .*truncated"):
        decode_image({"bytes": cell["bytes"][: len(cell["bytes"]) // 2], "path": None})


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "AVIF"])
def test_damaged_files_give_an_image_or_the_documented_error(format):
    if format in ("WEBP", "AVIF") and not PIL.features.check(format.lower()):
        pytest.skip(f"Pillow was built without {format}")
    content = encoded(PIL.Image.fromarray(random_pixels(8, 8, 3)), format)["bytes"]
    refused = 0
    for position in range(min(len(content), 300)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        try:
            assert decode_image({"bytes": bytes(damaged), "path": None}).mode == "RGB"
        except ValueError as error:
            assert "cannot be decoded" in str(error)
            refused += 1
    assert refused > 0


def test_unreadable_images_can_be_skipped():
    cells = [grey(10), UNREADABLE, None, {"bytes": None, "path": "gone.png"}, grey(40)]
    rows = ImageRows(table(cells), "image", ["row"], skip_unreadable=True).__getitems__(range(5))
    assert [row["image"] and row["image"].getpixel((0, 0))[0] for row in rows] == [10, None, None, None, 40]
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]


# Rows


def test_images_in_files_are_read(tmp_path):
    for i in range(3):
        PIL.Image.new("RGB", (3, 3), (i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in (2, 0, 1)]
    rows = ImageRows(Dataset.from_dict({"picture": paths}).cast_column("picture", Image()), "picture")
    assert [rows[i]["picture"].getpixel((0, 0))[0] for i in range(3)] == [2, 0, 1]


def test_rows_are_those_of_the_table_after_shuffle_and_select():
    dataset = table([grey(20 * i) for i in range(10)]).shuffle(seed=1).select([7, 2, 2, 9, 0])
    rows = ImageRows(dataset, "image", ["row"])
    assert len(rows) == 5
    assert [rows[i]["row"] for i in range(5)] == dataset["row"][:]
    order = [4, 0, 0, 3]
    read = rows.__getitems__(order)
    assert [row["row"] for row in read] == [dataset["row"][i] for i in order]
    for row in [*read, rows[2]]:
        np.testing.assert_array_equal(np.asarray(row["image"]), np.full((2, 2, 3), 20 * row["row"]))


def test_errors_count_rows_as_the_given_table_does():
    dataset = table([grey(0), UNREADABLE, grey(2), grey(3)]).select([3, 2, 0, 1])
    with pytest.raises(ValueError, match="Row 3: The image cannot be decoded"):
        ImageRows(dataset, "image")[3]


def test_rows_hold_the_image_and_the_columns_that_were_asked_for():
    dataset = table([grey(0), grey(1)], conv_logits=np.zeros((2, 5), np.float16))
    assert ImageRows(dataset, "image")[0].keys() == {"image"}
    assert ImageRows(dataset, "image", ["row"])[0].keys() == {"image", "row"}
    assert ImageRows(dataset, "image", [], ["conv_logits"], 5)[0].keys() == {"image", "conv_logits"}
    # A list column that is not logits comes as it is.
    assert ImageRows(dataset, "image", ["conv_logits"])[1]["conv_logits"] == [0.0] * 5


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("saved", [False, True])
def test_logits_columns_are_arrays_of_the_stored_numbers(dtype, saved, tmp_path):
    conv, inv = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(dtype)
    dataset = table([grey(i) for i in range(6)], conv_logits=conv, inv_logits=inv).shuffle(seed=2)
    if saved:
        dataset.save_to_disk(tmp_path / "data")
        dataset = load_from_disk(tmp_path / "data")
    rows = ImageRows(dataset, "image", ["row"], ["inv_logits", "conv_logits"], 5)
    for row in rows.__getitems__([5, 0, 3]):
        assert isinstance(row["conv_logits"], np.ndarray) and row["conv_logits"].dtype == dtype
        np.testing.assert_array_equal(row["conv_logits"], conv[row["row"]])
        np.testing.assert_array_equal(row["inv_logits"], inv[row["row"]])


def test_a_data_set_with_a_transform_is_refused():
    dataset = table([grey(0)])
    dataset.set_transform(lambda rows: rows)
    with pytest.raises(ValueError, match=r"has a transform of its own. Remove it \(dataset.reset_format\(\)\)"):
        ImageRows(dataset, "image")
    dataset.reset_format()
    assert ImageRows(dataset, "image", ["row"])[0]["row"] == 0


def test_the_data_sets_format_neither_matters_nor_changes():
    dataset = table([grey(50), grey(60)]).with_format("torch", columns=["row"])
    row = ImageRows(dataset, "image", ["row"])[1]
    assert row["row"] == 1 and row["image"].getpixel((0, 0)) == (60, 60, 60)
    assert dataset.format["type"] == "torch" and dataset.format["columns"] == ["row"]


def test_workers_read_the_same_rows():
    rows = ImageRows(table([grey(20 * i) for i in range(5)]), "image", ["row"])
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, collate_fn=list)
    assert [(row["row"], row["image"].getpixel((0, 0))[0]) for batch in loader for row in batch] == [
        (i, 20 * i) for i in range(5)
    ]


# Views


RECIPE = ViewRecipe(num_views=3, crop="pad", horizontal_flip=0.5, photometric_ops=1)


def random_images(number):
    random = np.random.default_rng(0)
    return [PIL.Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(number)]


def test_the_epoch_chooses_the_view_and_its_logits():
    images = random_images(4)
    logits = np.random.default_rng(1).normal(size=(4, 3, 5)).astype(np.float32)
    dataset = table([encoded(image) for image in images])
    feature = LogitsEncoding("float32").feature(num_classes=5, num_views=3)
    dataset = dataset.add_column("conv_logits", logits.tolist(), feature=feature).shuffle(seed=1)
    rows = ImageRows(dataset, "image", ["row"], ["conv_logits"], 5, views=RECIPE)
    seen = set()
    for epoch in range(5):
        rows.start_epoch(epoch)
        for row in rows.__getitems__([2, 0, 3]):
            image = images[row["row"]]
            assert torch.equal(row["image"], make_view(image, RECIPE, row_key(image), epoch % 3))
            np.testing.assert_array_equal(row["conv_logits"], logits[row["row"], epoch % 3])
            seen.add(row["image"].numpy().tobytes())
    assert len(seen) == 3 * 3


def test_a_stored_key_counts_even_where_the_pixels_have_changed():
    images = random_images(2)
    dataset = table([encoded(image) for image in images])
    dataset = dataset.add_column("row_key", [7, 2**63 - 1], feature=Value("int64"))
    for image, key, row in zip(images, (7, 2**63 - 1), ImageRows(dataset, "image", ["row"], views=RECIPE)):
        assert row.keys() == {"image", "row"}
        assert torch.equal(row["image"], make_view(image, RECIPE, key, 0))


def test_a_new_epoch_reaches_workers_that_are_already_running():
    images = random_images(2)
    rows = ImageRows(table([encoded(image) for image in images]), "image", views=RECIPE)
    loader = torch.utils.data.DataLoader(rows, num_workers=1, persistent_workers=True, collate_fn=list)
    for epoch in (0, 1, 2):
        rows.start_epoch(epoch)
        views = [row["image"] for batch in loader for row in batch]
        for image, view in zip(images, views):
            assert torch.equal(view, make_view(image, RECIPE, row_key(image), epoch))


def test_unreadable_images_have_no_view():
    rows = ImageRows(table([grey(1), UNREADABLE]), "image", views=RECIPE, skip_unreadable=True)
    assert rows[0]["image"].shape == (3, 2, 2) and rows[1]["image"] is None


# Image processors


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [((8, 8), None, 8), ((20, 30), None, 30), ((64, 10), None, 64), ((65, 10), None, 224), ((8, 8), 17, 17)],
)
def test_image_processor_sizes(size, image_size, expected):
    dataset = table([grey(0, size), grey(0, (9, 9))]).rename_column("image", "scan")
    processor = build_image_processor(dataset, "scan", image_size=image_size)
    images = [ImageRows(dataset, "scan")[i]["scan"] for i in range(2)]
    assert processor(images, return_tensors="pt")["pixel_values"].shape == (2, 3, expected, expected)


def test_image_processor_scales_pixels_to_minus_one_and_one():
    pixels = random_pixels(8, 8, 3)
    processor = build_image_processor(table([encoded(PIL.Image.fromarray(pixels))]))
    batch = processor([PIL.Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(batch.permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-5)


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
    images = [PIL.Image.fromarray(random_pixels(10, 10, 3)), PIL.Image.new("RGB", (6, 7), (250, 100, 0))]
    batches = pixel_values(images, processors)
    assert list(batches) == list(processors)
    assert batches["same"] is batches["student"]
    distinct = [batches[name] for name in processors if name != "same"]
    assert len({id(batch) for batch in distinct}) == len(distinct)
    for name, processor in processors.items():
        assert torch.equal(batches[name], processor(images, return_tensors="pt")["pixel_values"])


def test_a_processor_that_keeps_the_aspect_ratio_is_named_with_its_settings():
    images = [PIL.Image.fromarray(random_pixels(*shape, 3)) for shape in ((20, 30), (20, 20))]
    for kind in (ViTImageProcessor, ViTImageProcessorPil):
        processor = kind(size={"shortest_edge": 16})
        message = (
            rf"{kind.__name__} makes images of several sizes, .*'size': {{'shortest_edge': 16}}.*: give it a fixed"
        )
        with pytest.raises(ValueError, match=message) as error:
            pixel_values(images, {"a": processor})
        assert "\n" not in str(error.value)
        # Images of one shape are a batch.
        assert pixel_values(images[:1] * 2, {"a": processor})["a"].shape == (2, 3, 16, 24)
        cropped = kind(size={"shortest_edge": 16}, do_center_crop=True, crop_size={"height": 12, "width": 12})
        assert pixel_values(images, {"a": cropped})["a"].shape == (2, 3, 12, 12)


def test_other_mistakes_of_a_processor_are_its_own_to_tell():
    images = [PIL.Image.fromarray(random_pixels(20, 30, 3))] * 2
    with pytest.raises(ValueError, match="`crop_size` must be specified"):
        pixel_values(images, {"a": ViTImageProcessor(do_center_crop=True)})


def test_workers_are_none_beside_a_model_on_the_cpu(monkeypatch):
    assert default_num_workers(use_cpu=True) == 0
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = available - 1 if method == "fork" else 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_num_workers(use_cpu=False) == min(8, free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert default_num_workers(use_cpu=False) == 0


@pytest.mark.parametrize("size", [8, 64, 65])
def test_small_and_large_images_are_preprocessed_alike(size):
    # Small ones go through the processor together, large ones one by one.
    processor = ViTImageProcessor(size={"height": 20, "width": 20})
    pixels = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(image) for image in pixels]
    expected = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    torch.testing.assert_close(pixel_values(images, {"a": processor})["a"], expected, rtol=0, atol=0)
