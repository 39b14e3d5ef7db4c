"""The size of stored logits on disk, and the loss of top-k and packed logits, for a trained teacher of 1,000 classes.

    python benchmarks/storage.py
    python benchmarks/storage.py --rows 1000 --teacher_steps 300
    python benchmarks/storage.py --rows 1000 --teacher_steps 300 --student_steps 1000 --top_k 10
    PYTHONPATH=. python benchmarks/storage.py --photos photos/ --rows 250 --num_views 10

The images are three of scikit-learn's handwritten digits side by side (8×24 pixels), the classes the numbers 000 to 999.
A convolution teacher is trained on random triples of the training digits; triples of the test digits are recorded.
With `--photos`, EfficientNet-Lite0 predicts the 1,000 classes of ImageNet for random crops of a data set's test images.
With `--student_steps`, students learn from four fifths of the recorded rows and are measured on the others.

Bytes are those of the folder that `save_to_disk` writes of the recorded table without its images and labels, including the
row key and the provenance, divided by rows × views. The provenance names every class and so weighs the same for one row
as for a million: "each further view" is the difference between the folders of all rows and of half of them.

p is the softmax, at a temperature, of the logits in float32. Three ways to rebuild it from the k stored classes:

    ours          the decoded columns: the rest of the mass is spread evenly over the other classes
    dropped       p of the stored classes, zero elsewhere (its sum is below 1)
    renormalized  the same divided by its sum: what a student trained on the dropped one converges to

The last two are computed from p itself, without rounding and with the exact mass at every temperature, which is the best
that storing could give them. Of each, means over rows and views, in nats:

    KL(p‖q) = Σ p log(p/q)              the direction of the distillation loss; infinite if q is zero and p is not
    KL(q‖p) = Σ q log(q/p) − Σ q + Σ p  finite for all; the last two terms cancel unless q was dropped
    TV      = ½ Σ |p − q|               total variation
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from scipy.special import log_softmax
from timing import check, check_table, parse, write_results
from transformers import ViTImageProcessor, set_seed
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    ViewRecipe,
    class_config,
    evaluate_model,
    load_image_dataset,
    record_teacher_logits,
)
from hf_ibdistill.logits.encoding import column_name, decode
from hf_ibdistill.publishing.cards import markdown_table


TEACHER = "conv"
WAYS = ("ours", "dropped", "renormalized")
NUM_CLASSES = 1000
ALLOWED_BYTES = 42  # at k = 10


@dataclass
class StorageArguments:
    output_file: str = HfArg(default="outputs/benchmark_storage.json", help="Where the results go.")
    rows: int = HfArg(default=10_000, help="Held-out images to record.")
    num_views: int = HfArg(default=10, help="Views of each.")
    top_k: list[int] = HfArg(default_factory=lambda: [5, 10, 20, 50], help="The k to compare.")
    packed: list[int] = HfArg(default_factory=lambda: [16, 26, 32], help="The k of packed logits to compare.")
    photos: str | None = HfArg(default=None, help="Photos for EfficientNet-Lite0, instead of the digits.")
    photo_size: int = HfArg(default=128, help="Side of a view of a photo, in pixels.")
    student_steps: int = HfArg(default=0, help="Train students of each encoding for this many steps.")
    student_seeds: list[int] = HfArg(default_factory=lambda: [0, 1], help="One student each.")
    temperatures: list[float] = HfArg(
        default_factory=lambda: [1.0, 2.0, 4.0], help="Temperatures of the distributions."
    )
    teacher_steps: int = HfArg(default=1000, help="Training steps of the teacher.")
    teacher_images: int = HfArg(default=25600, help="Different images to train it on.")
    batch_size: int = HfArg(default=128, help="Images a step.")
    learning_rate: float = HfArg(default=1e-2, help="Peak learning rate of the teacher.")
    seed: int = HfArg(default=0, help="Seed of the images, the teacher's weights and the views.")


def side_by_side(digits: Dataset, count: int, seed: int) -> Dataset:
    """`count` random triples of digits as images of three digits and numbers of three places."""
    pixels = np.stack([np.asarray(image.convert("L")) for image in digits["image"]])
    labels = np.array(digits["label"])
    triples = np.random.default_rng(seed).integers(len(digits), size=(count, 3))
    features = Features({"image": Image(), "label": ClassLabel(names=[f"{i:03d}" for i in range(NUM_CLASSES)])})
    images = np.concatenate([pixels[triples[:, place]] for place in range(3)], axis=2)
    return Dataset.from_dict({"image": list(images), "label": labels[triples] @ (100, 10, 1)}, features)


def train_teacher(table: Dataset, processor: ViTImageProcessor, bench: StorageArguments, folder: Path):
    set_seed(bench.seed)
    model = IBResNetForImageClassification(IBResNetConfig.from_preset("convolution-small", **class_config(table)))
    epochs = -(-bench.teacher_steps * bench.batch_size // bench.teacher_images)
    args = ImageTrainingArguments(
        str(folder), seed=bench.seed, max_steps=bench.teacher_steps, learning_rate=bench.learning_rate,
        per_device_train_batch_size=bench.batch_size, eval_strategy="no", logging_strategy="steps",
        logging_steps=max(1, bench.teacher_steps // 10),
    )  # fmt: skip
    # Of another seed than the recorded ones. Without views, the teacher would fail on shifted images.
    views = ViewRecipe(num_views=epochs, seed=bench.seed + 1)
    trainer = ImageClassificationTrainer(model, args, train_dataset=table, processing_class=processor, views=views)
    trainer.train()
    return trainer.model


def saved_bytes(table: Dataset, folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    table.save_to_disk(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_bytes(table: Dataset, num_views: int, folder: Path) -> dict:
    table = table.remove_columns([name for name in ("image", "label") if name in table.column_names])
    half = table.select(range(len(table) // 2))
    total, total_half = saved_bytes(table, folder), saved_bytes(half, folder)
    return {
        "folder_bytes": total,
        "bytes_per_view": total / (len(table) * num_views),
        "bytes_per_further_view": (total - total_half) / ((len(table) - len(half)) * num_views),
    }


def distances(dense: np.ndarray, decoded: np.ndarray, top_k: int | None, temperature: float) -> dict[str, float]:
    """The distances of the rebuilt distributions from the dense one; (N, C) logits, means over the rows. With `top_k`, also
    those of dropping all other logits."""
    log_p, log_q = (log_softmax(x.astype(np.float64) / temperature, axis=-1) for x in (dense, decoded))
    p, q = np.exp(log_p), np.exp(log_q)
    result = {
        "kl_p_ours": (p * (log_p - log_q)).sum(-1).mean(),
        "kl_ours_p": (q * (log_q - log_p)).sum(-1).mean(),
        "tv_ours": 0.5 * np.abs(p - q).sum(-1).mean(),
    }
    if top_k is not None:
        tail = p.copy()
        np.put_along_axis(tail, np.argpartition(-dense, top_k - 1, axis=-1)[:, :top_k], 0, axis=-1)
        tail = tail.sum(-1)
        # With q = p on the stored classes and 0 elsewhere, the formulas above come down to the tail's mass.
        result |= {
            "tail_mass": tail.mean(),
            "kl_dropped_p": tail.mean(),
            "kl_renormalized_p": -np.log1p(-tail).mean(),
            "tv_dropped": 0.5 * tail.mean(),
            "tv_renormalized": tail.mean(),
        }
    return {name: float(value) for name, value in result.items()}


def measure_distances(truth: Dataset, table: Dataset, top_k: int | None, bench: StorageArguments) -> dict:
    """temperature → distances, means over rows and views."""
    columns = [dataset.with_format("arrow")[:][column_name(TEACHER)].combine_chunks() for dataset in (truth, table)]
    results = {temperature: [] for temperature in bench.temperatures}
    for view in range(bench.num_views):
        for temperature in bench.temperatures:
            dense, decoded = (decode(column, NUM_CLASSES, view, temperature) for column in columns)
            results[temperature].append(distances(dense, decoded, top_k, temperature))
    return {t: {name: float(np.mean([r[name] for r in of_t])) for name in of_t[0]} for t, of_t in results.items()}


def report(bench: StorageArguments, results: dict) -> str:
    header = ["encoding", "bytes a view and teacher", "each further view"]
    sizes = [
        [name, f"{entry['bytes_per_view']:.1f}", f"{entry['bytes_per_further_view']:.1f}"]
        for name, entry in results["encodings"].items()
    ]
    losses = []
    for temperature in bench.temperatures:
        for name, entry in results["encodings"].items():
            values = entry.get("distances", {}).get(temperature)
            if values is not None:
                inf = "∞" if "tail_mass" in values else "–"
                keys = [*(f"kl_{way}_p" for way in WAYS), *(f"tv_{way}" for way in WAYS)]
                cells = [f"{values[key]:.2e}" if key in values else "–" for key in keys]
                losses.append([f"{temperature:g}", name, f"{values['kl_p_ours']:.2e}", inf, *cells])
    columns = ["temperature", "encoding", "KL(p‖ours)", "KL(p‖dropped), KL(p‖renormalized)"]
    columns += [*(f"KL({way}‖p)" for way in WAYS), *(f"TV {way}" for way in WAYS)]
    teacher = results["teacher"]
    right = f"; the teacher is right on {100 * teacher['accuracy']:.1f} % of them" if "accuracy" in teacher else ""
    students = [
        [name, ", ".join(f"{100 * accuracy:.2f}" for accuracy in entry["student_accuracies"])]
        for name, entry in results["encodings"].items()
        if "student_accuracies" in entry
    ]
    students = f"{markdown_table(['encoding', 'accuracy of students (%)'], students)}\n\n" if students else ""
    return (
        f"{bench.rows} held-out images × {bench.num_views} views, {NUM_CLASSES} classes{right}."
        f"\n\n{markdown_table(header, sizes)}\n\n{markdown_table(columns, losses)}\n\n{students}"
        f"{check_table(results['checks'])}\n"
    )


def check_all(encodings: dict) -> list[dict]:
    entry, packed = encodings.get("top-10"), encodings.get("packed-26")
    checks = []
    if entry is not None:
        for name, key in {"whole folder": "bytes_per_view", "each further view": "bytes_per_further_view"}.items():
            what = f"top-10: at most {ALLOWED_BYTES} bytes a view and teacher ({name})"
            checks.append(check(what, entry[key], entry[key] <= ALLOWED_BYTES))
    for temperature, values in entry["distances"].items() if entry is not None else ():
        forward, backward = values["kl_p_ours"], values["kl_ours_p"]
        what = f"top-10, temperature {temperature:g}: KL"
        checks.append(check(f"{what}(p‖ours) finite, unlike KL(p‖dropped)", forward, np.isfinite(forward)))
        checks.append(check(f"{what}(ours‖p) at most KL(dropped‖p)", backward, backward <= values["kl_dropped_p"]))
        for key, name in {"kl_p_ours": "KL(p‖ours)", "kl_ours_p": "KL(ours‖p)"}.items() if packed else ():
            ratio = packed["distances"][temperature][key] / values[key]
            checks.append(check(f"packed-26, temperature {temperature:g}: {name} / that of top-10", ratio, ratio < 1))
    return checks


def open_photos(bench: StorageArguments, work: Path):
    """Photos, EfficientNet-Lite0 in a folder with its image processor, and the recipe of random crops."""
    from studies.pretrained import save_efficientnet

    photos = load_image_dataset(bench.photos, seed=bench.seed)["test"].remove_columns("label")
    views = ViewRecipe(
        num_views=bench.num_views, crop="resized", scale=(0.35, 1.0), horizontal_flip=0.5,
        image_size=bench.photo_size, seed=bench.seed,
    )  # fmt: skip
    return photos.select(range(bench.rows)), str(save_efficientnet(work / "teacher", bench.photo_size)), views


def student_accuracies(table: Dataset, bench: StorageArguments, work: Path) -> list[float]:
    """Test accuracy of a student for each seed, which learns from the logits of four fifths of the rows alone."""
    last = len(table) * 4 // 5
    processor = ViTImageProcessor(size={"height": 24, "width": 24})
    accuracies = []
    for seed in bench.student_seeds:
        set_seed(seed)
        config = IBViTConfig(
            image_size=24, patch_size=4, patch_embedding="convolution", hidden_size=96, num_hidden_layers=3,
            num_attention_heads=4, intermediate_size=192, teacher_names=(TEACHER,), **class_config(table),
        )  # fmt: skip
        args = DistillationArguments(
            str(work / "student"), seed=seed, max_steps=bench.student_steps, learning_rate=2e-3,
            per_device_train_batch_size=bench.batch_size, eval_strategy="no", logging_steps=100, label_weight=0.0,
            temperature=[2.0],
        )  # fmt: skip
        student = IBViTForImageClassification(config)
        trainer = EnsembleDistillationTrainer(
            student, args, train_dataset=table.select(range(last)), processing_class=processor
        )
        trainer.train()
        held_out = table.select(range(last, len(table)))
        accuracies.append(evaluate_model(student, processor, held_out.remove_columns(f"{TEACHER}_logits"))["accuracy"])
    return accuracies


def main():
    bench = parse(StorageArguments, __doc__)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work, metrics = Path(folder), {}
        if bench.photos is not None:
            rows, teacher, views = open_photos(bench, work)
        else:
            splits = load_image_dataset("digits", seed=bench.seed)
            train = side_by_side(splits["train"], bench.teacher_images, bench.seed)
            rows = side_by_side(splits["test"], bench.rows, bench.seed)
            processor = ViTImageProcessor(size={"height": 8, "width": 24})
            views = ViewRecipe(num_views=bench.num_views, seed=bench.seed)
            teacher = train_teacher(train, processor, bench, work / "teacher"), processor
            metrics = evaluate_model(*teacher, rows)
        train_seconds = time.perf_counter() - begin

        def record(name, **encoding):
            return record_teacher_logits(rows, {TEACHER: teacher}, output_dir=work / name, views=views, **encoding)

        truth = record("dense float32", dtype="float32")
        encodings = {"dense float32": measure_bytes(truth, bench.num_views, work / "saved")}
        ways = {"dense float16": {}, **{f"top-{k}": {"top_k": k} for k in bench.top_k}}
        ways |= {f"packed-{k}": {"top_k": k, "dtype": "packed"} for k in bench.packed}
        for name, encoding in ways.items():
            table = record(name, **encoding)
            # The classes of packed logits are not the largest of a view, so there is no way to drop the others.
            dropped = None if encoding.get("dtype") else encoding.get("top_k")
            encodings[name] = {
                **measure_bytes(table, bench.num_views, work / "saved"),
                "distances": measure_distances(truth, table, dropped, bench),
            }
            if bench.student_steps:
                encodings[name]["student_accuracies"] = student_accuracies(table, bench, work)
    results = {"teacher": {**metrics, "train_seconds": train_seconds}, "encodings": encodings}
    results |= {"checks": check_all(encodings), "seconds": time.perf_counter() - begin}
    write_results(bench, **results)
    print(f"\n{report(bench, results)}")


if __name__ == "__main__":
    main()
