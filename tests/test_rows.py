"""Table → rows → batch, from a mapped and from a streamed table."""

import multiprocessing
import os
import pickle
from functools import cache

import numpy as np
import PIL.Image
import pytest
import torch
from cells import UNREADABLE, cell_table, encoded, gray, random_image, random_pixels
from datasets import Dataset, Image, Value, load_from_disk
from transformers import ViTImageProcessor

from hf_ibdistill import ViewRecipe
from hf_ibdistill import rows as rows_module
from hf_ibdistill.data.columns import as_image_table
from hf_ibdistill.images import decoding
from hf_ibdistill.images.views import make_view, row_key
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.recording import batches
from hf_ibdistill.rows import DistillationCollator, ImageRows, SharedCollator, StreamedImageRows, default_num_workers


RECIPE = ViewRecipe(num_views=3, crop="pad", horizontal_flip=0.5, photometric_ops=1, geometric_ops=1)


def stream(table, **options):
    return as_image_table(table.to_iterable_dataset(**options), needs_label=False)


def gray_levels(rows):
    return [(row["row"], row["image"].getpixel((0, 0))[0]) for row in rows]


def with_views(images, num_classes=5):
    """The images with random logits of each of their views: table, logits (N, V, C)."""
    logits = np.random.default_rng(1).normal(size=(len(images), RECIPE.num_views, num_classes)).astype(np.float32)
    feature = LogitsEncoding("float32").feature(num_classes, RECIPE.num_views)
    table = cell_table([encoded(image) for image in images])
    return table.add_column("conv_logits", logits.tolist(), feature=feature), logits


# Mapped rows


