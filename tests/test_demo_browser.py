"""`hf-ibdistill demo` as a visitor meets it: a page in headless Chromium, served by the command."""

import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import SIZES, choose, free_port, open_browser, open_page, predict, read_prediction, serve, take_picture
from running import ENVIRONMENT
from small import image_bytes, make_student, make_teacher
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from hf_ibdistill import load_teachers
from hf_ibdistill.demo import build_demo, explain, read_upload, start_demo


# The name of a class is a text that somebody else wrote.
NAMES = ["cat", "<img src=x onerror=alert(1)> ${1 + 1} {{value}}", "eel", "fox", "a_very_long_name_of_a_class" * 3]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page of a student and two teachers, with two examples, and where it stores uploads."""
    folder = tmp_path_factory.mktemp("demo")
    model, teachers = make_student(folder / "student", NAMES), {}
    for name in ("conv", "inv"):
        teachers[name] = make_teacher(folder / name, names=NAMES, seed=len(teachers))
    (folder / "examples").mkdir()
    for name, seed in (("first", 1), ("second one", 2)):
        (folder / "examples" / f"{name}.png").write_bytes(image_bytes(seed, 16))
    port = free_port()
    command = ["-m", "hf_ibdistill.commands.demo", "--model", model, "--examples", folder / "examples"]
    command += ["--teachers", *(f"{name}={source}" for name, source in teachers.items())]
    root = Path(__file__).parents[1]
    environment = {**ENVIRONMENT, "GRADIO_TEMP_DIR": str(folder / "uploads"), "PYTHONPATH": str(root)}
    (folder / "secret.png").write_bytes(image_bytes(9))
    with serve([*command, "--port", port, "--max_file_size", "0.2"], port, folder, environment) as (url, log):
        yield SimpleNamespace(url=url, folder=folder, model=model, teachers=teachers)
    # Nothing is kept but the examples, which belong to whoever serves the page.
    left = {path.name for path in (folder / "uploads").rglob("*") if path.is_file()}
    assert left == {"first.png", "second one.png"}, left
    # The only traceback is that of the visitor who asked for a file of the server. Bad files have none.
    text = log.read_text()
    assert f"The page is at {url}/" in text and text.count("Traceback") == text.count("InvalidPathError:"), text[
        -3000:
    ]


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(params=SIZES)
def page(request, served, browser):
    with open_page(browser, served.url, *SIZES[request.param]) as page:
        yield page


@pytest.fixture
def desktop(served, browser):
    with open_page(browser, served.url, *SIZES["desktop"]) as page:
        yield page


def expected_tables(served, content):
    """What the page must show, by the package itself."""
    (served.folder / "photo.png").write_bytes(content)
    model = AutoModelForImageClassification.from_pretrained(served.model)
    teachers = load_teachers(served.teachers)
    image = read_upload(served.folder / "photo.png")
    tables = {}
    for reading in explain(image, model, AutoImageProcessor.from_pretrained(served.model), teachers):
        best = sorted(reading.probabilities, key=lambda pair: -pair[1])[:5]
        tables[reading.title] = [(name, f"{100 * share:.1f} %") for name, share in best]
    return tables


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_upload_click_read(page, served, tmp_path):
    # HF_IBDISTILL_SCREENSHOTS=FOLDER keeps the pictures.
    pictures = Path(os.environ.get("HF_IBDISTILL_SCREENSHOTS", tmp_path))
    assert page.locator("#results section").count() == 0 and page.locator("#status strong").count() == 0
    take_picture(page, pictures, "before")
    assert fits(page)
    content = image_bytes(5, 20)
    choose(page, "photo.png", content)
    name, tables = predict(page)
    take_picture(page, pictures, "after")
    expected = expected_tables(served, content)
    assert list(expected) == [
        "Fused prediction",
        "Class token",
        "Token of conv",
        "Token of inv",
        "Teacher conv",
        "Teacher inv",
    ]
    assert tables == expected and name == tables["Fused prediction"][0][0]
    # The student and each teacher, in milliseconds.
    times = page.locator("#results h2 small").all_inner_texts()
    assert len(times) == 3 and all(re.fullmatch(r"\d+\.\d ms", text) for text in times)
    assert re.search(r" with \d+\.\d % in \d+\.\d ms\.", page.locator("#status").inner_text())
    # Three maps, which the browser could draw, and which differ.
    maps = page.locator("#results img")
    assert maps.evaluate_all("all => all.map(map => map.naturalWidth)") == [288] * 3
    assert len(set(maps.evaluate_all("all => all.map(map => map.src)"))) == 3
    # Bars as long as the shares.
    first = page.locator("#results section").first.locator(".bar").first
    share = first.evaluate("bar => bar.firstElementChild.offsetWidth / bar.offsetWidth")
    assert 100 * share == pytest.approx(float(tables["Fused prediction"][0][1][:-2]), abs=1)
    assert fits(page)


def test_an_example_and_the_keyboard(page):
    def press_until(key, name):
        for _ in range(30):
            page.keyboard.press(key)
            if page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.innerText").strip() == name:
                return
        pytest.fail(f"{key} does not reach {name}")

    page.get_by_role("button", name="Example second one").wait_for()
    press_until("Tab", "Predict")
    press_until("Tab", "Example second one")
    page.keyboard.press("Enter")
    page.locator("#image img").wait_for()
    press_until("Shift+Tab", "Predict")
    outline = page.evaluate(
        "getComputedStyle(document.activeElement, ':focus').outlineStyle + getComputedStyle(document.activeElement).boxShadow"
    )
    assert outline != "nonenone"
    page.keyboard.press("Enter")
    assert read_prediction(page)


def check_names(page, *expected):
    """Every control has a name, and every table a caption."""
    snapshot = page.locator("body").aria_snapshot()
    assert not re.search(r"- (button|link|textbox|table)(:|$)", snapshot, re.MULTILINE), snapshot
    for name in expected:
        assert page.get_by_role("button", name=re.compile(name, re.IGNORECASE)).count() > 0, (name, snapshot)


def test_names_for_screen_readers(page):
    page.get_by_role("button", name="Example first").wait_for()
    check_names(page, "Drop an image", "Predict", "Example first", "Example second one")
    choose(page, "photo.png", image_bytes(5, 20))
    predict(page)
    assert page.locator("html").get_attribute("lang") == "en" and page.title() == "Demo of student"
    assert page.get_by_role("heading", level=1).all_inner_texts() == ["Demo of student"]
    assert page.get_by_role("heading", level=2).count() == 6
    check_names(page, "Remove image", "Predict")
    assert page.locator("#image img").get_attribute("alt") == "The chosen image"
    alts = page.locator("#results img").evaluate_all("all => all.map(map => map.alt)")
    assert [alt.split(" over")[0] for alt in alts] == [
        f"Attention map of the {token}" for token in ("class token", "token of conv", "token of inv")
    ]
    assert page.get_by_role("table").count() == 6
    # The result is announced: it appears in a region that was there before.
    assert page.locator("[role=status][aria-live=polite]", has=page.locator("strong#prediction")).count() == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"no image at all", "cannot be decoded"),
        ("cut.png", image_bytes(0, 64)[:200], "cannot be decoded"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be decoded"),
    ],
)
def test_a_bad_file_is_a_sentence(desktop, name, content, message):
    choose(desktop, "photo.png", image_bytes(5))
    predict(desktop)
    desktop.get_by_role("button", name=re.compile("remove image", re.IGNORECASE)).click()
    choose(desktop, name, content)
    desktop.get_by_role("button", name="Predict").click()
    problem = desktop.locator("#status .bad")
    problem.wait_for()
    text = problem.inner_text()
    assert message in text and "/" not in text and "Traceback" not in desktop.locator("body").inner_text()
    # The prediction before it is gone.
    assert desktop.locator("#results section").count() == 0
    # And the next image works.
    desktop.get_by_role("button", name=re.compile("remove image", re.IGNORECASE)).click()
    choose(desktop, "photo.png", image_bytes(6))
    assert predict(desktop)


def test_no_image_is_a_sentence_and_another_image_clears_the_prediction(desktop):
    desktop.get_by_role("button", name="Predict").click()
    problem = desktop.locator("#status .bad")
    problem.wait_for()
    assert "no image" in problem.inner_text()
    choose(desktop, "photo.png", image_bytes(5))
    predict(desktop)
    desktop.get_by_role("button", name="Example first").click()
    desktop.locator("#status strong").wait_for(state="detached")
    assert desktop.locator("#results section").count() == 0


def post(url, content, kind):
    request = urllib.request.Request(url, data=content, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_large_uploads_are_refused(desktop, served):
    large = image_bytes(0, 600)
    assert len(large) > 200_000
    locator = desktop.locator("#image input[type=file]")
    locator.set_input_files({"name": "large.png", "mimeType": "image/png", "buffer": large})
    problem = desktop.get_by_text(re.compile("exceed the maximum allowed size", re.IGNORECASE))
    problem.first.wait_for()
    assert desktop.locator("#image img").count() == 0
    # The server does not rely on the page.
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
    upload = f"{served.url}/gradio_api/upload"
    assert post(upload, form % large, "multipart/form-data; boundary=x")[0] == 413
    assert post(upload, form % image_bytes(0), "multipart/form-data; boundary=x")[0] == 200


def test_a_visitor_reads_no_file_of_the_server(served):
    with urllib.request.urlopen(f"{served.url}/config", timeout=30) as answer:
        config = json.load(answer)
    # Gradio would keep a history of predictions in the browser.
    assert config["run_history"] is False
    # No event of the page is an endpoint, and the names of folders are not in it.
    assert not any(event["api_visibility"] == "public" for event in config["dependencies"])
    assert str(served.folder / "student") not in json.dumps(config)
    (event,) = [event for event in config["dependencies"] if len(event["outputs"]) == 2 and event["inputs"]]
    for path, is_refused in ((served.folder / "secret.png", True), (served.folder / "uploads" / "none.png", False)):
        data = {"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}], "fn_index": event["id"]}
        post(
            f"{served.url}/gradio_api/queue/join",
            json.dumps({**data, "session_hash": path.stem}).encode(),
            "application/json",
        )
        with urllib.request.urlopen(
            f"{served.url}/gradio_api/queue/data?session_hash={path.stem}", timeout=30
        ) as stream:
            text = stream.read().decode()
        assert "Predicted" not in text and ('"success":false' in text) is is_refused, text
    status, _ = post(f"{served.url}/gradio_api/file={served.folder / 'secret.png'}", None, "text/plain")
    assert status == 403


def test_a_classifier_without_tokens_has_a_prediction_alone(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    demo = build_demo(model, ViTImageProcessor(size={"height": 32, "width": 32}))
    try:
        with open_page(browser, start_demo(demo, host="127.0.0.1"), *SIZES["desktop"]) as page:
            choose(page, "photo.png", image_bytes(5))
            name, tables = predict(page)
            assert list(tables) == ["Prediction"] and tables["Prediction"][0][0] == name
            assert page.locator("#results img").count() == 0
    finally:
        demo.close()
