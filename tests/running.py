"""Commands run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

from hf_ibdistill.commands import main


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(command, *arguments):
    """`hf-ibdistill command arguments` in this process, since starting one takes longer than most commands here."""
    main([command, *map(str, arguments)])


def run_process(*command):
    """`python command`, which must succeed; its output."""
    done = subprocess.run([sys.executable, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