def test_images_in_files_are_read(tmp_path):
    for i in range(3):
        PIL.Image.new("RGB", (3, 3), (i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in (2, 0, 1)]
    rows = ImageRows(Dataset.from_dict({"image": paths}).cast_column("image", Image()))
    assert [rows[i]["image"].getpixel((0, 0))[0] for i in range(3)] == [2, 0, 1]


def test_rows_are_those_of_the_table_after_shuffle_and_select():
    table = cell_table([gray(20 * i) for i in range(10)]).shuffle(seed=1).select([7, 2, 2, 9, 0])
    rows = ImageRows(table, ["row"])
    assert len(rows) == 5 and rows.table is table
    assert [rows[i]["row"] for i in range(5)] == table["row"][:]
    order = [4, 0, 0, 3]
    read = rows.__getitems__(order)
    assert [row["row"] for row in read] == [table["row"][i] for i in order]
    for row in [*read, rows[2]]:
        np.testing.assert_array_equal(np.asarray(row["image"]), np.full((2, 2, 3), 20 * row["row"]))


def test_rows_hold_the_image_and_the_columns_that_were_asked_for():
    table = cell_table([gray(0), gray(1)], conv_logits=np.zeros((2, 5), np.float16))
    assert ImageRows(table)[0].keys() == {"image"}
    assert ImageRows(table, ["row"])[0].keys() == {"image", "row"}
    assert ImageRows(table, [], ["conv_logits"], 5)[0].keys() == {"image", "conv_logits"}
    # A list column that is not logits comes as it is.
    assert ImageRows(table, ["conv_logits"])[1]["conv_logits"] == [0.0] * 5


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("saved", [False, True])
def test_logits_columns_are_arrays_of_the_stored_numbers(dtype, saved, tmp_path):
    conv, inv = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(dtype)
    table = cell_table([gray(i) for i in range(6)], conv_logits=conv, inv_logits=inv).shuffle(seed=2)
    if saved:
        table.save_to_disk(tmp_path / "data")
        table = load_from_disk(tmp_path / "data")
    for rows in (
        ImageRows(table, ["row"], ["inv_logits", "conv_logits"], 5).__getitems__([5, 0, 3]),
        list(StreamedImageRows(stream(table), ["row"], ["inv_logits", "conv_logits"], 5)),
    ):
        for row in rows:
            assert isinstance(row["conv_logits"], np.ndarray) and row["conv_logits"].dtype == dtype
            np.testing.assert_array_equal(row["conv_logits"], conv[row["row"]])
            np.testing.assert_array_equal(row["inv_logits"], inv[row["row"]])


def test_the_format_of_the_table_neither_matters_nor_changes():
    table = cell_table([gray(50), gray(60)]).with_format("torch", columns=["row"])
    assert gray_levels([ImageRows(table, ["row"])[1]]) == [(1, 60)]
    assert table.format["type"] == "torch" and table.format["columns"] == ["row"]


# Unreadable images


@pytest.mark.parametrize(
    "cell", [UNREADABLE, {"bytes": None, "path": "gone.png"}, None], ids=["bytes", "file", "null"]
)
def test_the_row_of_an_unreadable_image_is_named(cell):
    table = cell_table([gray(0), gray(1), cell, gray(3)])
    rows = ImageRows(table, ["row"])
    for read in (lambda: rows[2], lambda: list(rows.__getitems__([3, 2, 0]))):
        with pytest.raises(ValueError, match="Row 2: .*cannot be decoded"):
            read()
    assert rows[3]["row"] == 3
    # Rows count as the given table does.
    with pytest.raises(ValueError, match="Row 3: "):
        ImageRows(table.select([3, 1, 0, 2]))[3]
    with pytest.raises(ValueError, match="Row 2: .*cannot be decoded"):
        [row["image"] for row in StreamedImageRows(stream(table))]


def test_the_rows_of_a_batch_are_decoded_as_they_are_read():
    table = cell_table([gray(10), gray(20), UNREADABLE, gray(40)])
    batch = ImageRows(table, ["row"]).__getitems__([3, 1, 2])
    assert len(batch) == 3 and [row["row"] for row in batch[:2]] == [3, 1]
    assert batch[1]["image"].getpixel((0, 0))[0] == 20
    with pytest.raises(ValueError, match="Row 2: "):
        batch[-1]


def test_a_batch_holds_few_decoded_photos(monkeypatch):
    # A budget of pixels for three of twelve images.
    monkeypatch.setattr("hf_ibdistill.images.preprocessing.PIXELS", 3 * 40 * 40)
    table = cell_table([gray(20 * number, (40, 40)) for number in range(12)])
    alive, most, decode = [0], [0], decoding.decode_image

    class Photo(PIL.Image.Image):
        def __del__(self):
            alive[0] -= 1

    def decode_and_count(*args):
        image = Photo()
        image.__dict__.update(decode(*args).__dict__)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return image

    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    expected = DistillationCollator(processor)(list(ImageRows(table, ["row"])))
    for module in (rows_module, batches):
        monkeypatch.setattr(module, "decode_image", decode_and_count)
    batch = DistillationCollator(processor)(ImageRows(table, ["row"]).__getitems__(range(12)))
    assert 3 <= most[0] <= 5 and torch.equal(batch["pixel_values"], expected["pixel_values"])
    # A data loader collects the rows of a stream before it makes a batch of them, here in the order of the stream and shuffled.
    for buffer_size in (0, 6):
        most[0] = 0
        rows = StreamedImageRows(stream(table), ["row"], buffer_size=buffer_size)
        (batch,) = torch.utils.data.DataLoader(rows, batch_size=12, collate_fn=DistillationCollator(processor))
        assert 3 <= most[0] <= 5 and len(batch["pixel_values"]) == 12
        if buffer_size == 0:
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    # Two views of a photo are made together.
    most[0], recipe = 0, ViewRecipe(num_views=4)
    rows = StreamedImageRows(stream(table), ["row"], views=recipe, views_per_image=2)
    (batch,) = torch.utils.data.DataLoader(rows, batch_size=24, collate_fn=DistillationCollator(processor))
    assert most[0] <= 2
    mapped = ImageRows(table, ["row"], views=recipe, views_per_image=2)
    mapped = DistillationCollator(processor)([mapped[row, view] for row in range(12) for view in (0, 1)])
    assert torch.equal(batch["pixel_values"], mapped["pixel_values"])
    most[0] = 0
    prepare = batches.Preparation({"t": processor}, None, None, None, False, embeds_files=True, keeps_keys=False)
    prepared = prepare(batches.EncodedRows(table).__getitems__(range(12)))
    assert 3 <= most[0] <= 5 and torch.equal(prepared.inputs["t"], expected["pixel_values"])
    # Views of a photo are as many photos.
    most[0], recipe = 0, ViewRecipe(num_views=8)
    prepare = batches.Preparation({"t": processor}, recipe, range(8), None, False, embeds_files=True, keeps_keys=False)
    assert prepare(batches.EncodedRows(table).__getitems__(range(12))).inputs["t"].shape == (96, 3, 8, 8)
    assert most[0] <= 2


def test_a_row_of_a_stream_is_read_more_than_once():
    image = random_image(seed=1)
    table = cell_table([encoded(image)])
    (row,) = StreamedImageRows(stream(table), ["row"])
    assert row == {"image": row["image"], "row": 0} and len(row) == 2
    assert row["image"].tobytes() == row["image"].tobytes() == image.convert("RGB").tobytes()
    first, second = StreamedImageRows(stream(table), ["row"], views=RECIPE, views_per_image=2)
    for _ in range(2):
        for view, row in ((1, second), (0, first)):
            assert torch.equal(row["image"], make_view(image, RECIPE, row_key(image), view))


# Views


def test_the_epoch_chooses_the_view_and_its_logits():
    images = [random_image(seed=i) for i in range(4)]
    table, logits = with_views(images)
    shuffled = table.shuffle(seed=1)
    mapped = ImageRows(shuffled, ["row"], ["conv_logits"], 5, views=RECIPE)
    streamed = StreamedImageRows(stream(shuffled), ["row"], ["conv_logits"], 5, views=RECIPE)
    seen = set()
    for epoch in range(5):
        mapped.start_epoch(epoch)
        streamed.start_epoch(epoch)
        for row in [*mapped.__getitems__([2, 0, 3]), *streamed]:
            image = images[row["row"]]
            assert torch.equal(row["image"], make_view(image, RECIPE, row_key(image), epoch % 3))
            np.testing.assert_array_equal(row["conv_logits"], logits[row["row"], epoch % 3])
            seen.add(row["image"].numpy().tobytes())
    assert len(seen) == 4 * 3


def test_a_stored_key_counts_even_if_the_pixels_have_changed():
    images, keys = [random_image(seed=i) for i in range(2)], [7, 2**63 - 1]
    table = cell_table([encoded(image) for image in images]).add_column("row_key", keys, feature=Value("int64"))
    for rows in (ImageRows(table, ["row"], views=RECIPE), StreamedImageRows(stream(table), ["row"], views=RECIPE)):
        for image, key, row in zip(images, keys, rows):
            assert row.keys() == {"image", "row"}
            assert torch.equal(row["image"], make_view(image, RECIPE, key, 0))


# Worker processes


def test_a_new_epoch_reaches_workers_that_are_already_running():
    images = [random_image(seed=i) for i in range(5)]
    rows = ImageRows(cell_table([encoded(image) for image in images]), ["row"], views=RECIPE)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, persistent_workers=True, collate_fn=list)
    for epoch in (0, 1, 2):
        rows.start_epoch(epoch)
        read = [row for batch in loader for row in batch]
        assert [row["row"] for row in read] == list(range(5))
        for image, row in zip(images, read):
            assert torch.equal(row["image"], make_view(image, RECIPE, row_key(image), epoch))


