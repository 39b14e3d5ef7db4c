"""Accuracy under shift: the models of the study on test images that were changed, and how often their prediction stays.

    python -m studies.data_efficiency.shifts --name cifar10 --images 5000 --seeds 0 1 --methods conv inv undistilled both_views

There are seven kinds of change in five strengths: four of CIFAR-10-C (arXiv 1903.12261) that need no files of its own, and shift,
scale and rotation. A change is a function of the image, its kind, its strength and the seed: anyone makes the same images. A cell
is one model. Its file in RESULTS_DIR/shifts holds the accuracies; a model with a file is not measured again. The table at the end is of all cells.
"""

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import Dataset
from PIL import ImageEnhance, ImageFilter
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser
from transformers.hf_argparser import HfArg

from hf_ibdistill import predict
from hf_ibdistill.data.classes import label_ids
from hf_ibdistill.evaluation import paired_difference
from hf_ibdistill.images.views import row_key
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.publishing.machine import describe_machine

from .recipes import DATASETS, METHODS
from .runs import Study, study_folders, write


STRENGTHS = (1, 2, 3, 4, 5)
_QUALITIES = (60, 40, 25, 15, 8)


def _noise(image, strength, random):
    pixels = np.asarray(image, dtype=np.float64) + random.normal(0, 10 * strength, (*image.size[::-1], 3))
    return PIL.Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _blur(image, strength, random):
    return image.filter(ImageFilter.GaussianBlur(strength * image.width / 80))


def _contrast(image, strength, random):
    return ImageEnhance.Contrast(image).enhance(1 - 0.17 * strength)


def _jpeg(image, strength, random):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITIES[strength - 1])
    return PIL.Image.open(file).convert("RGB")


def _affine(image, matrix):
    return image.transform(image.size, PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BILINEAR)


def _shift(image, strength, random):
    """Along one side, black where nothing is."""
    distance = round(strength * image.width / 32) * int(random.choice((-1, 1)))
    right, down = (distance, 0) if random.random() < 0.5 else (0, distance)
    return _affine(image, (1, 0, -right, 0, 1, -down))


def _scale(image, strength, random):
    """Smaller or larger, around the middle."""
    step = (1 + 0.1 * strength) ** int(random.choice((-1, 1)))
    middle = np.array(image.size) / 2
    return _affine(image, (step, 0, middle[0] * (1 - step), 0, step, middle[1] * (1 - step)))


def _rotation(image, strength, random):
    return image.rotate(9 * strength * int(random.choice((-1, 1))), PIL.Image.Resampling.BILINEAR)


KINDS = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "jpeg": _jpeg,
    "shift": _shift,
    "scale": _scale,
    "rotation": _rotation,
}


