"""Publish a trained model, or recorded logits, on the Hub.

hf-ibdistill push --folder outputs/student --repo_id user/student
hf-ibdistill push --folder outputs/table --repo_id user/logits --private

Log in first (`hf auth login`), or set HF_TOKEN. A second call completes an interrupted one.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from transformers.hf_argparser import HfArg

from ..data.sources import open_saved
from ..publishing.hub import push_folder_to_hub, push_logits_to_hub
from .arguments import choose_split, parse, run


@dataclass
class PushArguments:
    _argument_group_name = "publishing"

    folder: str = HfArg(help="Folder of a trained model, of a recorded table, or written by export_logits_table.")
    repo_id: str = HfArg(help="user/name; made if it does not exist.")
    with_images: bool = HfArg(default=False, help="Publish the images and labels of a recorded table.")
    split: str = HfArg(default="train", help="Split of a recorded table.")
    private: bool = HfArg(
        default=False, help="Make a new repository private; by default the setting of the account decides."
    )
    revision: str | None = HfArg(default=None, help="Branch to commit to; made if it does not exist.")
    commit_message: str | None = HfArg(default=None, help="Title of the commit or pull request.")
    create_pr: bool = HfArg(default=False, help="Open a pull request instead of committing.")


def main(arguments):
    (args,) = parse("push", __doc__, arguments, PushArguments)
    folder = Path(args.folder)
    how = {
        "private": args.private or None,
        "revision": args.revision,
        "commit_message": args.commit_message,
        "create_pr": args.create_pr,
    }
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        table = open_saved(folder)
        if isinstance(table, DatasetDict):
            table = choose_split(table, args.split)
        print(push_logits_to_hub(table, args.repo_id, with_images=args.with_images, **how))
    else:
        print(push_folder_to_hub(folder, args.repo_id, **how))


if __name__ == "__main__":
    run("push", main)
