"""Print the classes that a model predicts for images.

hf-ibdistill predict --model outputs/student photo.jpg
hf-ibdistill predict --model user/student photos/ --top_k 3 --csv labels.csv

The second writes a table and prints how many images each class has. Folders are searched at any
depth. Files that cannot be read are named and left out.
"""

import csv
import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoImageProcessor
from transformers.hf_argparser import HfArg

from ..checks import check_numbers
from ..data.classes import config_class_names
from ..data.folders import find_images
from ..files import user_path, write_text
from ..images.decoding import decode_image
from ..images.preprocessing import pixel_values
from ..progress import Progress
from ..teachers import available_device, load_classifier
from .arguments import parse, run
from .display import show_results


logger = logging.getLogger(__name__)

# Classes whose images are counted on a line of their own.
_COUNTED = 10


@dataclass
class PredictionArguments:
    _argument_group_name = "prediction"

    model: str = HfArg(help="Folder or Hub id of the model.")
    images: list[str] = HfArg(default_factory=list, help="Files and folders of images; the flag may be left out.")
    top_k: int = HfArg(default=1, help="Classes of each image, the most probable first.")
    csv: str | None = HfArg(default=None, help="Write the predictions to this file instead of printing them.")
    batch_size: int = HfArg(default=64, help="Images in a batch.")
    trust_remote_code: bool = HfArg(default=False, help="Run the code of the model repository.")


def list_files(sources: list[str]) -> list[str]:
    """The files of images among the sources and in their folders; `ValueError` if there are none."""
    files = []
    for source in sources:
        path = Path(user_path(source, "images"))
        if not path.exists():
            raise ValueError(f"images={source} does not exist. Give files or folders of images.")
        found = find_images(path)[0] if path.is_dir() else [str(path)]
        if not found:
            raise ValueError(f"images={source} holds no image that Pillow opens. Give another folder.")
        files += found
    if not files:
        raise ValueError("There is nothing to predict. Give files or folders of images.")
    return files


def predict_files(
    model, processor, files: list[str], batch_size: int, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """(file, probabilities (C,)) of each file that can be read."""
    device = available_device()
    model = model.to(device).eval()
    for start in range(0, len(files), batch_size):
        readable = []

        def images(batch=files[start : start + batch_size], readable=readable):
            for file in batch:
                try:
                    image = decode_image({"bytes": None, "path": file})
                except ValueError as error:
                    logger.warning("%s", error)
                else:
                    readable.append(file)
                    yield image

        values = pixel_values(images(), {"": processor})
        if readable:
            with torch.inference_mode():
                # Logits come first, also in the tuples of a model with `return_dict=False`.
                logits = model(pixel_values=values[""].to(device, model.dtype))[0]
            yield from zip(readable, logits.float().softmax(-1).cpu())
        progress.update(min(batch_size, len(files) - start))


def write_csv(path: Path, rows: list[list[str]], top_k: int) -> None:
    """Write file, class and probability, and the next classes in columns with a number."""
    numbers = ["", *(f"_{number}" for number in range(2, top_k + 1))]
    header = ["file", *(f"{column}{number}" for number in numbers for column in ("class", "probability"))]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def main(arguments):
    (prediction,) = parse("predict", __doc__, arguments, PredictionArguments, bare="images")
    files = list_files(prediction.images)
    check_numbers(1, whole=True, batch_size=prediction.batch_size)
    trust = {"trust_remote_code": prediction.trust_remote_code}
    model = load_classifier(prediction.model, **trust)
    names = config_class_names(model.config)
    check_numbers(1, len(names), whole=True, top_k=prediction.top_k)
    processor = AutoImageProcessor.from_pretrained(prediction.model, **trust)
    prints = prediction.csv is None
    # Lines that scroll by are progress enough.
    progress = Progress("predict", len(files), is_shown=not (prints and sys.stdout.isatty()))
    rows, counts = [], Counter()
    with progress:
        for file, probabilities in predict_files(model, processor, files, prediction.batch_size, progress):
            best = [(names[i], p) for p, i in zip(*(part.tolist() for part in probabilities.topk(prediction.top_k)))]
            counts[best[0][0]] += 1
            if prints:
                print(f"{file}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in best)}")
            else:
                rows.append([file, *(value for name, p in best for value in (name, f"{p:.4f}"))])
    if not counts:
        raise ValueError(f"None of {len(files)} files can be read as an image. Give image files.")
    if not prints:
        write_csv(user_path(prediction.csv, "csv"), rows, prediction.top_k)
        largest = counts.most_common(_COUNTED)
        if len(counts) > _COUNTED:
            others = counts.total() - sum(count for _, count in largest)
            largest.append((f"{len(counts) - _COUNTED:,} other classes", others))
        header = [prediction.csv, f"{len(rows):,} images"]
        show_results({"csv": prediction.csv, "images": len(rows), "classes": counts}, header, largest)


if __name__ == "__main__":
    run("predict", main)
