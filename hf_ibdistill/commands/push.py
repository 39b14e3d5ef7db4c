"""Publish a trained model, recorded logits, or a page that shows a model, on the Hub.

hf-ibdistill push --folder outputs/student --repo_id user/student
hf-ibdistill push --folder outputs/table --repo_id user/logits --private
hf-ibdistill push --repo_id user/student --space user/demo

Log in first (`hf auth login`), or set HF_TOKEN. A second call completes an interrupted one.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from transformers.hf_argparser import HfArg

from ..data.sources import open_saved
from ..publishing.hub import push_folder_to_hub, push_logits_to_hub
from ..publishing.space import push_space_to_hub
from .arguments import choose_split, name_folders, parse, run


@dataclass
class PushArguments:
    _argument_group_name = "publishing"

    repo_id: str = HfArg(help="user/name; made if it does not exist.")
    folder: str | None = HfArg(
        default=None, help="Folder of a trained model, of a recorded table, or written by export_logits_table."
    )
    space: str | None = HfArg(default=None, help="user/name of a Space that shows the model in --repo_id.")
    teachers: list[str] = HfArg(default_factory=list, help="With --space, teachers to show, as NAME=HUB_ID.")
    with_images: bool = HfArg(
        default=False, help="Publish the images and labels of a table, or the images in the report of a model."
    )
    split: str = HfArg(default="train", help="Split of a recorded table.")
    private: bool = HfArg(
        default=False, help="Make a new repository private; by default the setting of the account decides."
    )
    revision: str | None = HfArg(default=None, help="Branch to commit to; made if it does not exist.")
    commit_message: str | None = HfArg(default=None, help="Title of the commit or pull request.")
    create_pr: bool = HfArg(default=False, help="Open a pull request instead of committing.")


def main(arguments):
    (args,) = parse("push", __doc__, arguments, PushArguments)
    if args.folder is None and args.space is None:
        raise ValueError("folder and space are missing. Give the folder to publish, or a Space to show --repo_id in.")
    if args.folder is not None:
        print(push_folder(args, Path(args.folder)))
    if args.space is not None:
        how = {"private": args.private or None, "commit_message": args.commit_message}
        print(push_space_to_hub(args.repo_id, args.space, teachers=name_folders(args.teachers), **how))


def push_folder(args: PushArguments, folder: Path) -> str:
    """Publish a model or a table; returns its address."""
    how = {
        "private": args.private or None,
        "revision": args.revision,
        "commit_message": args.commit_message,
        "create_pr": args.create_pr,
    }
    if not ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
        return push_folder_to_hub(folder, args.repo_id, with_images=args.with_images, **how)
    table = open_saved(folder)
    if isinstance(table, DatasetDict):
        table = choose_split(table, args.split)
    return push_logits_to_hub(table, args.repo_id, with_images=args.with_images, **how)


if __name__ == "__main__":
    run("push", main)
