"""Several processes, as `torchrun` and `accelerate launch` start them."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object


T = TypeVar("T")


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
