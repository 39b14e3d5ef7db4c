"""Scripts run as a user runs them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path


SCRIPTS = Path(__file__).parent.parent / "scripts"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(script, *arguments):
    """In this process, since starting one and importing everything takes longer than most scripts here."""
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [str(SCRIPTS / script), *map(str, arguments)], [str(SCRIPTS)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


def run_process(*command):
    done = subprocess.run([sys.executable, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
