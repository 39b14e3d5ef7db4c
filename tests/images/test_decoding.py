"""Decoding images of every mode and format, and refusing what cannot be decoded."""

import io
import struct
import zlib

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import PIL.PngImagePlugin
import pytest
from cells import UNREADABLE, cell_table, encoded, gray, random_image, random_pixels, tiff
from datasets import DatasetDict, Image, load_from_disk

from hf_ibdistill.images.decoding import _warn_once, decode_image, file_key, scale_pixels
from hf_ibdistill.rows import ImageRows


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
    # The colors without their alpha, as in `Image.convert`.
    expected = pixels[..., :3] if bands >= 3 else pixels[..., :1].repeat(3, axis=-1)
    if mode == "P":
        image.putpalette(palette.tobytes())
        expected = palette[pixels[..., 0]]
    cell = encoded(image, **({"transparency": bytes(range(256))} if transparency else {}))
    with PIL.Image.open(io.BytesIO(cell["bytes"])) as stored:
        assert stored.mode == mode and ("transparency" in stored.info) == transparency
    np.testing.assert_array_equal(decoded_pixels(cell), expected)


def png(pixels):
    """A PNG file of 16-bit RGB pixels, which Pillow cannot write."""
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


LEVELS = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)


@pytest.mark.parametrize("levels", [LEVELS, LEVELS // 200, LEVELS // 20 + 60000], ids=["all", "dark", "bright"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "TIFF, big-endian", "PPM", "JPEG2000"])
def test_16_bit_levels_are_scaled_by_their_type(format, levels):
    if format.startswith("TIFF"):
        cell = tiff(levels, order=">" if format.endswith("endian") else "<")
    elif format == "JPEG2000" and not PIL.features.check("jpg_2000"):
        pytest.skip("Pillow was built without JPEG 2000")
    else:
        cell = encoded(PIL.Image.fromarray(levels), format)
    # 65535 = 257 · 255, whatever the levels of this image are.
    np.testing.assert_array_equal(decoded_pixels(cell)[..., 1], levels // 257)


def test_other_unsigned_levels_are_scaled_by_their_type():
    of_12_bits = (LEVELS // 16).astype(np.int64)
    np.testing.assert_array_equal(decoded_pixels(tiff(LEVELS // 16, bits=12))[..., 0], of_12_bits * 255 // 4095)
    np.testing.assert_array_equal(decoded_pixels(tiff(LEVELS, white_is_zero=True))[..., 0], 255 - LEVELS // 257)
    small = (LEVELS >> 8).astype(np.uint8)
    np.testing.assert_array_equal(decoded_pixels(tiff(small))[..., 0], small)
    colors = np.stack([LEVELS, LEVELS.T, LEVELS[::-1]], axis=-1)
    np.testing.assert_array_equal(decoded_pixels({"bytes": png(colors), "path": None}), colors >> 8)


def test_dark_16_bit_images_are_reported(caplog):
    _warn_once.cache_clear()
    for _ in range(2):
        decode_image(tiff(LEVELS // 300))
    assert caplog.text.count("scale_pixels(dataset, 0, 255)") == 1


WIDE = {
    "int8": (LEVELS // 257 - 128.0).astype(np.int8),
    "int16": (LEVELS - 32768.0).astype(np.int16),
    "int32": (LEVELS * 60000.0 - 2e9).astype(np.int32),
    "uint32": (LEVELS * 65000.0).astype(np.uint32),
    "float32": (LEVELS / 65535).astype(np.float32),
}


@pytest.mark.parametrize("name", WIDE)
def test_levels_without_a_fixed_range_are_refused_until_they_are_given_one(name):
    levels, cell = WIDE[name], tiff(WIDE[name])
    # Pillow holds signed levels of 16 bits as 32.
    held = "int32" if name == "int16" else name
    with pytest.raises(ValueError, match=f" {held} .*scale_pixels.*--pixel_range"):
        decode_image(cell)
    with pytest.raises(ValueError, match=f"Row 1: .* {held} "):
        ImageRows(cell_table([gray(0), cell]))[1]
    low, high = float(levels.min()), float(levels.max())
    scaled = scale_pixels(cell_table([gray(9, (8, 8)), cell, UNREADABLE, None]), low, high)
    rows = ImageRows(scaled, ["row"])
    assert [row["row"] for row in rows.__getitems__([0, 1])] == [0, 1]
    assert rows[0]["image"].getpixel((0, 0)) == (9, 9, 9)
    assert scaled.cast_column("image", Image(decode=False))[2:]["image"] == [UNREADABLE, None]
    expected = np.rint((levels.astype(np.float64) - low) / (high - low) * 255)
    np.testing.assert_array_equal(np.asarray(rows[1]["image"])[..., 2], expected)


def test_a_given_range_replaces_that_of_the_type_and_turns_the_image():
    turn = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
    table = scale_pixels(DatasetDict({"train": cell_table([tiff(LEVELS // 257, turn)])}), 0, 255)["train"]
    np.testing.assert_array_equal(np.asarray(ImageRows(table)[0]["image"])[..., 0], np.rot90(LEVELS // 257, -1))
    negative = scale_pixels(cell_table([tiff(WIDE["float32"], white_is_zero=True)]), 0, 1)
    pixels = np.asarray(ImageRows(negative)[0]["image"])[..., 0]
    np.testing.assert_array_equal(pixels, 255 - np.rint(WIDE["float32"].astype(np.float64) * 255))


def test_levels_outside_of_the_range_are_reported_and_nan_is_refused(caplog):
    table = scale_pixels(cell_table([tiff(WIDE["float32"]), tiff(WIDE["float32"] * 3 - 1)]), 0, 1)
    pixels = np.asarray(ImageRows(table)[1]["image"])[..., 0]
    np.testing.assert_array_equal(pixels, np.rint((WIDE["float32"] * np.float32(3) - 1).clip(0, 1) * 255))
    assert "1 of 2 images" in caplog.text and "rows [1]" in caplog.text
    with pytest.raises(ValueError, match="Row 1: .*NaN"):
        scale_pixels(cell_table([gray(0), tiff(np.full((2, 2), np.nan, np.float32))]), 0, 1)


@pytest.mark.parametrize("bounds", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_wrong_ranges_are_refused(bounds):
    with pytest.raises(ValueError, match=f"minimum={bounds[0]}, maximum={bounds[1]}"):
        scale_pixels(cell_table([gray(0)]), *bounds)


def test_scaling_writes_nothing_beside_the_files_of_the_user(tmp_path):
    cell_table([tiff(WIDE["float32"])]).save_to_disk(tmp_path / "table")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert np.asarray(scale_pixels(load_from_disk(tmp_path / "table"), 0, 1)[0]["image"]).dtype == np.uint8
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


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


@pytest.mark.parametrize("entry", ["XML:com.adobe.xmp", "Raw profile type exif"])
def test_the_orientation_in_a_text_of_a_png_file_is_applied(entry):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    profile = exif.tobytes()
    texts = {
        "XML:com.adobe.xmp": '<x tiff:Orientation="6"/>',
        "Raw profile type exif": f"\nexif\n{len(profile)}\n{profile.hex()}\n",
    }
    chunks = PIL.PngImagePlugin.PngInfo()
    chunks.add_itxt(entry, texts[entry])
    image = random_image((9, 6))
    cell = encoded(image, pnginfo=chunks)
    # As Pillow turns it.
    turned = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(cell["bytes"])))
    assert turned.size == (6, 9)
    np.testing.assert_array_equal(decoded_pixels(cell), np.asarray(turned.convert("RGB")))


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


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP"])
@pytest.mark.parametrize("allowed", [False, True])
def test_a_truncated_file_is_refused_whatever_pillow_allows(format, allowed, monkeypatch):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", allowed)
    content = encoded(random_image((32, 32)), format)["bytes"]
    with pytest.raises(ValueError, match="cannot be decoded: "):
        decode_image({"bytes": content[: len(content) // 2], "path": None})
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is allowed


@pytest.mark.parametrize("side", [8, 40])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_refused_before_they_are_decoded(side, monkeypatch):
    cell = encoded(PIL.Image.new("RGB", (side, side)))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"Row 1: .*pixels"):
        ImageRows(cell_table([gray(0), cell]))[1]


def test_of_several_frames_the_first_is_used_and_reported(caplog):
    _warn_once.cache_clear()
    frames = [PIL.Image.new("RGB", (4, 4), (level, 0, 0)) for level in (10, 200)]
    for format in ("PNG", "TIFF", "GIF", "MPO"):
        options = {"quality": 100} if format == "MPO" else {}
        cell = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert abs(int(decoded_pixels(cell)[0, 0, 0]) - 10) <= 2
        # A phone stores a preview as the second frame of an MPO file.
        assert ("several frames" in caplog.text) == (format != "MPO")
        caplog.clear()
        _warn_once.cache_clear()


def exif(*entries):
    """Each entry is (tag, type, count, 4 bytes)."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(20)


TURN = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
BROKEN_ENTRIES = {
    "resolution of 0/0": (0x011A, 5, 1, struct.pack("<I", 38)),
    "resolution nowhere": (0x011A, 5, 1, struct.pack("<I", 10**6)),
    "text for a pointer": (0xA005, 2, 3, b"R9\0\0"),
    "text for a pointer to GPS": (0x8825, 2, 3, b"N\0\0\0"),
    "GPS nowhere": (0x8825, 4, 1, struct.pack("<I", 99999)),
    "EXIF nowhere": (0x8769, 4, 1, struct.pack("<I", 99999)),
    "EXIF in itself": (0x8769, 4, 1, struct.pack("<I", 8)),
    "unknown type": (0x0110, 77, 1, b"abcd"),
    "huge count": (0x0110, 2, 2**31, b"abcd"),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("broken", BROKEN_ENTRIES)
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_leaves_the_image_readable_and_turned(format, broken):
    entry = BROKEN_ENTRIES[broken]
    pixels = random_pixels(6, 9)
    if format == "TIFF":
        cell = tiff(pixels, TURN, entry)
        if broken == "huge count" and int(PIL.__version__.partition(".")[0]) < 13:
            with pytest.raises(ValueError, match="cannot identify image file"):
                decode_image(cell)
            return
    else:
        options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(format, {})
        entries = exif(*sorted([TURN, entry])).removeprefix(b"Exif\0\0" if format == "PNG" else b"")
        cell = encoded(PIL.Image.fromarray(pixels).convert("RGB"), format, exif=entries, **options)
    np.testing.assert_allclose(decoded_pixels(cell)[..., 0], np.rot90(pixels, -1), atol=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metadata", [{"exif": b"Exif\0\0rubbish"}, {"xmp": b"\xa8\xe9"}, {"icc_profile": b"\0"}])
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF"])
def test_rubbish_for_metadata_leaves_the_image_readable(format, metadata):
    if format == "TIFF":
        tag, content = {"exif": (0x8769, b"rubb"), "xmp": (700, b"\xa8\0\0\0"), "icc_profile": (34675, b"\0" * 4)}[
            next(iter(metadata))
        ]
        cell = tiff(random_pixels(6, 9), TURN, (tag, 3, 1, content))
        assert decode_image(cell).size == (6, 9)
        return
    xmp = {} if "xmp" in metadata else {"xmp": b'<x tiff:Orientation="6"/>'}
    cell = encoded(random_image((9, 6)), format, **metadata, **xmp)
    assert decode_image(cell).size == ((6, 9) if xmp else (9, 6))


@pytest.mark.parametrize(
    "kind", [b"iCCP", b"eXIf", b"iTXt", b"zTXt", b"pHYs", b"gAMA", b"sRGB", b"cHRM", b"tIME", b"abCd"]
)
def test_a_damaged_chunk_beside_the_pixels_of_a_png_file_is_skipped(kind):
    pixels = random_pixels(6, 9, 3)
    content = encoded(PIL.Image.fromarray(pixels), exif=exif(TURN).removeprefix(b"Exif\0\0"))["bytes"]
    for damaged in (struct.pack(">I", 3) + kind + b"abc" + b"\0" * 4, chunk(kind, b"\xff")):
        cell = {"bytes": content[:33] + damaged + content[33:], "path": None}
        np.testing.assert_array_equal(decoded_pixels(cell), np.rot90(pixels, -1))


def test_the_file_key_is_of_the_bytes(tmp_path):
    cells = [encoded(random_image(seed=seed)) for seed in range(50)]
    keys = [file_key(cell) for cell in cells]
    assert len(set(keys)) == 50 and all(-(2**63) <= key < 2**63 for key in keys)
    (tmp_path / "1.png").write_bytes(cells[7]["bytes"])
    assert file_key({"bytes": None, "path": str(tmp_path / "1.png")}) == keys[7]


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