def test_workers_share_the_rows_of_a_stream():
    rows = StreamedImageRows(stream(cell_table([gray(20 * i) for i in range(7)]), num_shards=1), ["row"])
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2)
    assert sorted(gray_levels(loader)) == [(i, 20 * i) for i in range(7)]


def test_default_number_of_workers(monkeypatch):
    assert default_num_workers(use_cpu=True) == 0
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = available - 1 if method == "fork" else 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_num_workers(use_cpu=False) == min(8, free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert default_num_workers(use_cpu=False) == 0
    # Other start methods run the script of the user again in every worker.
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for method, expected in (("fork", 8), ("spawn", 0), ("forkserver", 0)):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none, method=method: method)
        assert default_num_workers(use_cpu=False) == expected


@pytest.mark.parametrize("bad", [np.nan, -np.inf, "class"])
def test_a_row_whose_logits_cannot_be_used_is_named_when_it_is_read(bad):
    logits, encoding = np.zeros((6, 5), np.float32), LogitsEncoding("float32")
    if bad == "class":
        # Recorded for five classes, read for four.
        logits[4, 4], encoding = 9, LogitsEncoding("float32", top_k=2)
        cells = encoding.encode(logits).to_pylist()
    else:
        logits[4, 1] = bad
        cells = logits[:, :4].tolist()
    feature = encoding.feature(5 if bad == "class" else 4, None)
    table = cell_table([gray(0)] * 6).add_column("conv_logits", cells, feature=feature)
    rows = ImageRows(table, ["row"], ["conv_logits"], 4)
    assert len(rows.__getitems__([0, 5, 3])) == 3
    with pytest.raises(ValueError, match='Row 4: the column "conv_logits"'):
        list(rows.__getitems__([1, 4]))


