"""Decoding images of every mode and format, and refusing what cannot be decoded."""

import io

import numpy as np
import PIL.features
import PIL.Image
import pytest
from cells import UNREADABLE, encoded, random_image, random_pixels
from datasets import Image

from hf_ibdistill.images.decoding import decode_image


def decoded_pixels(cell):
    image = decode_image(cell)
    assert image.mode == "RGB"
    return np.asarray(image)


# Modes


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("RGB", False), ("RGBA", False), ("L", False), ("LA", False), ("P", False), ("P", True), ("1", False)],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_mode_becomes_rgb(mode, transparency):
    bands = {"RGB": 3, "RGBA": 4, "LA": 2}.get(mode, 1)
    pixels = random_pixels(8, 8, bands)
    palette = random_pixels(256, 3)
    if mode == "1":
        pixels = np.where(pixels >= 128, 255, 0).astype(np.uint8)
        image = PIL.Image.frombytes("L", (8, 8), pixels.tobytes()).convert("1")
    else:
        image = PIL.Image.frombytes(mode, (8, 8), pixels.tobytes())
    # The colors without their alpha, as in `Image.convert`.
    expected = pixels[..., :3] if bands >= 3 else pixels[..., :1].repeat(3, axis=-1)
    if mode == "P":
        image.putpalette(palette.tobytes())
        expected = palette[pixels[..., 0]]
    cell = encoded(image, **({"transparency": bytes(range(256))} if transparency else {}))
    with PIL.Image.open(io.BytesIO(cell["bytes"])) as stored:
        assert stored.mode == mode and ("transparency" in stored.info) == transparency
    np.testing.assert_array_equal(decoded_pixels(cell), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grayscale_keeps_its_brightness(format):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = decoded_pixels(encoded(PIL.Image.fromarray(values), format))
    assert pixels.min() == 0 and pixels.max() == 255
    np.testing.assert_allclose(pixels, (values / 65535 * 255)[..., None].repeat(3, axis=-1), atol=1)


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (200, 30, 90, 0), (0, 0, 0, 200), (50, 100, 150, 60)])
def test_cmyk_jpeg(ink):
    cell = encoded(PIL.Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    cyan, magenta, yellow, black = ink
    expected = [255 * (1 - color / 255) * (1 - black / 255) for color in (cyan, magenta, yellow)]
    np.testing.assert_allclose(decoded_pixels(cell), np.broadcast_to(expected, (16, 16, 3)), atol=4)


def test_rgb_jpeg():
    cell = encoded(PIL.Image.new("RGB", (16, 16), (200, 30, 90)), "JPEG", quality=95)
    np.testing.assert_allclose(decoded_pixels(cell), np.broadcast_to((200, 30, 90), (16, 16, 3)), atol=4)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_orientation_of_a_camera_is_applied(orientation):
    # As `datasets.Image` and `pipeline` do; otherwise a model would be trained on images lying on their side.
    pixels = random_pixels(6, 9, 3)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    cell = encoded(PIL.Image.fromarray(pixels), exif=exif)
    upright = {1: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}[orientation]
    np.testing.assert_array_equal(np.asarray(Image().decode_example(cell)), upright)
    np.testing.assert_array_equal(decoded_pixels(cell), upright)


def test_a_file_is_read_by_its_path(tmp_path):
    image = random_image()
    image.save(tmp_path / "1.png")
    cell = {"bytes": None, "path": str(tmp_path / "1.png")}
    np.testing.assert_array_equal(decoded_pixels(cell), np.asarray(image))
    # Bytes come first: the path of a published table is that of another machine.
    other = {**encoded(random_image(seed=1)), "path": cell["path"]}
    np.testing.assert_array_equal(decoded_pixels(other), np.asarray(random_image(seed=1)))


# Images that cannot be decoded


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        pytest.param(UNREADABLE, "cannot be decoded: cannot identify image file", id="not an image"),
        pytest.param({"bytes": b"", "path": None}, "cannot be decoded: cannot identify image file", id="no bytes"),
        pytest.param({"bytes": None, "path": "gone.png"}, r"gone\.png.*cannot be decoded: .*No such file", id="no file"),
        pytest.param({"bytes": None, "path": None}, "cannot be decoded: .*no image", id="neither bytes nor path"),
        pytest.param(None, "cannot be decoded: .*no image", id="null"),
    ],
)  # fmt: skip
def test_unreadable_images_are_explained(cell, message):
    with pytest.raises(ValueError, match=message):
        decode_image(cell)


def test_a_truncated_file_is_refused():
    content = encoded(random_image((32, 32)))["bytes"]
    with pytest.raises(ValueError, match="cannot be decoded: .*truncated"):
        decode_image({"bytes": content[: len(content) // 2], "path": None})


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "AVIF"])
def test_damaged_files_give_an_image_or_the_documented_error(format):
    if format in ("WEBP", "AVIF") and not PIL.features.check(format.lower()):
        pytest.skip(f"Pillow was built without {format}")
    content = encoded(random_image(), format)["bytes"]
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
