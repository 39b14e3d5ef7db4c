"""Training speed with several views of each decoded photo in a batch, against plain cross-entropy.

    python benchmarks/views_per_image.py
    python benchmarks/views_per_image.py --image_size 32 --photo_size 32 32    # small images

Photos are crops of the two that scikit-learn ships, as JPEG. Their logits are random numbers, written as recording writes
them, for each of `num_views` views (random crops, resized and mirrored). In turn:

    reading         batches of views and logits, without a model
    training        `EnsembleDistillationTrainer`, a student with two teacher tokens
    cross-entropy   transformers' `Trainer` on one view of each image, with the same student

Each run has the same number of views in batches of the same size. Accuracy is measured elsewhere (docs/benchmarks.md).
"""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, load_from_disk
from loading import make_columns
from PIL.Image import fromarray
from sklearn.datasets import load_sample_images
from timing import Case, parse, spread, time_in_turn, write_results
from transformers import PrinterCallback, Trainer, set_seed
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBViTConfig,
    IBViTForImageClassification,
    ViewRecipe,
    build_image_processor,
    class_config,
)
from hf_ibdistill.data.columns import LABEL
from hf_ibdistill.logits.encoding import LogitsEncoding, recorded_teachers
from hf_ibdistill.logits.provenance import attach_record, build_record
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.rows import DistillationCollator, ImageRows


PLAIN = "cross-entropy, transformers' Trainer"


@dataclass
class ViewsPerImageArguments:
    output_file: str = HfArg(default="outputs/benchmark_views_per_image.json", help="Where the results go.")
    views_per_image: list[int] = HfArg(default_factory=lambda: [1, 2, 4], help="Views of an image in a batch.")
    photo_size: list[int] = HfArg(default_factory=lambda: [500, 375], help="Width and height of the files.")
    image_size: int = HfArg(default=224, help="Side of a view.")
    num_photos: int = HfArg(default=512, help="Rows of the table; so many that a trainer does not keep them decoded.")
    epochs: int = HfArg(default=1, help="Epochs of a run.")
    num_views: int = HfArg(default=8, help="Stored views of a photo.")
    num_classes: int = HfArg(default=10, help="Classes, of random labels and logits.")
    hidden_size: int = HfArg(default=64, help="Width of the student.")
    batch_size: int = HfArg(default=32, help="Views in a batch.")
    repetitions: int = HfArg(default=5, help="How often each case is timed.")
    seed: int = HfArg(default=0, help="Seed of everything random.")


def make_table(bench: ViewsPerImageArguments, folder: Path) -> tuple[Dataset, ViewRecipe]:
    rng, photos, cells = np.random.default_rng(bench.seed), load_sample_images().images, []
    width, height = bench.photo_size
    for number in range(bench.num_photos):
        photo = photos[number % len(photos)]
        top, left = (rng.integers(side - size + 1) for side, size in zip(photo.shape, (height, width)))
        file = io.BytesIO()
        fromarray(photo[top : top + height, left : left + width]).save(file, "JPEG", quality=90)
        cells.append({"bytes": file.getvalue(), "path": None})
    names = [str(number) for number in range(bench.num_classes)]
    columns = make_columns(bench.num_photos, bench.num_classes, LogitsEncoding(), bench.num_views, bench.seed)
    table = Dataset.from_dict({"image": cells}, features=Features({"image": Image()}))
    table = table.add_column(LABEL, rng.integers(bench.num_classes, size=len(table)).tolist())
    for name in columns.column_names:
        table = table.add_column(name, columns[name][:], feature=columns.features[name])
    table.cast_column(LABEL, ClassLabel(names=names)).save_to_disk(folder)
    table = load_from_disk(folder)
    recipe = ViewRecipe(
        num_views=bench.num_views, image_size=bench.image_size, crop="resized", horizontal_flip=0.5, seed=bench.seed
    )
    described = {
        "label_names": names,
        "encoding": LogitsEncoding().to_dict(),
        "weights_sha256": "0" * 64,
        "source": "random",
    }
    teachers = [{"name": name, **described} for name in recorded_teachers(table)]
    attach_record(table, build_record(teachers, {"num_rows": len(table)}, recipe))
    return table, recipe


def make_cases(table: Dataset, recipe: ViewRecipe, bench: ViewsPerImageArguments, work: Path) -> dict[str, Case]:
    processor, names = build_image_processor(table, image_size=bench.image_size), recorded_teachers(table)
    config = IBViTConfig(
        teacher_names=names, image_size=bench.image_size, patch_size=bench.image_size // 8, hidden_size=bench.hidden_size,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * bench.hidden_size, patch_embedding="linear",
        **class_config(table),
    )  # fmt: skip
    set_seed(bench.seed)

    def arguments(views_per_image):
        return DistillationArguments(
            str(work), num_train_epochs=bench.epochs, per_device_train_batch_size=bench.batch_size, views_per_image=views_per_image,
            dataloader_drop_last=True, remove_unused_columns=False, eval_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, seed=bench.seed,
        )  # fmt: skip

    trainers = {
        views: EnsembleDistillationTrainer(
            IBViTForImageClassification(config), arguments(views), train_dataset=table, processing_class=processor
        )
        for views in bench.views_per_image
    }
    plain = Trainer(
        IBViTForImageClassification(config), arguments(1), data_collator=DistillationCollator(processor),
        train_dataset=ImageRows(table, [LABEL], views=recipe),
    )  # fmt: skip
    units = bench.epochs * (len(table) // bench.batch_size * bench.batch_size)

    def read(trainer):
        for epoch in range(bench.epochs):
            trainer.train_dataset.start_epoch(epoch)
            for batch in trainer.get_train_dataloader():
                assert len(batch["teacher_logits"]) == bench.batch_size

    cases = {f"reading, {views}": Case("reading", lambda rng, t=t: read(t), units) for views, t in trainers.items()}
    for name, trainer in ({f"training, {views}": t for views, t in trainers.items()} | {PLAIN: plain}).items():
        trainer.remove_callback(PrinterCallback)
        cases[name] = Case(name, lambda rng, trainer=trainer: trainer.train(), units)
    return cases


def main():
    bench = parse(ViewsPerImageArguments, __doc__)
    with tempfile.TemporaryDirectory() as name:
        table, recipe = make_table(bench, Path(name, "table"))
        cases = make_cases(table, recipe, bench, Path(name, "work"))
        time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
    rows = []
    for name, case in cases.items():
        baseline = cases[f"reading, {bench.views_per_image[0]}" if name.startswith("reading") else PLAIN]
        ratios = case.ratios(baseline)
        rows.append([name, spread(case.rate, 1), *(spread(ratios[clock], 2) for clock in ("wall", "cpu"))])
    write_results(bench, cases={name: case.measured for name, case in cases.items()})
    print(markdown_table(["case, views of an image", "views/s", "× its baseline", "by processor time"], rows))


if __name__ == "__main__":
    main()