# Kept images


def counted(monkeypatch):
    """The number of decoded images, in all processes that are forked later."""
    calls, decode = torch.zeros((), dtype=torch.int64).share_memory_(), decoding.decode_image

    def decode_and_count(*arguments):
        calls.add_(1)
        return decode(*arguments)

    monkeypatch.setattr(rows_module, "decode_image", decode_and_count)
    return calls


@pytest.mark.parametrize("recipe", [None, RECIPE, ViewRecipe(num_views=2, crop="resized", image_size=9)])
def test_kept_images_are_those_of_the_files(recipe, monkeypatch):
    """In every epoch, whatever the size of the images."""
    table = cell_table([encoded(random_image(seed=i, size=(7, 5) if i % 3 else (4, 6))) for i in range(8)])
    plain, kept = ImageRows(table, views=recipe), ImageRows(table, views=recipe, keeps_images=True)
    calls = counted(monkeypatch)
    for epoch in range(3):
        for rows in (plain, kept):
            rows.start_epoch(epoch)
        expected = [np.asarray(row["image"]) for row in plain.read(range(8))]
        calls.zero_()
        order = torch.randperm(8).tolist()
        for i, row in zip(order, kept.read(order), strict=True):
            np.testing.assert_array_equal(np.asarray(row["image"]), expected[i])
        # Three are as large as the first.
        assert calls == (8 if epoch == 0 else 5)


def test_kept_images_cannot_be_changed():
    rows = ImageRows(cell_table([gray(3)]), keeps_images=True)
    rows[0]["image"].putpixel((0, 0), (200, 200, 200))
    assert rows[0]["image"].getpixel((0, 0)) == (3, 3, 3)
    rows = ImageRows(cell_table([gray(3)]), views=ViewRecipe(crop="none"), keeps_images=True)
    rows[0]["image"].fill_(200)
    assert rows[0]["image"].unique().tolist() == [3]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_workers_share_the_kept_images(monkeypatch):
    rows = ImageRows(cell_table([encoded(random_image(seed=i)) for i in range(16)]), views=RECIPE, keeps_images=True)
    calls, expected = counted(monkeypatch), []
    loader = torch.utils.data.DataLoader(
        rows, 2, shuffle=True, num_workers=2, collate_fn=list, persistent_workers=True, multiprocessing_context="fork"
    )
    for _ in range(3):
        expected.append(sum(len(batch) for batch in loader))
    assert expected == [16] * 3 and calls == 16


def test_images_that_need_too_much_memory_are_not_kept(monkeypatch):
    table = cell_table([encoded(random_image(seed=i, size=(4, 4))) for i in range(5)])
    monkeypatch.setattr("hf_ibdistill.images.cache.MAX_BYTES", 5 * 4 * 4 * 3 - 1)
    rows, calls = ImageRows(table, keeps_images=True), counted(monkeypatch)
    for _ in range(2):
        list(rows.read(range(5)))
    assert calls == 10


def test_kept_images_are_not_pickled():
    """A process that is started, not forked, has its own."""
    rows = ImageRows(cell_table([encoded(random_image(seed=i)) for i in range(3)]), views=RECIPE, keeps_images=True)
    list(rows.read(range(3)))
    copy = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows._cache)) < 200
    for row, other in zip(rows.read(range(3)), copy.read(range(3)), strict=True):
        assert torch.equal(row["image"], other["image"])


def test_an_image_that_cannot_be_decoded_stays_an_error():
    rows = ImageRows(cell_table([UNREADABLE, encoded(random_image())]), keeps_images=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="Row 0"):
            rows[0]
    rows[1]


# Streams


