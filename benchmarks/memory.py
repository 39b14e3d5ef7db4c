"""Peak memory of recording, training (mapped and streamed) and attaching: it should not grow with the rows of a dataset, nor with a batch of photos.

    python benchmarks/memory.py --num_rows 10000 100000 --megapixels 1 12 50

Every measurement is a process of its own. The images are the bundled digits, repeated, and then photographs of each size, two
views of each, all in one batch. The teacher is untrained, because only memory is measured. Two peaks are reported:

    anonymous  what the process allocated, including its libraries; Linux only, looked up every 20 ms
    resident   the same and the mapped files in memory: the table, which the system drops if it needs the room, and the
               code of the libraries
"""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets, load_from_disk
from PIL.Image import fromarray
from sklearn.datasets import load_sample_images
from timing import parse, peak_memory, write_results
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ViewRecipe,
    attach_teacher_logits,
    build_image_processor,
    load_image_dataset,
    record_teacher_logits,
)
from hf_ibdistill.logits.provenance import attach_record, only_record
from hf_ibdistill.publishing.cards import markdown_table


@dataclass
class MemoryArguments:
    num_rows: list[int] = HfArg(default_factory=lambda: [10_000, 100_000], help="Sizes to measure.")
    megapixels: list[float] = HfArg(default_factory=lambda: [1, 12, 50], help="Sizes of photographs to measure.")
    num_photos: int = HfArg(default=12, help="Photographs in a batch.")
    num_classes: int = HfArg(default=1000, help="Classes of the teacher, so width of the columns.")
    top_k: int | None = HfArg(default=None, help="Store the k largest logits; by default all.")
    output_file: str = HfArg(default="outputs/benchmark_memory.json", help="Where the results go.")


def make_images(bench: MemoryArguments, num_rows: int, folder: Path) -> None:
    names = [str(i) for i in range(bench.num_classes)]
    digits = load_image_dataset("digits")["train"].cast_column("label", ClassLabel(names=names))
    repeated = concatenate_datasets([digits] * -(-num_rows // len(digits))).select(range(num_rows))
    repeated.save_to_disk(folder / "images")


def make_photos(bench: MemoryArguments, megapixels: float, folder: Path) -> None:
    """A photograph of scikit-learn, enlarged, in files that differ."""
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    photo = fromarray(load_sample_images().images[0]).resize((round(1.5 * height), height))
    cells = []
    for quality in range(bench.num_photos):
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=70 + quality)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    names = [str(i) for i in range(bench.num_classes)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": cells, "label": list(range(bench.num_photos))}
    Dataset.from_dict(rows, features=features).save_to_disk(folder / "images")


def record(bench: MemoryArguments, folder: Path, views: ViewRecipe | None = None) -> None:
    images = load_from_disk(folder / "images")
    config = IBResNetConfig.from_preset(
        "convolution-small", depths=(1, 1, 1), hidden_sizes=(16, 16, 16), num_labels=bench.num_classes
    )
    # Of photographs, the model is to be a small part of the memory.
    teachers = {"conv": (IBResNetForImageClassification(config), build_image_processor(images, image_size=8))}
    record_teacher_logits(
        images, teachers, output_dir=folder / "table", views=views, top_k=bench.top_k, batch_size=256
    )


def record_views(bench: MemoryArguments, folder: Path) -> None:
    record(bench, folder, ViewRecipe(num_views=2))


def attach(bench: MemoryArguments, folder: Path) -> None:
    table = load_from_disk(folder / "table").select_columns(["row_key", "conv_logits"])
    attach_teacher_logits(load_from_disk(folder / "images"), table)


def train(bench: MemoryArguments, folder: Path, is_streamed: bool = False) -> None:
    table = load_from_disk(folder / "table")
    config = IBViTConfig(
        teacher_names=("conv",), image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, num_labels=bench.num_classes,
    )  # fmt: skip
    length = {"max_steps": 1, "shuffle_buffer_size": 1000} if is_streamed else {"num_train_epochs": 1}
    args = DistillationArguments(
        str(folder / "student"), **length, per_device_train_batch_size=256, eval_strategy="no", use_cpu=True
    )
    student, processor = IBViTForImageClassification(config), build_image_processor(table, image_size=8)
    if is_streamed:
        # Its rows come from the mapped file, which counts as such, and not from a download.
        stream = table.to_iterable_dataset()
        attach_record(stream, only_record(table))
        table = stream
    EnsembleDistillationTrainer(student, args, train_dataset=table, processing_class=processor).train()


def train_streamed(bench: MemoryArguments, folder: Path) -> None:
    train(bench, folder, is_streamed=True)


def measure(bench: MemoryArguments, make, size: float, steps) -> tuple[dict, list]:
    """The peaks of these steps on images of one kind, for JSON and as cells of a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(bench, size, folder)
        peaks = {step.__name__: peak_memory(step, bench, folder) for step in steps}
        table_bytes = sum(path.stat().st_size for path in (folder / "table").glob("*.arrow"))
    measured = [peaks[step.__name__].get(kind) for kind in ("anonymous", "resident") for step in steps]
    cells = [size, *("–" if size is None else round(size / 1e6) for size in (table_bytes, *measured))]
    return {"table_bytes": table_bytes, "peak_bytes": peaks}, cells


def main():
    bench, results = parse(MemoryArguments, __doc__), {}
    for what, make, sizes, steps in (
        ("rows", make_images, bench.num_rows, (record, train)),
        ("megapixels", make_photos, bench.megapixels, (record_views, train, train_streamed, attach)),
    ):
        measured = [measure(bench, make, size, steps) for size in sizes]
        results[what] = [{what: size, **entry} for size, (entry, _) in zip(sizes, measured)]
        header = [f"{kind} peak, {step.__name__} (MB)" for kind in ("anonymous", "resident") for step in steps]
        print(markdown_table([what, "table (MB)", *header], [cells for _, cells in measured]))
    write_results(bench, **results)


if __name__ == "__main__":
    main()
