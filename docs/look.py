"""Look at the built site in a browser: `python docs/look.py FOLDER` after `make docs`.

Needs `pip install playwright`, and Chromium. Writes screenshots into the folder. Fails if a page asks another host for
anything, logs an error, is wider than the window, has a dead link or a picture without alternative text, or if the search
finds nothing.
"""

import argparse
import functools
import http.server
import shutil
import threading
from pathlib import Path
from urllib.parse import urldefrag

from playwright.sync_api import sync_playwright


SITE = Path(__file__).parents[1] / "build" / "site"
PICTURES = [
    ("index.html", "first", 1280),
    ("losses.html", "losses", 1280),
    ("api/training.html", "api", 1280),
    ("losses.html", "losses_phone", 390),
    ("index.html", "first_phone", 390),
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def watched_tab(browser, width: int, height: int, home: str, problems: list[str]):
    """A tab that reports errors, and requests that leave the site."""
    tab = browser.new_page(viewport={"width": width, "height": height})
    tab.on("request", lambda request: request.url.startswith((home, "data:")) or problems.append(request.url))
    tab.on("console", lambda message: message.type == "error" and problems.append(f"{tab.url}: {message.text}"))
    tab.on("pageerror", lambda error: problems.append(f"{tab.url}: {error}"))
    return tab


def look(folder: Path, chromium: str | None) -> list[str]:
    """The problems of all pages."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home, problems, links, anchors = f"http://127.0.0.1:{server.server_port}/", [], {}, {}
    pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for size, (width, height) in SIZES.items():
            tab = watched_tab(browser, width, height, home, problems)
            for page in pages:
                tab.goto(home + page)
                if tab.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
                    problems.append(f"{page} is wider than a {size}")
                for picture in tab.evaluate(
                    "[...document.images].filter(i => !i.alt || !i.naturalWidth).map(i => i.src)"
                ):
                    problems.append(f"{page}: {picture} has no alternative text or is not there")
                anchors[home + page] = set(tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
                links[page] = tab.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
            tab.goto(f"{home}search.html?q=temperature")
            if tab.locator("#search-results li").first.text_content(timeout=20000) == "":
                problems.append("the search finds nothing")
            tab.close()
        for page, targets in links.items():
            for target, anchor in map(urldefrag, targets):
                if target.startswith(home) and not (SITE / target[len(home) :]).exists():
                    problems.append(f"{page}: {target} is a dead link")
                elif target in anchors and anchor and anchor not in anchors[target]:
                    problems.append(f"{page}: {target} has no #{anchor}")
        for page, name, width in PICTURES:
            tab = browser.new_page(viewport={"width": width, "height": 900})
            tab.goto(home + page)
            tab.screenshot(path=folder / f"{name}.png")
            tab.close()
        browser.close()
    server.shutdown()
    print(f"{len(pages)} pages, {sum(map(len, links.values()))} links")
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Where screenshots go.")
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    parser.add_argument(
        "--chromium", default=installed, help="The browser; by default the one on the path, or playwright's."
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = look(arguments.folder, arguments.chromium)
    raise SystemExit("\n".join(found) or 0)