def test_logits_of_a_stream_that_are_not_finite_are_named():
    for value in (np.nan, np.inf):
        logits = np.zeros((70, 3), np.float32)
        logits[66, 1] = value
        rows = StreamedImageRows(stream(cell_table([gray(0)] * 70, conv_logits=logits)), ["row"], ["conv_logits"], 3)
        read = []
        with pytest.raises(ValueError, match="Row 66: .*conv_logits"):
            read.extend(iter(rows))
        assert len(read) <= 66


@pytest.mark.parametrize("label", [3, -2, -100])
def test_a_label_of_a_stream_that_is_no_class_is_named(label):
    table = cell_table([gray(0)] * 3).add_column("label", [0, -1, label])
    with pytest.raises(ValueError, match=f"Row 2: the label {label} .* 3"):
        list(StreamedImageRows(stream(table), ["label"], num_classes=3))


def test_a_stream_without_any_label():
    table = cell_table([gray(0)] * 3).add_column("label", [-1, None, -1])
    assert len(list(StreamedImageRows(stream(table), ["label"], num_classes=3))) == 3
    with pytest.raises(ValueError, match="None of 3 rows"):
        list(StreamedImageRows(stream(table), ["label"], num_classes=3, labelled_only=True))


def test_a_shuffled_stream_has_another_order_in_each_epoch():
    table = stream(cell_table([gray(i) for i in range(30)])).shuffle(seed=0, buffer_size=30)
    rows = StreamedImageRows(table, ["row"])
    orders = []
    for epoch in (0, 1, 0):
        rows.start_epoch(epoch)
        orders.append(gray_levels(rows))
        assert sorted(orders[-1]) == [(i, i) for i in range(30)]
    assert orders[0] == orders[2] != orders[1]


# Batches


NAMES = ("conv", "inv", "third")
PIXELS = random_pixels(6, 8, 8, 3)
LABELS = [2, 0, 1, 1, 0, 2]
LOGITS = dict(zip(NAMES, np.random.default_rng(0).normal(size=(3, 6, 3)).astype(np.float32)))


def image_processor(size=8, mean=0.5):
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[mean] * 3, image_std=[0.5] * 3)


@cache
def read_rows(teachers=(), dtype=np.float32):
    """Rows whose logits columns have the order of `teachers`."""
    columns = {f"{name}_logits": LOGITS[name].astype(dtype) for name in teachers}
    table = cell_table([encoded(PIL.Image.fromarray(pixels)) for pixels in PIXELS], **columns)
    table = table.add_column("label", LABELS)
    return ImageRows(table, ["label"], list(columns), 3).__getitems__(range(6))


@pytest.mark.parametrize("columns", [("conv", "inv", "third"), ("third", "inv", "conv"), ("inv", "third", "conv")])
def test_teachers_are_stacked_in_the_order_of_the_names(columns):
    rows = read_rows(columns)
    for names in (("conv", "inv", "third"), ("inv", "conv"), ("third",)):
        batch = DistillationCollator(image_processor(), teacher_names=names)(rows)
        expected = np.stack([LOGITS[name] for name in names], axis=1)
        assert batch["teacher_logits"].shape == (6, len(names), 3)
        np.testing.assert_array_equal(batch["teacher_logits"].numpy(), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits_keep_their_stored_type(dtype):
    batch = DistillationCollator(image_processor(), teacher_names=["conv"])(read_rows(("conv",), dtype))
    assert batch["teacher_logits"].dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(batch["teacher_logits"][:, 0].numpy(), LOGITS["conv"].astype(dtype))


def test_images_and_labels_keep_their_rows():
    batch = DistillationCollator(image_processor(), teacher_names=["conv"])(read_rows(("conv",)))
    # (pixel / 255 − mean) / standard deviation, channels first.
    expected = (PIXELS.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected, atol=1e-6)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == LABELS and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("columns", "names"),
    [((), ("conv", "inv")), (("conv",), ("conv", "inv")), (("inv",), ("conv", "inv")), (NAMES, ())],
)
def test_no_teacher_logits_unless_asked_for_and_complete(columns, names):
    batch = DistillationCollator(image_processor(), teacher_names=names)(read_rows(columns))
    assert set(batch) == {"pixel_values", "labels"}


