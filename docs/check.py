"""Run every bash and python block of README.md and the pages in docs/, each page in order in an empty folder.

python docs/check.py [PAGE …]

A block whose first line is "```bash no-check" or "```python no-check" is shown but not run. Python blocks of a page share
one interpreter.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, language, code) of each block to run."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(2)) + 1, *match.groups()) for match in BLOCK.finditer(text)]


def run_page(page: Path) -> None:
    """Run the blocks of a page in this process and folder."""
    namespace = {"__name__": "__main__"}
    for line, language, code in blocks(page):
        print(f"{page.name}:{line}", flush=True)
        if language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        else:
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def check(page: Path) -> bool:
    """Run a page in a process and a folder of its own; whether all of its blocks succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("benchmarks", "studies", "results", "scripts"):
            (Path(folder) / name).symlink_to(ROOT / name)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--here", str(page)],
            cwd=folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    print(
        f"{page.relative_to(ROOT)}: {len(blocks(page))} blocks, exit {done.returncode}, {time.perf_counter() - start:.0f} s"
    )
    if done.returncode != 0:
        print("\n".join(done.stdout.splitlines()[-30:]))
    return done.returncode == 0


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--here"]:
        run_page(Path(arguments[1]))
        return
    pages = [Path(argument).resolve() for argument in arguments]
    pages = pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    failed = [page.name for page in pages if not check(page)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
