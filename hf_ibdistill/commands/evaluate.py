"""Measure the accuracy, likelihood and calibration of an image classifier on a split.

hf-ibdistill evaluate --model outputs/student --dataset outputs/table --split test

For a student, it measures each token as well.
"""

import json
import time
from dataclasses import dataclass

from accelerate import PartialState
from transformers import AutoImageProcessor
from transformers.hf_argparser import HfArg

from ..data.sources import public_name
from ..evaluation import evaluate_model
from ..files import write_text
from ..logits.encoding import recorded_teachers
from ..progress import describe_seconds
from ..teachers import load_classifier
from .arguments import DataArguments, choose_split, parse, result_split, run
from .display import metric_rows, show_results, uses_of


@dataclass
class EvaluationArguments:
    _argument_group_name = "evaluation"

    model: str = HfArg(help="Folder or Hub id of the model.")
    split: str | None = HfArg(default=None, help="By default test, otherwise validation.")
    batch_size: int = HfArg(default=256, help="Images in a batch.")
    output_file: str | None = HfArg(default=None, help="Write the metrics to this file, as JSON.")
    trust_remote_code: bool = HfArg(default=False, help="Run the code of the model repository.")


def main(arguments):
    data, evaluation = parse("evaluate", __doc__, arguments, DataArguments, EvaluationArguments)
    splits = data.load()
    split = evaluation.split or result_split(splits)
    rows = choose_split(splits, split)
    trust = {"trust_remote_code": evaluation.trust_remote_code}
    model = load_classifier(evaluation.model, **trust)
    start = time.perf_counter()
    metrics = evaluate_model(
        model,
        AutoImageProcessor.from_pretrained(evaluation.model, **trust),
        rows,
        batch_size=evaluation.batch_size,
        # A student without tokens does not name its teachers.
        teacher_names=getattr(model.config, "teacher_names", None) or recorded_teachers(rows),
    )
    seconds = time.perf_counter() - start
    if PartialState().is_main_process:
        facts = {"model": evaluation.model, "data": data.dataset, "split": split, "metrics": metrics}
        if evaluation.output_file is not None:
            write_text(evaluation.output_file, json.dumps(facts, indent=2) + "\n")
        rows = [["images", f"{len(rows):,}"], *metric_rows(metrics), ["time", describe_seconds(seconds)]]
        header = [f"{split} split of {public_name(data.dataset)}", evaluation.model]
        show_results(facts, header, rows, *uses_of(evaluation.model)[:1])


if __name__ == "__main__":
    run("evaluate", main)
