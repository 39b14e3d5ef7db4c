"""Ask the teachers again about a random sample of a recorded table; fails if it is not what they say.

python scripts/verify_logits.py --table outputs/table --teachers conv=outputs/conv inv=outputs/inv
"""

import sys
from dataclasses import dataclass, field

from arguments import name_folders, parse_arguments, run
from datasets import DatasetDict, load_from_disk

from hf_ibdistill import verify_teacher_logits


@dataclass
class VerificationArguments:
    table: str = field(metadata={"help": "Folder that record_logits.py wrote."})
    teachers: list[str] = field(metadata={"help": "NAME=FOLDER or NAME=HUB_ID for each column to verify."})
    num_rows: int = field(default=256, metadata={"help": "Rows of each split to ask about."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a teacher's Hub repository brings."}
    )


def main():
    (arguments,) = parse_arguments(VerificationArguments)
    tables = load_from_disk(arguments.table)
    problems = []
    for split, table in (tables if isinstance(tables, DatasetDict) else {"table": tables}).items():
        found = verify_teacher_logits(
            table,
            name_folders(arguments.teachers),
            num_rows=arguments.num_rows,
            seed=arguments.seed,
            trust_remote_code=arguments.trust_remote_code,
        )
        for teacher, difference in found.largest_differences.items():
            print(
                f"{split}: {teacher}: largest difference of a log-probability in {found.num_rows} rows: {difference:.4g}"
            )
        problems += [f"{split}: {problem}" for problem in found.problems]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    run(main)
