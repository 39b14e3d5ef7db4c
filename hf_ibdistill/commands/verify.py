"""Run the teachers again on a random sample of a recorded table, and fail if the logits differ.

hf-ibdistill verify --table outputs/table --teachers conv=outputs/conv inv=outputs/inv
hf-ibdistill verify --table outputs/table --all --num_workers 2

The second needs no teachers. It checks every row: its logits, its image and the files.
"""

import sys
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..publishing.tables import open_tables
from ..recording.verification import verify_rows, verify_teacher_logits
from .arguments import name_folders, parse, run
from .display import beside, show_results


@dataclass
class VerificationArguments:
    _argument_group_name = "verification"

    table: str = HfArg(help="Folder of the recorded table, or of one that was exported as Parquet.")
    teachers: list[str] = HfArg(
        default_factory=list, help="NAME=FOLDER or NAME=HUB_ID for each column to verify by running its teacher."
    )
    all: bool = HfArg(default=False, help="Check every row against the provenance, without teachers.")
    num_workers: int = HfArg(default=0, help="Processes that check every row; 0 is this one.")
    num_rows: int = HfArg(default=256, help="Rows of each split to check.")
    seed: int = HfArg(default=0, help="Seed of the sample.")
    trust_remote_code: bool = HfArg(default=False, help="Run the code of the teacher repositories.")


def main(arguments):
    (verification,) = parse("verify", __doc__, arguments, VerificationArguments)
    if not verification.teachers and not verification.all:
        raise ValueError("There is nothing to verify. Give --teachers, --all, or both.")
    tables, problems, checks = open_tables(verification.table), [], []
    for split, table in tables.items():
        if verification.all:
            found = verify_rows(table, num_workers=verification.num_workers)
            problems += [f"{split}: {problem}" for problem in found]
            checks.append({"split": split, "rows": len(table), "problems": len(found)})
        if not verification.teachers:
            continue
        found = verify_teacher_logits(
            table,
            name_folders(verification.teachers),
            num_rows=verification.num_rows,
            seed=verification.seed,
            trust_remote_code=verification.trust_remote_code,
        )
        for teacher, difference in found.largest_differences.items():
            checks.append(
                {"split": split, "rows": found.num_rows, "teacher": teacher, "largest_difference": difference}
            )
        problems += [f"{split}: {problem}" for problem in found.problems]
    show(verification.table, checks, problems)
    if problems:
        sys.exit("\n".join(problems))


def show(folder, checks, problems) -> None:
    """Show what was checked and found."""
    rows = []
    for check in checks:
        is_of_teacher = "teacher" in check
        found = f"{check['largest_difference']:.2g}" if is_of_teacher else f"{check['problems']} problems"
        rows.append([check["split"], check["teacher"] if is_of_teacher else "no teacher", f"{check['rows']:,}", found])
    header = ["split", "teacher", "rows", "largest difference of a log-probability"]
    following = [] if problems else [["distill", "--dataset", folder, "--output_dir", beside(folder, "student")]]
    show_results({"checks": checks, "problems": problems}, header, rows, *following)


if __name__ == "__main__":
    run("verify", main)
