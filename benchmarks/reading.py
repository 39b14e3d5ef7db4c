"""Speed of reading small images for training: decoded in every epoch, kept in memory, and a bare loop of torchvision.

    python benchmarks/reading.py
    python benchmarks/reading.py --side 8 --format PNG
    python benchmarks/reading.py --rand_augment

Images are crops of the two photos that scikit-learn ships. In turn, batches of views (shifted and mirrored) as a model gets them:

    kept         rows of a trainer, whose decoded images stay in memory from epoch to epoch
    decoded      the same rows, decoded in every epoch
    torchvision  Pillow, `RandomCrop` with padding, `RandomHorizontalFlip`, scaled and normalized; one image after another

With --rand_augment, the views have one color and one geometric operation more, and those of torchvision its `RandAugment` of two.
"""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Features, Image, load_from_disk
from sklearn.datasets import load_sample_images
from timing import Case, parse, spread, time_in_turn, write_results
from torchvision.transforms import v2
from transformers.hf_argparser import HfArg

from hf_ibdistill import ViewRecipe, build_image_processor
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.rows import DistillationCollator, ImageRows


@dataclass
class ReadingArguments:
    output_file: str = HfArg(default="outputs/benchmark_reading.json", help="Where the results go.")
    side: int = HfArg(default=32, help="Width and height of the images, in pixels.")
    format: str = HfArg(default="JPEG", help="Of the files: JPEG, PNG, …")
    rand_augment: bool = HfArg(default=False, help="Change colors and geometry too.")
    num_images: int = HfArg(default=2048, help="Rows of the table.")
    batch_size: int = HfArg(default=64, help="Images in a batch.")
    repetitions: int = HfArg(default=7, help="How often each case is timed.")
    seed: int = HfArg(default=0, help="Seed of everything random.")


def make_files(bench: ReadingArguments) -> list[bytes]:
    rng, photos, files = np.random.default_rng(bench.seed), load_sample_images().images, []
    for number in range(bench.num_images):
        photo, file = photos[number % len(photos)], io.BytesIO()
        top, left = (rng.integers(side - bench.side + 1) for side in photo.shape[:2])
        PIL.Image.fromarray(photo[top : top + bench.side, left : left + bench.side]).save(file, bench.format)
        files.append(file.getvalue())
    return files


def make_cases(table: Dataset, files: list[bytes], bench: ReadingArguments) -> dict[str, Case]:
    operations = {"photometric_ops": 1, "geometric_ops": 1} if bench.rand_augment else {}
    recipe = ViewRecipe(num_views=1000, padding=0.125, horizontal_flip=0.5, seed=bench.seed, **operations)
    collate, epoch = DistillationCollator(build_image_processor(table)), iter(range(1000))
    augment = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(bench.side, padding=round(0.125 * bench.side)),
            v2.RandomHorizontalFlip(),
            *([v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)] if bench.rand_augment else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )

    def batches(rng):
        order = rng.permutation(len(files)).tolist()
        return (order[start : start + bench.batch_size] for start in range(0, len(order), bench.batch_size))

    def read(rng, rows):
        rows.start_epoch(next(epoch))
        return [collate(rows.__getitems__(batch))["pixel_values"].shape for batch in batches(rng)]

    def read_plainly(rng):
        for batch in batches(rng):
            torch.stack([augment(PIL.Image.open(io.BytesIO(files[i])).convert("RGB")) for i in batch])

    rows = {name: ImageRows(table, views=recipe, keeps_images=name == "kept") for name in ("kept", "decoded")}
    cases = {name: Case(name, lambda rng, r=r: read(rng, r), len(files)) for name, r in rows.items()}
    return cases | {"torchvision": Case("torchvision", read_plainly, len(files))}


def main():
    bench = parse(ReadingArguments, __doc__)
    files = make_files(bench)
    with tempfile.TemporaryDirectory() as name:
        cells = {"image": [{"bytes": file, "path": None} for file in files]}
        Dataset.from_dict(cells, features=Features({"image": Image()})).save_to_disk(Path(name, "table"))
        cases = make_cases(load_from_disk(Path(name, "table")), files, bench)
        time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
    rows = []
    for name, case in cases.items():
        ratios = case.ratios(cases["torchvision"])
        rows.append([name, spread(case.rate, 1), *(spread(ratios[clock], 2) for clock in ("wall", "cpu"))])
    write_results(bench, cases={name: case.measured for name, case in cases.items()})
    print(markdown_table(["case", "images/s", "× torchvision", "by processor time"], rows))


if __name__ == "__main__":
    main()
