"""Publish a trained model, or recorded logits, on the Hub.

    python scripts/push_to_hub.py --folder outputs/student --repo_id user/student
    python scripts/push_to_hub.py --folder outputs/table --repo_id user/logits --private

Log in first (`hf auth login`), or set HF_TOKEN. Called again, it completes what was interrupted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from arguments import parse_arguments, run
from datasets import DatasetDict, load_from_disk

from hf_ibdistill import push_folder_to_hub, push_logits_to_hub


@dataclass
class PushArguments:
    folder: str = field(
        metadata={"help": "A trained model's folder, a recorded table's, or one that export_logits_table wrote."}
    )
    repo_id: str = field(metadata={"help": "user/name; made if it does not exist."})
    with_images: bool = field(default=False, metadata={"help": "Of a recorded table, publish images and labels too."})
    split: str = field(default="train", metadata={"help": "Of a recorded table, the split to publish."})
    private: bool = field(
        default=False,
        metadata={"help": "Make a new repository private; otherwise it is as the account's setting says."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; made if it does not exist."})
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit or pull request."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})


def main():
    (args,) = parse_arguments(PushArguments)
    folder = Path(args.folder)
    how = {
        "private": args.private or None,
        "revision": args.revision,
        "commit_message": args.commit_message,
        "create_pr": args.create_pr,
    }
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        table = load_from_disk(str(folder))
        if isinstance(table, DatasetDict):
            if args.split not in table:
                raise ValueError(f'There is no split "{args.split}"; the splits are {", ".join(table)}.')
            table = table[args.split]
        print(push_logits_to_hub(table, args.repo_id, with_images=args.with_images, **how))
    else:
        print(push_folder_to_hub(folder, args.repo_id, **how))


if __name__ == "__main__":
    run(main)
