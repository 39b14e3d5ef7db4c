"""Training speed on stored logits, against plain cross-entropy, online teachers, a bare PyTorch loop and timm.

    python benchmarks/training.py
    python benchmarks/training.py --patch_embedding convolution --num_rows 1000 --steps 60
    pip install timm && python benchmarks/training.py    # with the comparison

A convolution and an involution teacher are trained on scikit-learn's handwritten digits, enlarged, and their logits
recorded. Every case then trains the same vision transformer with the same arguments and precision, on a table on disk
read by `ImageRows`, torch's `DataLoader` and `DistillationCollator`:

    cross-entropy   transformers' own `Trainer` and the `loss` of the model; with views, always the first of each image
    ours            `EnsembleDistillationTrainer` on dense columns, top-k columns, or stored views
    ours, online    the same with both teachers run in every step, on images as they are or on views
    bare loop       only what dense columns need: autocast, loss, gradient clipping, fused AdamW, scheduler
    timm, online    `TokenDistillationTask` with the convolution teacher, in the bare loop. It does less than ours online:
                    one teacher, so one token and one head less. Its student is timm's distilled ViT of the same width,
                    depth, heads and patch embedding.

The whole of `train()` is timed, without logging, evaluation and saving. Ratios differ by some hundredths from run to run:
ask for more repetitions if one is near its limit. The main cause is glibc, which returns memory after one step and fetches
it for the next, sometimes more and sometimes less. freed_memory.py measures this.

Training the teachers, which online distillation needs as well, and recording are timed once. Recording pays after
(its seconds) / (seconds of an epoch online − seconds of an epoch stored) epochs, over all students trained on the table.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from PIL.Image import Resampling
from timing import Case, parse, spread, time_in_turn, write_results
from torch import nn
from transformers import PrinterCallback, Trainer, get_scheduler, set_seed
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ViewRecipe,
    build_image_processor,
    class_config,
    ensemble_distillation_loss,
    load_image_dataset,
    record_teacher_logits,
)
from hf_ibdistill.logits.encoding import column_name
from hf_ibdistill.models.modeling_ibvit import IBViTStem
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.rows import DistillationCollator, ImageRows
from hf_ibdistill.students import default_patch_size


PRESETS = {"conv": "convolution-small", "inv": "involution-small"}
PLAIN, PLAIN_VIEWS = "cross-entropy, transformers' Trainer", "cross-entropy, transformers' Trainer, views"
DENSE, TOP_K, VIEWS = "ours, dense columns", "ours, top-k columns", "ours, stored views"
ONLINE, ONLINE_VIEWS = "ours, online, two teachers", "ours, online, two teachers, views"
BARE, TIMM = "bare loop, dense columns", "timm, online, one teacher"
# Case, baseline, and the least ratio of their images a second.
REQUIREMENTS = [
    (DENSE, PLAIN, 0.97),
    (TOP_K, PLAIN, 0.97),
    (VIEWS, PLAIN_VIEWS, 0.97),
    (DENSE, BARE, 0.9),
    (DENSE, ONLINE, 1),
    (VIEWS, ONLINE_VIEWS, 1),
    (DENSE, TIMM, 1),
]


@dataclass
class TrainingBenchmarkArguments:
    output_file: str = HfArg(default="outputs/benchmark_training.json", help="Where the results go.")
    image_size: int = HfArg(default=28, help="Side that the digits are enlarged to.")
    patch_embedding: str = HfArg(default="linear", help='The students\': "linear" or "convolution".')
    num_rows: int = HfArg(default=320, help="Images in the tables.")
    num_views: int = HfArg(default=4, help="Views of each image in the table of views.")
    top_k: int = HfArg(default=5, help="Stored logits of the top-k columns.")
    batch_size: int = HfArg(default=64, help="Images a step.")
    steps: int = HfArg(default=40, help="Steps of each case in a repetition.")
    repetitions: int = HfArg(default=5, help="How often each case is timed.")
    teacher_epochs: int = HfArg(default=10, help="Epochs of each teacher.")
    bf16: bool | None = HfArg(default=None, help="Mixed precision; by default the Trainer's choice.")
    num_workers: int | None = HfArg(default=None, help="Loader workers; by default the Trainer's.")
    seed: int = HfArg(default=0, help="Seed of weights, views and orders.")


class PatchEmbeddingForTimm(nn.Module):
    """Our patch embedding, as timm builds and calls it."""

    def __init__(self, config: IBViTConfig, **kwargs):
        super().__init__()
        num_layers = 0 if config.patch_embedding == "linear" else config.num_stem_layers
        self.stem = IBViTStem(config, "convolution", num_layers)
        self.num_patches = (config.image_size // config.patch_size) ** 2

    def forward(self, pixel_values):
        return self.stem(pixel_values).flatten(2).transpose(1, 2)


class TeacherForTimm(nn.Module):
    """A teacher, as timm calls it, for pixels normalized by timm's `pretrained_cfg`."""

    def __init__(self, teacher: IBResNetForImageClassification, pretrained_cfg: dict):
        super().__init__()
        self.teacher, self.pretrained_cfg = teacher, pretrained_cfg

    def forward(self, pixel_values):
        return self.teacher(pixel_values=pixel_values).logits


