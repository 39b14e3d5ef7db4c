"""This process and its memory, and several of them, as `torchrun` and `accelerate launch` start them."""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object


T = TypeVar("T")

# The parameters of glibc's `mallopt`, and the variables that set them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(size: int = 1 << 30) -> bool:
    """Let the C library keep freed memory for the next tensors. By default glibc gives large pieces back to the system, and a
    training step on a CPU fetches them again.

    It does nothing under another C library, or where an environment variable already says what to keep.

    Args:
        size: bytes. Smaller tensors come from memory that is kept, and up to so much of it is kept while it is free.

    Returns:
        Whether it has been set.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _MALLOC_VARIABLES):
        return False
    set_parameter = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_parameter is None:
        return False
    # 1 is success.
    return set_parameter(_MMAP_THRESHOLD, size) == set_parameter(_TRIM_THRESHOLD, size) == 1


def once_a_machine(function: Callable[[], T]) -> T:
    """What a function returns that needs no more than one process of each machine, whose files may differ.

    All processes call it together, after accelerate's state is made.

    Args:
        function: takes no arguments. What it returns or raises is sent to the other processes.

    Returns:
        What it returned in the first process.

    Raises:
        Exception: in all processes, what it raised in one of them.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    result = error = None
    if state.is_local_main_process:
        try:
            result = function()
        except Exception as raised:
            error = raised
    # Of the results, only that of the first process is needed.
    outcomes = gather_object([(result if state.is_main_process else None, error)])
    for _, error in outcomes:
        if error is not None:
            raise error
    return outcomes[0][0]
