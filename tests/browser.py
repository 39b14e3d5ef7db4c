"""A page in headless Chromium, for tests.

`python tests/browser.py URL IMAGE FOLDER` takes the pictures of docs/demo.md from a page that `hf-ibdistill demo` serves.
"""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import PIL.Image
import pytest


SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_browser():
    """A headless Chromium; skips if it or playwright is not installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is installed")
    with api.sync_playwright() as playwright:
        # A container has no room for its shared memory, and lets no user make a sandbox.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextmanager
def open_page(browser, url, width, height):
    """A page of this size; at the end, it must have asked nobody but its server, and had no error."""
    page, hosts, errors = browser.new_page(viewport={"width": width, "height": height}), set(), []
    page.set_default_timeout(30_000)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.locator("#predict").wait_for()
    yield page
    page.close()
    assert hosts - {""} == {urlsplit(url).netloc} and errors == []


def take_picture(page, folder, moment):
    """`folder`/demo_before.png or demo_after.png, on a phone demo_phone_before.png or demo_phone_after.png."""
    is_phone = page.viewport_size["width"] == SIZES["phone"][0]
    # A phone has no room for the whole page, and the top is what a visitor sees first.
    name = f"demo_{'phone_' if is_phone else ''}{moment}.png"
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth)")
    page.screenshot(path=f"{folder}/{name}", full_page=moment == "after" and not is_phone, animations="disabled")
    return Path(folder, name)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def serve(command, port, cwd, environment):
    """`python command`, once it serves a page on this port; Ctrl+C ends it. Yields the address and the output."""
    log = cwd / f"{port}.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Tests that run in the background of a shell ignore Ctrl+C, and a child would as well.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    try:
        for _ in range(1200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        else:
            pytest.fail(f"no page after two minutes: {log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}", log
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        process.kill()


def choose(page, name, content):
    """Upload a file as the image."""
    page.locator("#image input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": content})
    page.locator("#image img").wait_for()


def predict(page):
    """Press the button and read the result: the class, and title → its rows of (class, percent)."""
    page.get_by_role("button", name="Predict").click()
    return read_prediction(page)


def read_prediction(page):
    name = page.locator("#status strong")
    name.wait_for()
    # The result is on the screen, also on a phone, where it is below the examples.
    page.wait_for_function("document.querySelector('#status').getBoundingClientRect().bottom < innerHeight")
    tables = {}
    for section in page.locator("#results section").all():
        rows = [
            [row.get_by_role(kind).inner_text() for kind in ("rowheader", "cell")]
            for row in section.locator("tr").all()
        ]
        tables[section.locator("h2 span").inner_text()] = [tuple(row) for row in rows]
    assert tables
    return name.inner_text(), tables


def main(url, image, folder):
    pictures = []
    with open_browser() as browser:
        for kind, size in SIZES.items():
            with open_page(browser, url, *size) as page:
                page.get_by_role("button", name=re.compile("^Example")).first.wait_for()
                if kind == "desktop":
                    pictures.append(take_picture(page, folder, "before"))
                choose(page, "photo.png", Path(image).read_bytes())
                predict(page)
                pictures.append(take_picture(page, folder, "after"))
    for path in pictures:
        # A quarter of the bytes, because a repository keeps every version.
        PIL.Image.open(path).convert("RGB").quantize(256, PIL.Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
