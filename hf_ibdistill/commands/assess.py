"""Show what is known about a recorded table before a student is trained. No model runs.

hf-ibdistill assess --table outputs/table

The test split stays closed.
"""

import logging
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..publishing.tables import open_tables
from ..recording.assessment import assess_table
from .arguments import parse, run
from .display import beside, metric_rows, show_results


logger = logging.getLogger(__name__)

# results/data_efficiency/advice.json has the rules and how often each was right. studies/data_efficiency/test_advice.py fails
# if the cells support one.
_NO_ADVICE = (
    "These figures come without advice. In the study's cells, none of them predicts a student's gain on another data set better "
    "than the better teacher's accuracy alone."
)


@dataclass
class AssessmentArguments:
    _argument_group_name = "assessment"

    table: str = HfArg(help="Folder of the recorded table, or of one that was exported as Parquet.")
    temperature: float = HfArg(default=4.0, help="Temperature of entropies and divergences, as in distill.")
    num_rows: int = HfArg(
        default=10_000, help="Rows in each sample: with a label, without one, and of the validation split."
    )
    seed: int = HfArg(default=0, help="Seed of the samples.")
    label_column: str | None = HfArg(default=None, help="Label column; found if not given.")


def main(arguments):
    (assessment,) = parse("assess", __doc__, arguments, AssessmentArguments)
    settings = vars(assessment)
    folder = settings.pop("table")
    found = assess_table(open_tables(folder), **settings)
    for sentence in found["missing"]:
        logger.warning("table=%s: %s", folder, sentence)
    logger.warning(_NO_ADVICE)
    show_results(
        found | {"advice": []},
        *as_table(folder, found),
        ["distill", "--dataset", folder, "--output_dir", beside(folder, "student")],
    )


def as_table(folder: str, found: dict) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of what [`assess_table`] found."""
    groups = [group for group, count in found["rows"].items() if count]
    metrics = {group: dict(found["metrics"].get(group, {})) for group in groups}
    # Differences of the validation split from the labelled rows, and from its best teacher.
    if found["ensemble_gain"] is not None:
        metrics["validation"]["ensemble_gain"] = found["ensemble_gain"]
    for name, value in found["memorization"].items():
        metrics["labelled"][f"{name}_memorization"] = value
    images = ["images", *(f"{found['rows'][group]:,}" for group in groups)]
    return [folder, *groups], [images, *metric_rows(*metrics.values())]


if __name__ == "__main__":
    run("assess", main)
