"""Measure any image classifier on a split: accuracy, likelihood, calibration, and for students each token's own.

python scripts/evaluate_model.py --model outputs/student --dataset outputs/table --split test
"""

import json
from dataclasses import dataclass, field

from arguments import DataArguments, parse_arguments, result_split, run
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_ibdistill


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    split: str | None = field(default=None, metadata={"help": "By default test, else validation."})
    batch_size: int = field(default=256, metadata={"help": "Images a forward pass."})
    output_file: str | None = field(default=None, metadata={"help": "Also write the metrics here, as JSON."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that the Hub repository brings."})


def main():
    data, evaluation = parse_arguments(DataArguments, EvaluationArguments)
    splits = data.load()
    split = evaluation.split or result_split(splits)
    if split not in splits:
        raise ValueError(f'There is no split "{split}"; the splits are {", ".join(splits)}.')
    trust = {"trust_remote_code": evaluation.trust_remote_code}
    metrics = hf_ibdistill.evaluate_model(
        AutoModelForImageClassification.from_pretrained(evaluation.model, **trust),
        AutoImageProcessor.from_pretrained(evaluation.model, **trust),
        splits[split],
        batch_size=evaluation.batch_size,
        image_column=data.image_column,
        label_column=data.label_column,
    )
    text = json.dumps({"model": evaluation.model, "data": data.dataset, "split": split, "metrics": metrics}, indent=2)
    print(text)
    if evaluation.output_file is not None:
        with open(evaluation.output_file, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    run(main)
