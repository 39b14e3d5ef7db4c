"""Training on stored views, from a table or a stream, takes the steps of training with the teachers."""

from collections import Counter

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import ViTImageProcessor

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ViewRecipe,
    export_logits_table,
    open_logits_table,
    record_teacher_logits,
)
from hf_ibdistill.images.views import make_view, row_key
from hf_ibdistill.logits.provenance import attach_record, read_records, stored_views
from hf_ibdistill.rows import StreamedImageRows


NAMES = ["cat", "dog", "eel"]
RECIPE = ViewRecipe(num_views=3, horizontal_flip=0.5, erasing=0.3)
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(24)]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(24)]}, features=features)


@pytest.fixture(scope="module")
def teachers():
    models = {}
    for seed, (name, preset) in enumerate({"conv": "convolution-small", "inv": "involution-small"}.items()):
        torch.manual_seed(seed)
        config = IBResNetConfig.from_preset(
            preset, depths=(1, 1, 1), hidden_sizes=(16, 16, 16), num_labels=3, id2label=dict(enumerate(NAMES))
        )
        models[name] = (IBResNetForImageClassification(config).eval(), PROCESSOR)
    return models


@pytest.fixture(scope="module")
def table(images, teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "table"
    return record_teacher_logits(images, teachers, output_dir=folder, views=RECIPE, dtype="float32")


def student(teacher_names=("conv", "inv"), seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = IBViTConfig(
        teacher_names=teacher_names, image_size=8, hidden_dropout_prob=dropout, patch_size=4, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, num_labels=3, id2label=dict(enumerate(NAMES)),
    )  # fmt: skip
    return IBViTForImageClassification(config)


def stream(table):
    streamed = table.to_iterable_dataset()
    attach_record(streamed, read_records(table)[0])
    return streamed


def trained(
    folder, train_dataset, trainer_class=EnsembleDistillationTrainer, *, views=None, teachers=None, student_seed=0,
    resume_from=None, dropout=0.0, **settings,
):  # fmt: skip
    """The weights after a training."""
    arguments = {
        "num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 0.05, "warmup_steps": 0,
        "optim": "sgd", "lr_scheduler_type": "constant", "eval_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "bf16": False, **settings,
    }  # fmt: skip
    is_distilled = trainer_class is EnsembleDistillationTrainer
    trainer = trainer_class(
        student(("conv", "inv") if is_distilled else (), student_seed, dropout),
        DistillationArguments(str(folder), **arguments),
        train_dataset=train_dataset,
        eval_dataset=train_dataset if "eval_steps" in settings else None,
        processing_class=PROCESSOR,
        views=views,
        **({"teachers": teachers} if teachers else {}),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    for loader in trainer.accelerator._dataloaders:
        if getattr(loader, "_iterator", None) is not None:
            # Garbage collection would wait for persistent workers.
            loader._iterator._shutdown_workers()
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    """Training on the stored views: the weights after it, and the folder with a checkpoint of its second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(folder, table, save_strategy="steps", save_steps=5), folder


@pytest.fixture(scope="module")
def in_order(table, tmp_path_factory):
    """The weights after training without shuffling."""
    return trained(tmp_path_factory.mktemp("in_order"), table, train_sampling_strategy="sequential")


def assert_same(first, second, **tolerance):
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


def test_stored_views_take_the_steps_of_online_teachers(images, teachers, whole, tmp_path):
    stored, _ = whole
    online = trained(tmp_path, images, views=RECIPE, teachers=teachers)
    # Recording batches by views, training by rows; that rounds differently.
    assert_same(stored, online, rtol=1e-4, atol=1e-5)
    # Other views than those of the teachers would show.
    plain = trained(tmp_path, images, teachers=teachers)
    assert any((stored[name] - plain[name]).abs().max() > 1e-3 for name in stored)


def test_float16_columns_differ_by_their_rounding_alone(images, teachers, whole, tmp_path):
    half = record_teacher_logits(images, teachers, output_dir=tmp_path / "t", views=RECIPE)
    assert_same(trained(tmp_path, half), whole[0], rtol=2e-3, atol=2e-4)


def test_rows_keep_their_views_in_any_table(images, teachers, table, tmp_path):
    order = np.random.default_rng(1).permutation(24)
    shuffled = trained(tmp_path, table.select(order), train_sampling_strategy="sequential")
    online = trained(
        tmp_path, images.select(order), views=RECIPE, teachers=teachers, train_sampling_strategy="sequential"
    )
    assert_same(shuffled, online, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_follow_the_epochs(persistent, table, whole, tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
    assert_same(trained(tmp_path, table, **workers), whole[0], rtol=0, atol=0)


@pytest.mark.parametrize("streamed", [False, True])
def test_workers_that_are_started_afresh(streamed, table, whole, in_order, tmp_path):
    # As on Windows and macOS, and by default since Python 3.14: they import the package and get copies of the rows.
    workers = {
        "dataloader_num_workers": 1,
        "dataloader_multiprocessing_context": "forkserver" if streamed else "spawn",
    }
    if streamed:
        assert_same(trained(tmp_path, stream(table), max_steps=9, **workers), in_order, rtol=0, atol=0)
    else:
        assert_same(trained(tmp_path, table, **workers), whole[0], rtol=0, atol=0)


def test_resuming_within_an_epoch_goes_on_with_its_view(table, whole, tmp_path):
    weights, folder = whole
    # Another start would show if the training began again.
    resumed = trained(tmp_path, table, student_seed=1, resume_from=str(folder / "checkpoint-5"))
    assert_same(resumed, weights, rtol=0, atol=0)


@pytest.mark.parametrize(("workers", "views_per_image"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_resuming_with_dropout_and_workers_ends_bit_identical(workers, views_per_image, table, tmp_path):
    # Evaluation must not draw from the generator of dropout either.
    settings = {"dropout": 0.3, "dataloader_num_workers": workers, "eval_strategy": "steps", "eval_steps": 2}
    settings["views_per_image"] = views_per_image
    whole = trained(tmp_path, table, save_strategy="steps", save_steps=1, **settings)
    for step in (3, 5):  # at the end of an epoch, and within one
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        resumed = trained(tmp_path / "b", table, student_seed=1, resume_from=checkpoint, **settings)
        assert_same(resumed, whole, rtol=0, atol=0)


def test_a_student_without_teachers_sees_the_same_views(images, table, tmp_path):
    keys_stored = trained(tmp_path, table, ImageClassificationTrainer, views=stored_views(table))
    keys_computed = trained(tmp_path, images, ImageClassificationTrainer, views=RECIPE)
    assert_same(keys_stored, keys_computed, rtol=0, atol=0)


def test_a_streamed_table_takes_the_same_steps(table, in_order, tmp_path):
    assert_same(trained(tmp_path, stream(table), max_steps=9), in_order, rtol=0, atol=0)


def test_a_streamed_table_may_have_other_column_names(table, in_order, tmp_path):
    renamed = table.rename_columns({"image": "picture", "label": "animal"})
    assert_same(trained(tmp_path, stream(renamed), max_steps=9), in_order, rtol=0, atol=0)


def test_a_table_streamed_from_parquet_takes_the_same_steps(table, tmp_path):
    folder = export_logits_table(table, tmp_path / "p", rows_per_file=10)
    # One epoch: datasets may begin a later pass with another file.
    whole = trained(tmp_path / "a", table, train_sampling_strategy="sequential", num_train_epochs=1)
    streamed = trained(tmp_path / "b", open_logits_table(folder, streaming=True), max_steps=3)
    assert_same(streamed, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("accumulation", "workers", "steps", "views_per_image"),
    [
        (1, 0, range(1, 9), 1),
        (1, 2, (4, 6), 1),
        (2, 0, (2, 3), 1),
        (3, 0, (1, 2), 1),
        (1, 2, (4, 7), 2),
        (2, 0, (2,), 3),
    ],
    ids=str,
)
def test_a_resumed_stream_ends_bit_identical(accumulation, workers, steps, views_per_image, table, tmp_path):
    # Passes of four batches or more, the last of which is small, or does not fill a step.
    rows = table.select(range(23 if accumulation == 1 else 24))
    settings = {
        "views_per_image": views_per_image,
        "per_device_train_batch_size": 6, "gradient_accumulation_steps": accumulation, "max_steps": 9 // accumulation,
        "dataloader_num_workers": workers, "dropout": 0.3, "shuffle_buffer_size": 8, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip

    def shuffled():
        streamed = rows.to_iterable_dataset(num_shards=2)
        attach_record(streamed, read_records(table)[0])
        return streamed

    whole = trained(tmp_path, shuffled(), **settings)
    for step in steps:
        settings["save_strategy"] = "no"
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        resumed = trained(tmp_path / "b", shuffled(), student_seed=1, resume_from=checkpoint, **settings)
        assert_same(resumed, whole, rtol=0, atol=0)


def test_batches_that_fill_no_step_are_left_out_of_a_pass_of_a_stream(table, tmp_path, caplog):
    # Three batches a pass, two of which make a step: the views go on, and the third leaves no gradient behind.
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    streamed = trained(tmp_path / "a", stream(table), max_steps=3, **settings)
    assert "last 1 batches" in caplog.text and "gradient_accumulation_steps=2" in caplog.text
    whole = trained(
        tmp_path / "b", table.select(range(16)), train_sampling_strategy="sequential", num_train_epochs=3, **settings
    )
    assert_same(streamed, whole, rtol=0, atol=0)
    with pytest.raises(ValueError, match="4 batches of 8"):
        trained(
            tmp_path / "c", stream(table), max_steps=3, per_device_train_batch_size=8, gradient_accumulation_steps=4
        )


def test_a_stream_that_pyarrow_would_mix_up_is_refused(table, tmp_path):
    nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(range(12)), 2), 2).slice(1)
    if nested.take(pa.array([1, 0])).to_pylist() == nested.to_pylist()[::-1]:
        pytest.skip("this pyarrow takes the right rows")
    for reordered in (
        stream(table).shuffle(seed=0, buffer_size=8),
        stream(table).filter(lambda row: row["label"] < 2),
    ):
        with pytest.raises(ValueError, match="shuffled or filtered.*pyarrow.*shuffle_buffer_size"):
            trained(tmp_path, reordered, max_steps=1)
    # One logit a class, or no logits at all, are safe.
    trained(tmp_path, stream(table).shuffle(seed=0), ImageClassificationTrainer, max_steps=1)


def test_workers_share_a_streamed_table(table, tmp_path):
    rows = StreamedImageRows(table.to_iterable_dataset(num_shards=1), ["label"], ["conv_logits"], 3, RECIPE)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2)
    seen = sorted(row["conv_logits"].tolist() for row in loader)
    assert seen == sorted(np.asarray(table.with_format("numpy")["conv_logits"])[:, 0].tolist())


def test_a_streamed_table_is_checked(table, tmp_path):
    with pytest.raises(ValueError, match='training set.*no column "conv_logits"'):
        trained(tmp_path, stream(table.remove_columns("conv_logits")), max_steps=1)
    logits = np.asarray(table.with_format("numpy")["conv_logits"]).copy()
    logits[5, 0, 0] = np.nan
    broken = table.remove_columns("conv_logits").add_column(
        "conv_logits", logits.tolist(), feature=table.features["conv_logits"]
    )
    broken.info.description = table.info.description
    with pytest.raises(ValueError, match='Row 5.*"conv_logits".*NaN'):
        trained(tmp_path, stream(broken), max_steps=3)


def test_other_views_than_the_recorded_are_refused(table, tmp_path):
    with pytest.raises(ValueError, match="views=.*num_views=4.*num_views=3"):
        trained(tmp_path, table, views=ViewRecipe(num_views=4))


def test_stored_logits_of_the_images_as_they_are_teach_views_of_them(images, teachers, table, tmp_path):
    plain = record_teacher_logits(images, teachers, output_dir=tmp_path / "plain", dtype="float32")
    # The same by hand: a table with the plain logits for every view.
    repeated = table
    for name in teachers:
        column = f"{name}_logits"
        logits = np.repeat(np.asarray(plain.with_format("numpy")[column])[:, None], RECIPE.num_views, axis=1)
        repeated = repeated.remove_columns(column).add_column(column, logits.tolist(), feature=table.features[column])
    repeated.info.description = table.info.description
    assert_same(trained(tmp_path, plain, views=RECIPE), trained(tmp_path, repeated))


def test_standardized_logits_need_all_of_them(images, teachers, tmp_path):
    table = record_teacher_logits(images, teachers, output_dir=tmp_path / "table", top_k=2)
    with pytest.raises(ValueError, match='standardize_logits=True.*"conv_logits".*top_k=None'):
        trained(tmp_path, table, standardize_logits=True)


# Several views of an image in a batch


def pixels_of_views(row):
    """What a student gets of each view of a row, as bytes."""
    image = row["image"].convert("RGB")
    views = [make_view(image, RECIPE, row_key(image), number) for number in range(RECIPE.num_views)]
    return [pixels.numpy().tobytes() for pixels in PROCESSOR(views, return_tensors="pt")["pixel_values"]]


def samples(loader, table):
    """The batches as (row, view), found by their pixels; their logits are those of the table."""
    stored = {}
    of_pixels = {
        pixels: (number, view) for number, row in enumerate(table) for view, pixels in enumerate(pixels_of_views(row))
    }
    for name in ("conv", "inv"):
        stored[name] = np.array(table[f"{name}_logits"][:])
    found = []
    for batch in loader:
        found.append([of_pixels[pixels.numpy().tobytes()] for pixels in batch["pixel_values"]])
        expected = [[stored[name][row, view] for name in ("conv", "inv")] for row, view in found[-1]]
        np.testing.assert_array_equal(batch["teacher_logits"].numpy(), expected)
        assert batch["labels"].tolist() == [table["label"][row] for row, _ in found[-1]]
    return found


@pytest.mark.parametrize(("num_rows", "views_per_image", "workers"), [(14, 2, 0), (15, 2, 2), (14, 3, 0), (5, 3, 0)])
def test_every_pass_takes_the_next_views_of_each_image_once(num_rows, views_per_image, workers, table, tmp_path):
    # Small images have equal views by chance.
    distinct = [number for number, row in enumerate(table) if len(set(pixels_of_views(row))) == 3]
    rows = table.select(distinct[:num_rows])
    trainer = EnsembleDistillationTrainer(
        student(),
        DistillationArguments(
            str(tmp_path), per_device_train_batch_size=6, eval_strategy="no", use_cpu=True, bf16=False,
            views_per_image=views_per_image, dataloader_num_workers=workers,
        ),
        train_dataset=rows,
        processing_class=PROCESSOR,
    )  # fmt: skip
    loader, walk, num_epochs = trainer.get_train_dataloader(), [], 4 * views_per_image
    images_of_epoch = -(-num_rows // views_per_image)
    for epoch in range(num_epochs):
        trainer.train_dataset.start_epoch(epoch)
        batches = samples(loader, rows)
        assert len(batches) == len(loader) == -(-images_of_epoch * views_per_image // 6)
        # Whole images in every batch, each of them once.
        assert all(len(batch) == views_per_image * len({row for row, _ in batch}) for batch in batches)
        walk += [sample for batch in batches for sample in batch]
    assert len(walk) == num_epochs * images_of_epoch * views_per_image
    orders = []
    for number in range(len(walk) // (num_rows * views_per_image)):
        of_pass = walk[number * num_rows * views_per_image :][: num_rows * views_per_image]
        views = [(number * views_per_image + offset) % 3 for offset in range(views_per_image)]
        orders.append([row for row, _ in of_pass[::views_per_image]])
        assert sorted(orders[-1]) == list(range(num_rows))
        assert of_pass == [(row, view) for row in orders[-1] for view in views]
    assert len(orders) >= 4 and len({tuple(order) for order in orders}) == len(orders)
    # After as many passes as there are views, every view of every image was used equally often.
    counts = Counter(walk[: 3 * num_rows * views_per_image])
    assert len(counts) == 3 * num_rows and set(counts.values()) == {views_per_image}


def test_several_views_take_the_steps_of_online_teachers_and_of_a_stream(images, teachers, table, tmp_path):
    several = {"views_per_image": 2, "train_sampling_strategy": "sequential"}
    stored = trained(tmp_path, table, **several)
    online = trained(tmp_path, images, views=RECIPE, teachers=teachers, **several)
    assert_same(stored, online, rtol=1e-4, atol=1e-5)
    streamed = trained(tmp_path, stream(table), max_steps=9, views_per_image=2)
    assert_same(streamed, stored, rtol=0, atol=0)
    other = trained(tmp_path, table, train_sampling_strategy="sequential")
    assert any((stored[name] - other[name]).abs().max() > 1e-3 for name in stored)


def test_several_views_that_do_not_fit_are_refused(images, table, tmp_path):
    for settings, message in (
        ({"views_per_image": 4}, "views_per_image=4.*3 views"),
        ({"views_per_image": 3}, "views_per_image=3.*per_device_train_batch_size=8"),
        ({"views_per_image": 0}, "views_per_image=0"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(tmp_path, table, **settings)
    with pytest.raises(ValueError, match="views_per_image=2.*no views"):
        trained(tmp_path, images, ImageClassificationTrainer, views_per_image=2)
