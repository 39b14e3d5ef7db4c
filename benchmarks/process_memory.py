"""The memory of this process. Nothing is imported here that an earlier version of the package lacks."""

from pathlib import Path


STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Its peak, in bytes (Linux only)."""
    # getrusage would give at least the peak of the parent process.
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
