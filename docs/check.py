"""Run every bash and python block of README.md and the pages in docs/, each page in order in an empty folder.

python docs/check.py [--seconds N] [PAGE …]

With --seconds, a page that takes more processor time fails.

A block whose first line is "```bash no-check" or "```python no-check" is shown but not run. Python blocks of a page share
one interpreter.
"""

import argparse
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
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


def check(page: Path, seconds: float) -> bool:
    """Run a page in a process and a folder of its own; whether all of its blocks succeeded in this processor time."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("benchmarks", "studies", "results", "scripts"):
            (Path(folder) / name).symlink_to(ROOT / name)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        start = processor_seconds()
        done = subprocess.run(
            [sys.executable, __file__, "--here", str(page)],
            cwd=folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        spent = processor_seconds() - start
    budget = "" if spent <= seconds else f", more than the {seconds:.0f} s that it may take"
    print(
        f"{os.path.relpath(page, ROOT)}: {len(blocks(page))} blocks, exit {done.returncode}, {spent:.0f} s of a processor{budget}",
        flush=True,
    )
    if done.returncode != 0:
        print("\n".join(done.stdout.splitlines()[-30:]))
    return done.returncode == 0 and not budget


def processor_seconds() -> float:
    """Of all processes that this one started and that have ended, and of those that they started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="Pages to run; by default README.md and all of docs/.")
    parser.add_argument("--seconds", type=float, default=math.inf, help="Processor time that a page may take.")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        run_page(arguments.pages[0])
        return
    pages = [page.resolve() for page in arguments.pages]
    pages = pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    failed = [page.name for page in pages if not check(page, arguments.seconds)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
