"""Published logits find the images that they were recorded for."""

import numpy as np
import pytest
from comparing import same_bytes
from datasets import Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_from_disk

from hf_ibdistill import ViewRecipe, attach_teacher_logits, record_teacher_logits
from hf_ibdistill.logits.provenance import read_records, stored_views


@pytest.fixture(scope="module")
def recorded(loaded, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    return record_teacher_logits(images(30), loaded, output_dir=folder, views=ViewRecipe(num_views=2))


@pytest.fixture(scope="module")
def published(recorded, tmp_path_factory):
    """A table of logits without the images."""
    folder = tmp_path_factory.mktemp("published")
    recorded.select_columns(["row_key", "conv_logits", "inv_logits"]).save_to_disk(folder)
    return load_from_disk(folder)


def by_note(table):
    rows = table.with_format("numpy", columns=["conv_logits", "inv_logits"], output_all_columns=True)
    return {row["note"]: (row["conv_logits"].tolist(), row["inv_logits"].tolist()) for row in rows}


def test_logits_find_their_images_in_any_order(recorded, published, images):
    whole = by_note(recorded)
    own = images(30).shuffle(seed=3).select(range(4, 25))
    joined = attach_teacher_logits(own, published.shuffle(seed=5))
    assert joined["note"][:] == own["note"][:]
    assert by_note(joined) == {note: whole[note] for note in own["note"]}
    assert stored_views(joined) == ViewRecipe(num_views=2)
    assert read_records(joined) == read_records(published)


def test_columns_of_any_name_become_image_and_label(recorded, published, images):
    named = images(30).rename_columns({"image": "picture", "label": "animal"})
    joined = attach_teacher_logits(named, published, image_column="picture")
    assert joined.column_names == ["image", "label", "note", "row_key", "conv_logits", "inv_logits"]
    assert same_bytes(joined, recorded)
    # The only image column is found.
    assert same_bytes(attach_teacher_logits(named, published), joined)


def test_other_encodings_of_the_same_pixels_are_the_same_image(published, images):
    def as_bitmap(row):
        return {"image": np.asarray(row["image"].convert("RGB"))}

    features = images(30).features
    bitmaps = images(30).map(as_bitmap, features=features)
    encoded = (table.cast_column("image", Image(decode=False)) for table in (bitmaps, images(30)))
    assert next(encoded)[0]["image"]["bytes"] != next(encoded)[0]["image"]["bytes"]
    assert by_note(attach_teacher_logits(bitmaps, published)) == by_note(attach_teacher_logits(images(30), published))


def test_repeated_images_share_their_logits(published, images):
    twice = concatenate_datasets([images(5), images(5)])
    joined = attach_teacher_logits(twice, published)
    assert joined["row_key"][:5] == joined["row_key"][5:]
    assert joined["conv_logits"][:5] == joined["conv_logits"][5:]


def test_images_without_a_partner_are_named_or_left_out(published, images, caplog):
    more = images(33).shuffle(seed=0)
    strangers = [row for row, note in enumerate(more["note"]) if int(note.split()[1]) >= 30]
    with pytest.raises(ValueError, match=rf"3 of 33 images .*\(rows \[{strangers[0]}, .*skip_missing=True"):
        attach_teacher_logits(more, published)
    joined = attach_teacher_logits(more, published, skip_missing=True)
    assert joined["note"][:] == [note for row, note in enumerate(more["note"]) if row not in strangers]
    assert "3 of 33 images" in caplog.text


def test_several_processes_give_the_same(recorded, published, images):
    assert same_bytes(attach_teacher_logits(images(30), published, num_workers=2), recorded)


def test_wrong_tables_are_refused(published, images):
    joined = attach_teacher_logits(images(3), published)
    no_image = Dataset.from_dict({"x": [1]}, features=Features({"x": Value("int64")}))
    for own, table, kind, message in (
        (images(3), images(3), ValueError, '"row_key" and a logits column; its columns are image'),
        (joined, published, ValueError, r"already have the columns \['row_key', 'conv_logits', 'inv_logits'\]"),
        (no_image, published, ValueError, "no image column; the columns are x"),
        (DatasetDict({"train": images(3)}), published, TypeError, "^images .*train"),
        (images(3), published.to_iterable_dataset(), TypeError, "^logits_table .*IterableDataset"),
    ):
        with pytest.raises(kind, match=message):
            attach_teacher_logits(own, table)
