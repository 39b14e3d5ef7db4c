"""Run the teachers again on a random sample of a recorded table, and fail if the logits differ.

hf-ibdistill verify --table outputs/table --teachers conv=outputs/conv inv=outputs/inv
"""

import sys
from dataclasses import dataclass

from datasets import DatasetDict
from transformers.hf_argparser import HfArg

from ..data.sources import open_saved
from ..recording.verification import verify_teacher_logits
from .arguments import name_folders, parse, run


@dataclass
class VerificationArguments:
    _argument_group_name = "verification"

    table: str = HfArg(help="Folder of the recorded table.")
    teachers: list[str] = HfArg(help="NAME=FOLDER or NAME=HUB_ID for each column to verify.")
    num_rows: int = HfArg(default=256, help="Rows of each split to check.")
    seed: int = HfArg(default=0, help="Seed of the sample.")
    trust_remote_code: bool = HfArg(default=False, help="Run the code of the teacher repositories.")


def main(arguments):
    (verification,) = parse("verify", __doc__, arguments, VerificationArguments)
    tables = open_saved(verification.table)
    problems = []
    for split, table in (tables if isinstance(tables, DatasetDict) else {"table": tables}).items():
        found = verify_teacher_logits(
            table,
            name_folders(verification.teachers),
            num_rows=verification.num_rows,
            seed=verification.seed,
            trust_remote_code=verification.trust_remote_code,
        )
        for teacher, difference in found.largest_differences.items():
            print(
                f"{split}: {teacher}: largest difference of a log-probability in {found.num_rows} rows: {difference:.4g}"
            )
        problems += [f"{split}: {problem}" for problem in found.problems]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    run("verify", main)