def test_each_online_teacher_sees_the_images_of_its_own_processor():
    processors = {"same": image_processor(), "larger": image_processor(12), "darker": image_processor(mean=0.9)}
    collator = DistillationCollator(image_processor(), teacher_image_processors=processors)
    rows = read_rows()
    batch = collator(rows)
    assert set(batch) == {"pixel_values", "labels", "teacher_pixel_values"}
    images = [row["image"] for row in rows]
    assert set(batch["teacher_pixel_values"]) == set(processors)
    for name, processor in processors.items():
        expected = processor(images, return_tensors="pt")["pixel_values"]
        assert torch.equal(batch["teacher_pixel_values"][name], expected), name
    assert torch.equal(batch["pixel_values"], batch["teacher_pixel_values"]["same"])
    assert batch["teacher_pixel_values"]["larger"].shape == (6, 3, 12, 12)
    assert not torch.equal(batch["pixel_values"], batch["teacher_pixel_values"]["darker"])


def test_a_shared_batch_has_the_batch_of_each_student():
    table, _ = with_views([random_image(seed=seed) for seed in range(5)])
    table = table.add_column("inv_logits", table["conv_logits"][::-1], feature=table.features["conv_logits"])
    table = table.add_column("label", [0, 1, -1, 2, 0])
    columns = [["conv_logits", "inv_logits"], ["inv_logits"], [], ["conv_logits", "inv_logits"]]
    rows = [ImageRows(table, ["label"], names, 5, views=RECIPE) for names in columns]
    processors = [image_processor(), image_processor(4), image_processor(), image_processor(mean=0.4)]
    shared = SharedCollator(rows, processors)
    # The rows that are read are at another epoch than those of the students.
    reader = ImageRows(table, ["label"], ["conv_logits", "inv_logits"], 5, views=RECIPE)
    reader.start_epoch(2)
    indices = [3, (0, 1), 2, (0, 2)]
    batch = shared(reader.__getitems__(indices))
    assert len(batch["pixel_values"]) == 3 and len(batch["teacher_logits"]) == 2
    for student, (names, processor) in enumerate(zip(columns, processors)):
        alone = ImageRows(table, ["label"], names, 5, views=RECIPE)
        alone.start_epoch(2)
        collator = DistillationCollator(processor, [name.removesuffix("_logits") for name in names])
        expected, found = collator(alone.__getitems__(indices)), shared.batch_of(student, batch)
        assert found.keys() == expected.keys() == {"pixel_values", "labels"} | ({"teacher_logits"} if names else set())
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_images_of_several_sizes_and_modes_make_one_batch():
    shapes = ((8, 8, 3), (20, 14), (6, 9, 4))
    cells = [encoded(PIL.Image.fromarray(random_pixels(*shape))) for shape in shapes]
    table = cell_table(cells).rename_column("row", "label")
    batch = DistillationCollator(image_processor())(ImageRows(table, ["label"]).__getitems__(range(3)))
    assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["labels"].tolist() == [0, 1, 2]
    # Grayscale: three equal channels.
    assert torch.equal(batch["pixel_values"][1, 0], batch["pixel_values"][1, 2])


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_shuffle_buffer_yields_every_row_once_with_its_own_logits(size):
    logits = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    table = cell_table([gray(i) for i in range(30)], conv_logits=logits)
    ordered = list(StreamedImageRows(stream(table), ["row"], ["conv_logits"], 5))
    rows = StreamedImageRows(stream(table), ["row"], ["conv_logits"], 5, buffer_size=size, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        rows.start_epoch(epoch)
        found = list(rows)
        orders.append([row["row"] for row in found])
        assert sorted(orders[-1]) == list(range(30))
        for row in found:
            np.testing.assert_array_equal(row["conv_logits"], ordered[row["row"]]["conv_logits"])
            assert row["image"].tobytes() == ordered[row["row"]]["image"].tobytes()
        # A row waits for any time, and comes at most the size of the buffer too early.
        assert all(row - place <= size for place, row in enumerate(orders[-1]))
    assert orders[0] == orders[2]
    if size > 1:
        assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_the_mode_of_the_image_column_is_kept():
    colors = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    table = cell_table([encoded(colors)]).cast_column("image", Image(mode="L"))
    expected = np.asarray(table[0]["image"])
    assert expected.ndim == 2
    for row in (ImageRows(table)[0], *StreamedImageRows(stream(table))):
        np.testing.assert_array_equal(np.asarray(row["image"]), np.stack([expected] * 3, axis=-1))
