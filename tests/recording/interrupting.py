"""Stop a recording at a batch, and see which files it touched."""

from pathlib import Path


def before_each_batch(loaded, call):
    def pass_size(_, arguments, keywords):
        # Not the trial on one image, before the first shard.
        if len(keywords["pixel_values"]) > 1:
            call(len(keywords["pixel_values"]))

    return loaded["conv"][0].register_forward_pre_hook(pass_size, with_kwargs=True)


def file_times(folder, pattern="*"):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob(pattern)}
