"""Commands run as a user runs them."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from hf_ibdistill.commands import main


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(command, *arguments):
    """`hf-ibdistill command arguments` in this process, since starting one takes longer than most commands here."""
    main([command, *map(str, arguments)])


def run_process(*command, with_errors=False):
    """`python command`, which must succeed; its output, and that to stderr if asked for."""
    done = subprocess.run([sys.executable, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return (done.stdout, done.stderr) if with_errors else done.stdout


def run_on_terminal(command, columns=100):
    """`python command` on a terminal of this width, which must succeed; what was written, and the lines that are there at the
    end."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, *map(str, command)], env=ENVIRONMENT, stdout=there, stderr=there
    ) as process:
        os.close(there)
        written = bytearray()
        # Linux reports the end of the last program on a terminal as an error.
        with contextlib.suppress(OSError):
            while part := os.read(here, 65536):
                written += part
    os.close(here)
    text = written.decode()
    assert process.returncode == 0, text[-3000:]
    return text, screen(text, columns)


def screen(text, columns):
    """The lines that a terminal shows after this text, with those that have scrolled away."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", text, re.DOTALL):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row = max(0, row - 1)
        elif part == "\x1b[K":
            lines[row] = lines[row][:column]
        elif part[0] == "\x1b":
            raise ValueError(f"This terminal does not have {part!r}.")
        else:
            if column == columns:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