def make_images(count: int, size: int, seed: int = 0) -> Dataset:
    """Enlarged digits; more than there are repeat from the first."""
    digits = load_image_dataset("digits", seed=seed)["train"]
    digits = digits.select([i % len(digits) for i in range(count)])
    images = [image.resize((size, size), Resampling.BICUBIC) for image in digits["image"]]
    return Dataset.from_dict({"image": images, "label": digits["label"]}, digits.features)


def make_arguments(bench: TrainingBenchmarkArguments, folder: Path, **settings) -> DistillationArguments:
    chosen = {"bf16": bench.bf16, "dataloader_num_workers": bench.num_workers}
    settings |= {name: value for name, value in chosen.items() if value is not None}
    return DistillationArguments(
        # transformers' own Trainer would remove the image, an unused column to it, from the rows.
        str(folder), remove_unused_columns=False, dataloader_drop_last=True, seed=bench.seed, eval_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip


def train_teachers(images: Dataset, recipe: ViewRecipe, bench: TrainingBenchmarkArguments, work: Path) -> dict:
    """Name → model and image processor."""
    processor, teachers = build_image_processor(images), {}
    for name, preset in PRESETS.items():
        set_seed(bench.seed)
        model = IBResNetForImageClassification(IBResNetConfig.from_preset(preset, **class_config(images)))
        # Small batches and views: after few steps, or for views it was not trained on, some logits of an involution
        # teacher are beyond float16.
        sizes = {"num_train_epochs": bench.teacher_epochs, "per_device_train_batch_size": -(-bench.batch_size // 4)}
        args = make_arguments(bench, work / name, **sizes)
        trainer = ImageClassificationTrainer(model, args, images, processing_class=processor, views=recipe)
        trainer.train()
        teachers[name] = (model, processor)
    return teachers


def train_bare(model: nn.Module, compute_loss: Callable, rows: ImageRows, collator, args, rng) -> None:
    """The work of the steps of a `Trainer`, without it."""
    loader = torch.utils.data.DataLoader(
        rows, args.train_batch_size, shuffle=True, drop_last=True, collate_fn=collator,
        num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    warmup_steps = args.get_warmup_steps(args.max_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, args.max_steps)
    for batch in islice(chain.from_iterable(repeat(loader)), args.max_steps):
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            loss = compute_loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def make_timm_run(config: IBViTConfig, teacher, rows: ImageRows, processor, args) -> Callable | None:
    """timm's token distillation, or `None` without timm."""
    try:
        import timm
        from timm.task import TokenDistillationTask
    except ImportError:
        return None
    # On a CPU, PyTorch's fused attention, timm's default, is slower in bf16 than plain matrix products.
    timm.layers.set_fused_attn(args.device.type != "cpu" or not args.bf16)
    # The same for teacher and student, so that timm has no pixels to convert.
    pixels = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224", pretrained_cfg_overlay=pixels, num_classes=config.num_labels,
        img_size=config.image_size, patch_size=config.patch_size, embed_layer=partial(PatchEmbeddingForTimm, config),
        embed_dim=config.hidden_size, depth=config.num_hidden_layers, num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
    )  # fmt: skip
    teacher, cross_entropy = TeacherForTimm(teacher, pixels), nn.CrossEntropyLoss()
    task = TokenDistillationTask(student, teacher, cross_entropy, temperature=args.temperature[0]).to(args.device)

    def compute_loss(batch):
        return task(batch["pixel_values"], batch["labels"])["loss"]

    return partial(train_bare, student, compute_loss, rows, DistillationCollator(processor), args)


def make_bare_run(student: IBViTForImageClassification, rows: ImageRows, processor, args) -> Callable:
    student.to(args.device)
    weights, temperature = args.teacher_weights * len(PRESETS), args.temperature[0]

    def compute_loss(batch):
        outputs = student(pixel_values=batch["pixel_values"])
        inputs = outputs.class_logits, outputs.teacher_token_logits, batch["labels"], batch["teacher_logits"]
        return ensemble_distillation_loss(*inputs, weights=weights, temperature=temperature).loss

    collator = DistillationCollator(processor, teacher_names=tuple(PRESETS))
    return partial(train_bare, student, compute_loss, rows, collator, args)


def make_cases(tables: dict, teachers: dict, recipe: ViewRecipe, bench, args) -> dict[str, Case]:
    """Everything that is timed, by name."""
    dense, views = tables["dense"], tables["views"]
    processor, columns = build_image_processor(dense), [column_name(name) for name in PRESETS]
    config = IBViTConfig(
        teacher_names=tuple(PRESETS), patch_embedding=bench.patch_embedding, image_size=bench.image_size,
        patch_size=default_patch_size(bench.image_size), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, **class_config(dense),
    )  # fmt: skip
    set_seed(bench.seed)
    student = partial(IBViTForImageClassification, config)
    plain = partial(Trainer, args=args, data_collator=DistillationCollator(processor))
    ours = partial(EnsembleDistillationTrainer, args=args, processing_class=processor)
    images = ImageRows(dense, ["label"])
    trainers = {
        PLAIN: plain(student(), train_dataset=images),
        PLAIN_VIEWS: plain(student(), train_dataset=ImageRows(views, ["label"], views=recipe)),
        DENSE: ours(student(), train_dataset=dense),
        TOP_K: ours(student(), train_dataset=tables["top-k"]),
        VIEWS: ours(student(), train_dataset=views),
        ONLINE: ours(student(), train_dataset=dense, teachers=teachers),
        ONLINE_VIEWS: ours(student(), train_dataset=views, teachers=teachers, views=recipe),
    }
    runs = {}
    for name, trainer in trainers.items():
        trainer.remove_callback(PrinterCallback)
        runs[name] = lambda rng, trainer=trainer: trainer.train()
    logits_rows = ImageRows(dense, ["label"], columns, config.num_labels)
    runs[BARE] = make_bare_run(student(), logits_rows, processor, args)
    runs[TIMM] = make_timm_run(config, teachers["conv"][0], images, processor, args)
    return {name: Case(name, timed, bench.steps * bench.batch_size) for name, timed in runs.items() if timed}


def compare(cases: dict[str, Case]) -> list[dict]:
    comparisons = []
    for name, baseline, required in REQUIREMENTS:
        if baseline in cases:
            ratios = cases[name].ratios(cases[baseline])
            of_clocks = {clock: {**ratio, "met": ratio["median"] >= required} for clock, ratio in ratios.items()}
            comparisons.append({"case": name, "baseline": baseline, "required": required, **of_clocks})
    return comparisons


def find_break_even(cases: dict[str, Case], record_seconds: dict[str, float], num_rows: int) -> list[dict]:
    """After how many epochs recording pays; `None` is never."""
    entries = []
    for table, online, stored in (("dense", ONLINE, DENSE), ("top-k", ONLINE, TOP_K), ("views", ONLINE_VIEWS, VIEWS)):
        online, stored = (num_rows / cases[name].rate["median"] for name in (online, stored))
        seconds = record_seconds[table]
        epochs = seconds / (online - stored) if online > stored else None
        entry = {"columns": table, "record_seconds": seconds, "online_epoch_seconds": online}
        entries.append({**entry, "stored_epoch_seconds": stored, "epochs": epochs})
    return entries


def report(cases: dict[str, Case], comparisons: list[dict], break_even: list[dict]) -> str:
    rates = [[name, spread(case.rate, 1)] for name, case in cases.items()]
    ratios = [
        [f"{entry['case']} / {entry['baseline']}", f"≥ {entry['required']}"]
        + [cell for k in ("wall", "cpu") for cell in (spread(entry[k], 3), "yes" if entry[k]["met"] else "no")]
        for entry in comparisons
    ]
    costs = [
        [entry["columns"], *("never" if x is None else f"{x:.2f}" for x in list(entry.values())[1:])]
        for entry in break_even
    ]
    tables = [
        markdown_table(["case", "images/s (quartiles)"], rates),
        markdown_table(["images/s of", "required", "ratio", "met", "ratio by CPU time", "met by CPU time"], ratios),
        markdown_table(["columns", "recording, s", "epoch online, s", "epoch stored, s", "pays after, epochs"], costs),
    ]
    return "\n\n".join(tables)


def main():
    bench = parse(TrainingBenchmarkArguments, __doc__)
    if bench.patch_embedding not in ("linear", "convolution"):
        raise ValueError(f'patch_embedding="{bench.patch_embedding}" is not measured. Choose linear or convolution.')
    if bench.num_rows < bench.batch_size:
        raise ValueError(f"num_rows={bench.num_rows} is less than batch_size={bench.batch_size}.")
    recipe = ViewRecipe(num_views=bench.num_views, seed=bench.seed)
    tables, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sizes = {"max_steps": bench.steps, "per_device_train_batch_size": bench.batch_size}
        args = make_arguments(bench, work / "students", **sizes)
        images, begin = make_images(bench.num_rows, bench.image_size, bench.seed), time.perf_counter()
        teachers = train_teachers(images, recipe, bench, work)
        teacher_seconds = time.perf_counter() - begin
        for name, settings in {"dense": {}, "top-k": {"top_k": bench.top_k}, "views": {"views": recipe}}.items():
            begin = time.perf_counter()
            record_teacher_logits(images, teachers, output_dir=work / name, **settings)
            seconds[name] = time.perf_counter() - begin
            tables[name] = load_from_disk(work / name)
        cases = make_cases(tables, teachers, recipe, bench, args)
        # A Trainer collects garbage when it begins, which in a process of this size takes as long as many steps.
        gc.freeze()
        time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
    comparisons, break_even = compare(cases), find_break_even(cases, seconds, bench.num_rows)
    precision, workers = "bf16" if args.bf16 else "float32", args.dataloader_num_workers
    how = {"timm": version("timm") if TIMM in cases else None, "bf16": args.bf16, "num_workers": workers}
    results = {"comparisons": comparisons, "break_even": break_even, "train_teachers_seconds": teacher_seconds}
    write_results(bench, **how, cases={name: case.measured for name, case in cases.items()}, **results)
    print(f"\n{precision}, {workers} loader workers, {bench.steps} steps a run\n")
    print(report(cases, comparisons, break_even))
    print(f"\nTraining both teachers, {bench.teacher_epochs} epochs each: {teacher_seconds:.1f} s, online or stored.")
    if TIMM not in cases:
        print("Left out: timm's token distillation; timm with timm.task is not installed.")


if __name__ == "__main__":
    main()
