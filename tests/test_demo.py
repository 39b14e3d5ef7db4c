"""What the page of `hf-ibdistill demo` is made of. tests/test_demo_browser.py opens the page itself."""

import json
import struct
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from small import NAMES, image_bytes, make_student, make_teacher
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, ViTImageProcessor, pipeline

from hf_ibdistill import IBViTForImageClassification, load_teachers, token_attention
from hf_ibdistill.demo import (
    build_demo,
    describe_attention,
    draw_attention,
    explain,
    read_upload,
    seen_image,
    start_demo,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def student(folder):
    return IBViTForImageClassification.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(image_bytes(5, size=20))
    return path


def small_resnet():
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()


def passes(*models):
    """The list that grows with every forward pass of the models."""
    counted = []
    for model in models:
        model.register_forward_hook(lambda *_: counted.append(1))
    return counted


def test_every_prediction_is_that_of_its_part(folder, student, teachers, photo):
    loaded, image = load_teachers(teachers), read_upload(photo)
    counted = passes(student[0], *(teacher.model for teacher in loaded))
    readings = explain(image, *student, loaded)
    assert len(counted) == 3
    titles = ["Fused prediction", "Class token", "Token of conv", "Token of inv", "Teacher conv", "Teacher inv"]
    assert [reading.title for reading in readings] == titles
    for source, title in ((folder, "Fused prediction"), (teachers["conv"], "Teacher conv")):
        expected = {found["label"]: found["score"] for found in pipeline("image-classification", source)(image)}
        assert dict(readings[titles.index(title)].probabilities) == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        outputs = student[0](student[1]([image], return_tensors="pt")["pixel_values"])
    heads = torch.stack([outputs.class_logits, *outputs.teacher_token_logits.unbind(1)]).softmax(-1)[:, 0]
    for reading, expected in zip(readings[1:4], heads):
        assert [name for name, _ in reading.probabilities] == NAMES
        assert [share for _, share in reading.probabilities] == pytest.approx(expected.tolist(), abs=1e-5)
    # Another part, another prediction: the comparisons are of something.
    assert heads.std(0).max() > 0.05
    maps = token_attention(*student, [image])
    for reading, expected in zip(readings[1:4], maps.values()):
        np.testing.assert_array_equal(reading.attention, expected[0])
    timed = [reading.title for reading in readings if reading.milliseconds is not None]
    assert timed == ["Fused prediction", "Teacher conv", "Teacher inv"]


@pytest.mark.parametrize("return_dict", [True, False])
def test_any_classifier_is_explained_by_its_prediction_alone(photo, return_dict):
    model, processor = small_resnet(), ViTImageProcessor(size={"height": 32, "width": 32})
    model.config.return_dict = return_dict
    (reading,) = explain(read_upload(photo), model, processor)
    with torch.no_grad():
        logits = model(processor(read_upload(photo), return_tensors="pt")["pixel_values"], return_dict=True).logits
    assert reading.title == "Prediction" and reading.attention is None and reading.milliseconds > 0
    assert [share for _, share in reading.probabilities] == pytest.approx(logits[0].softmax(-1).tolist(), abs=1e-6)


def test_a_student_without_teachers_has_a_prediction_and_a_map(student, photo, tmp_path):
    config = type(student[0].config).from_dict({**student[0].config.to_dict(), "teacher_names": []})
    first, second = explain(read_upload(photo), IBViTForImageClassification(config).eval(), student[1])
    assert (first.title, second.title) == ("Prediction", "Class token") and second.attention.shape == (4, 4)
    assert dict(first.probabilities) == pytest.approx(dict(second.probabilities))


# Uploads


def bomb(side):
    """A PNG file of a few bytes that promises `side` × `side` pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image at all", "cannot be decoded.* PNG"),
        (b"", "cannot be decoded"),
        (image_bytes(0)[:60], "cannot be decoded"),
        (SVG, "cannot be decoded"),
        (bomb(9_000), "64 million pixels"),
        (bomb(60_000), "64 million pixels"),
        (None, "no longer here"),
    ],
)
def test_a_bad_file_is_one_sentence_without_its_path(content, message, tmp_path):
    path = tmp_path / "secret_place.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_upload(path)
    text = str(refused.value)
    assert "secret_place" not in text and "\n" not in text and text.endswith(".") and ".." not in text


def test_an_upload_is_upright_rgb(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    PIL.Image.new("L", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    image = read_upload(tmp_path / "turned.jpg")
    assert (image.size, image.mode) == ((20, 30), "RGB")


# Attention


def test_the_largest_attention_is_the_brightest_place():
    attention = np.full((4, 8), 0.01, dtype=np.float32)
    attention[3, 0] = 0.5
    drawn = draw_attention(PIL.Image.new("RGB", (64, 32), "gray"), attention)
    assert drawn.size == (288, 144)
    light = np.asarray(drawn.convert("L"), dtype=float)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert row > 0.75 * 144 and column < 288 / 8
    # In print and to any eye: the two ends differ by their brightness alone.
    assert light[-10, 10] - light[10, -10] > 60


def test_attention_in_words():
    attention = np.zeros((7, 7), dtype=np.float32)
    attention[6, 3], attention[0, 0] = 0.5, 0.3
    assert describe_attention(attention) == "80 % of its attention is on the image, strongest at the bottom center"
    assert describe_attention(np.array([[0.25]])).endswith(
        "25 % of its attention is on the image, strongest at the middle center"
    )
    assert describe_attention(np.array([[0.1, 0.2], [0.1, 0.1]])).endswith("top right")


def test_the_image_is_shown_as_the_student_sees_it(student):
    image = PIL.Image.new("RGB", (40, 20), (200, 100, 50))
    seen = seen_image(image, student[1])
    assert seen.size == (8, 8) and seen.getpixel((3, 3)) == (200, 100, 50)


# The page


def test_mistakes_are_named_before_the_page_is_served(student, folder, teachers, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="examples=.*empty"):
        build_demo(folder, examples=tmp_path / "empty")
    other = make_teacher(tmp_path / "other", names=["ant", "bee", "cow"])
    with pytest.raises(ValueError, match='"conv".*ant'):
        build_demo(folder, teachers={"conv": other})
    with pytest.raises(ValueError, match="image_processor=None"):
        build_demo(student[0])
    with pytest.raises(OSError, match="nowhere"):
        build_demo(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"IBViTForImageClassification fails on images of shape \(3, 12, 12\)"):
        build_demo(student[0], ViTImageProcessor(size={"height": 12, "width": 12}))
    page = build_demo(folder, teachers=teachers)
    for name, value in (("max_file_size", 0), ("port", 70_000), ("port", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            start_demo(page, **{name: value})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r': gradio\. .*"hf_ibdistill\[demo\]"'):
        build_demo(folder)


def test_an_upload_is_deleted_although_nobody_stops_the_page(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    # Every second, what is older than a second.
    monkeypatch.setattr("hf_ibdistill.demo._DELETION", (1, 1))
    page = build_demo(folder)
    url = start_demo(page, host="127.0.0.1")
    try:
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
        request = urllib.request.Request(f"{url}gradio_api/upload", data=form % image_bytes(0))
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        with urllib.request.urlopen(request, timeout=30) as answer:
            (stored,) = json.load(answer)
        assert Path(stored).is_relative_to(tmp_path)
        for _ in range(300):
            if not Path(stored).exists():
                break
            time.sleep(0.1)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    finally:
        page.close()
