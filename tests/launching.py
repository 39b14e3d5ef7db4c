"""Several processes, as torchrun starts them, except that they are forked, so that they need not import everything again."""

import multiprocessing
import threading

import torch
from accelerate.state import AcceleratorState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm.std import tqdm


def give_own_lock(progress_bars):
    """Processes share the lock of the progress bars, and a killed one never returns it."""
    progress_bars.set_lock(threading.RLock())
    for kind in progress_bars.__subclasses__():
        give_own_lock(kind)


def prepare_process():
    """To be called first by each process that [`launch`] forks."""
    give_own_lock(tqdm)
    torch.set_num_threads(1)
    # The process that was forked may have recorded alone.
    AcceleratorState._reset_state(reset_partial_state=True)


def start_launcher(run, folder, *arguments, num_processes=2):
    """A process in which `run(*arguments)` runs in several processes on the CPU; it fails if one of them does. The logs are in
    the folder."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="several processes",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        start_method="fork",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    launcher = multiprocessing.get_context("fork").Process(target=elastic_launch(config, run), args=arguments)
    launcher.start()
    return launcher
