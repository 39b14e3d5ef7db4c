"""Make the report of a run again, or compare several runs with the first, as one HTML page.

hf-ibdistill report outputs/student
hf-ibdistill report outputs/student --dataset my_images/
hf-ibdistill report outputs/plain_vit outputs/student --dataset my_images/ --output_file both.html

With --dataset, the page shows images: the most confident mistakes of a run, or what the others gain
over the first, and where their tokens look.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..files import user_path
from ..publishing.report import REPORT, add_images, check_same_rows, read_runs, write_comparison, write_report
from .arguments import DataArguments, choose_split, parse, result_split, run


@dataclass
class ReportData(DataArguments):
    dataset: str | None = HfArg(
        default=None, help="The images that the runs were measured on, or a table of them, to show some."
    )


@dataclass
class ReportArguments:
    _argument_group_name = "report"

    runs: list[str] = HfArg(default_factory=list, help="Folders of trained models; the flag may be left out.")
    output_file: str | None = HfArg(
        default=None, help=f"The page; by default {REPORT} in the folder of the run, of several runs here."
    )


def main(arguments):
    data, report = parse("report", __doc__, arguments, ReportData, ReportArguments, bare="runs")
    if not report.runs:
        raise ValueError("There is no run. Give the folders of trained models.")
    runs = read_runs(report.runs)
    check_same_rows(runs)
    if data.dataset is not None:
        splits = data.load()
        add_images(runs, choose_split(splits, runs[0].results.get("split") or result_split(splits)))
    if report.output_file is not None:
        path = Path(user_path(report.output_file, "output_file"))
    else:
        path = Path(report.runs[0], REPORT) if len(runs) == 1 else Path(REPORT)
    if len(runs) == 1:
        write_report(path, runs[0])
    else:
        write_comparison(path, runs)
    print(path)


if __name__ == "__main__":
    run("report", main)