def change(image: PIL.Image.Image, kind: str, strength: int, seed: int = 0) -> PIL.Image.Image:
    """An RGB image, changed.

    Args:
        image: the image.
        kind: one of `KINDS`.
        strength: 1 to 5.
        seed: another seed draws other noise and other directions.
    """
    # Not by the number of the row, so that a part of the images is changed as all are. The direction is the same for all
    # strengths.
    text = f"{seed} {kind} {row_key(image)}"
    random = np.random.default_rng(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
    return KINDS[kind](image, strength, random)


@dataclass
class ShiftArguments:
    name: str = HfArg(help=f"The data set: {', '.join(DATASETS)}.")
    dataset: str | None = HfArg(default=None, help="Its folder; by default its Hub id.")
    images: int = HfArg(default=5000, help="Size of the training subset.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help=", ".join(METHODS))
    variation: str = HfArg(default="base", help="The change of the recipe.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="One model each.")
    num_images: int = HfArg(default=2000, help="Test images, the first ones.")
    results_dir: str | None = HfArg(default=None, help="Folder of the cells; by default results/data_efficiency/NAME.")
    work_dir: str | None = HfArg(default=None, help="Folder of the models; by default outputs/data_efficiency/NAME.")


def measure(models: Sequence[Path], test: Dataset, write_cell: Callable[[Path, dict], None]) -> None:
    """Measure the models in these folders, and write a cell for each.

    Args:
        models: folders of models with their image processors.
        test: a table of test images.
        write_cell: gets the folder and the results of each.
    """
    loaded = [
        (AutoModelForImageClassification.from_pretrained(path), AutoImageProcessor.from_pretrained(path))
        for path in models
    ]
    labels, images = label_ids(test), [image.convert("RGB") for image in test["image"]]

    def classes(pictures):
        # Uncompressed, because a photo takes longer to compress than to classify.
        cells = [_as_bitmap(picture) for picture in pictures]
        table = Dataset.from_dict({"image": cells}).cast_column("image", test.features["image"])
        return [predict(*model, table, batch_size=256)["logits"].argmax(-1) for model in loaded]

    clean = classes(images)
    accuracy, consistency = ([defaultdict(list) for _ in loaded] for _ in range(2))
    for kind in KINDS:
        for strength in STRENGTHS:
            for number, found in enumerate(classes([change(image, kind, strength) for image in images])):
                accuracy[number][kind].append(float((found == labels).mean()))
                consistency[number][kind].append(float((found == clean[number]).mean()))
            print(kind, strength, *(f"{100 * by_kind[kind][-1]:.1f}" for by_kind in accuracy), flush=True)
    for number, path in enumerate(models):
        cell = {"num_images": len(test), "clean": float((clean[number] == labels).mean())}
        cell |= {"accuracy": accuracy[number], "consistency": consistency[number], "machine": describe_machine()}
        write_cell(path, cell)


def _as_bitmap(picture):
    file = io.BytesIO()
    picture.save(file, "BMP")
    return {"bytes": file.getvalue(), "path": None}


def read_shifts(folder: Path, images: int, variation: str = "base") -> dict[str, dict[int, dict]]:
    """Method → seed → cell."""
    cells = defaultdict(dict)
    for method in METHODS:
        for path in sorted(folder.glob(f"{images}_{method}_{variation}_[0-9].json")):
            cells[method][int(path.stem[-1])] = json.loads(path.read_text())
    return dict(cells)


def accuracies_by_strength(cells: dict[str, dict[int, dict]]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Kind of change, and their mean → method → strength → accuracies, one a seed. Strength 0 is the image as it is.

    Args:
        cells: method → seed → cell.
    """

    def of_seed(cell, kinds):
        return [cell["clean"], *np.mean([cell["accuracy"][kind] for kind in kinds], axis=0)]

    groups = {**{kind: [kind] for kind in KINDS}, "mean of the changes": list(KINDS)}
    return {
        title: {
            METHODS[method].title: dict(enumerate(zip(*(of_seed(by_seed[seed], kinds) for seed in sorted(by_seed)))))
            for method, by_seed in cells.items()
        }
        for title, kinds in groups.items()
    }


def shift_table(cells: dict[str, dict[int, dict]], baseline: str = "undistilled") -> str:
    """Accuracy by kind, its mean, and the difference to a baseline over the seeds of both.

    Args:
        cells: method → seed → cell.
        baseline: a method.
    """

    def mean(cell, kinds=tuple(KINDS), part="accuracy"):
        return float(np.mean([cell[part][kind] for kind in kinds]))

    rows = []
    for method, by_seed in cells.items():
        columns = [[cell["clean"] for cell in by_seed.values()]]
        columns += [[mean(cell, [kind]) for cell in by_seed.values()] for kind in KINDS]
        columns += [[mean(cell) for cell in by_seed.values()]]
        columns += [[mean(cell, ["shift"], "consistency") for cell in by_seed.values()]]
        common = sorted({*by_seed} & {*cells.get(baseline, {})})
        difference = "–"
        if method != baseline and common:
            pairs = [[mean(found[seed]) for seed in common] for found in (by_seed, cells[baseline])]
            value, low, high = (100 * number for number in paired_difference(*pairs))
            difference = f"{value:+.2f}" + ("" if np.isnan(low) else f" ({low:+.2f} … {high:+.2f})")
        rows.append(
            [METHODS[method].title, len(by_seed), *(f"{100 * np.mean(values):.1f}" for values in columns), difference]
        )
    head = ["method", "seeds", "as they are", *KINDS, "mean of the changes", "same class after a shift"]
    return markdown_table([*head, f"mean against {METHODS[baseline].title}"], rows)


def main(arguments=None):
    parser = HfArgumentParser(ShiftArguments, description=__doc__.splitlines()[0])
    (args,) = parser.parse_args_into_dataclasses(arguments)
    results_dir, work_dir = study_folders(args.name, args.results_dir, args.work_dir)
    study = Study(args.name, args.dataset or DATASETS[args.name].source, results_dir, work_dir)

    def cell_path(method, seed):
        return results_dir / "shifts" / f"{args.images}_{method}_{args.variation}_{seed}.json"

    models = {
        work_dir / f"{args.images}_{seed}" / f"{method}_{args.variation}": cell_path(method, seed)
        for method in args.methods
        for seed in args.seeds
        if not cell_path(method, seed).exists()
    }
    missing = [str(folder) for folder in models if not folder.is_dir()]
    if missing:
        raise ValueError(f"There are no models in {', '.join(missing)}. Run the grid of the study first.")
    if models:
        test = study.test_rows()
        test = test.select(range(min(args.num_images, len(test))))
        measure(list(models), test, lambda folder, cell: write(models[folder], cell))
    print(shift_table(read_shifts(results_dir / "shifts", args.images, args.variation)))


if __name__ == "__main__":
    main()
