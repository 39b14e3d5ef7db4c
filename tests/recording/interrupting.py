"""Stop a recording at a batch, in this or other processes, and see which files it touched."""

import threading
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def before_each_batch(loaded, call):
    def pass_size(_, arguments, keywords):
        # Not the trial on one image, before the first shard.
        if len(keywords["pixel_values"]) > 1:
            call(len(keywords["pixel_values"]))

    return loaded["conv"][0].register_forward_pre_hook(pass_size, with_kwargs=True)


def file_times(folder, pattern="*"):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob(pattern)}


def give_own_lock(progress_bars):
    """Processes share the lock of the progress bars, and a killed one never returns it."""
    progress_bars.set_lock(threading.RLock())
    for kind in progress_bars.__subclasses__():
        give_own_lock(kind)


def launch_two_processes(run, dataset, teachers, folder):
    """torchrun, except that it forks its processes, so that they need not import everything again."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="two processes",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        start_method="fork",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    elastic_launch(config, run)(dataset, teachers, folder)
