import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value, concatenate_datasets, load_from_disk

from hf_ibdistill import ViewRecipe, attach_teacher_logits, record_teacher_logits
from hf_ibdistill.logits.provenance import read_records, stored_views


@pytest.fixture(scope="module")
def published(teachers, images, tmp_path_factory):
    """A table of logits without the images."""
    folder = tmp_path_factory.mktemp("published")
    table = record_teacher_logits(images(30), teachers, output_dir=folder / "t", views=ViewRecipe(num_views=2))
    table.select_columns(["row_key", "conv_logits", "inv_logits"]).save_to_disk(folder / "published")
    return load_from_disk(folder / "published")


def by_note(table):
    rows = table.with_format("numpy", columns=["conv_logits", "inv_logits"], output_all_columns=True)
    return {row["note"]: (row["conv_logits"].tolist(), row["inv_logits"].tolist()) for row in rows}


def test_logits_find_their_images_in_any_order(published, images, teachers, tmp_path):
    whole = by_note(record_teacher_logits(images(30), teachers, output_dir=tmp_path, views=ViewRecipe(num_views=2)))
    own = images(30).shuffle(seed=3).select(range(4, 25))
    joined = attach_teacher_logits(own, published.shuffle(seed=5))
    assert joined["note"][:] == own["note"][:]
    assert by_note(joined) == {note: whole[note] for note in own["note"]}
    assert stored_views(joined) == ViewRecipe(num_views=2)
    assert read_records(joined) == read_records(published)


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


def test_images_without_a_partner_are_named_or_left_out(published, images, caplog):
    more = images(33).shuffle(seed=0)
    strangers = [row for row, note in enumerate(more["note"]) if int(note.split()[1]) >= 30]
    with pytest.raises(ValueError, match=rf"3 of 33 images have no recorded logits \(rows \[{strangers[0]}, "):
        attach_teacher_logits(more, published)
    joined = attach_teacher_logits(more, published, skip_missing=True)
    assert joined["note"][:] == [note for row, note in enumerate(more["note"]) if row not in strangers]
    assert "3 of 33 images have no recorded logits" in caplog.text


def test_several_processes_give_the_same(published, images):
    one, two = (attach_teacher_logits(images(30), published, num_workers=n) for n in (None, 2))
    assert by_note(one) == by_note(two)


def test_wrong_tables_are_refused(published, images):
    with pytest.raises(ValueError, match='needs the column "row_key" and a logits column; its columns are image'):
        attach_teacher_logits(images(3), images(3))
    joined = attach_teacher_logits(images(3), published)
    with pytest.raises(ValueError, match=r"already have the columns \['row_key', 'conv_logits', 'inv_logits'\]"):
        attach_teacher_logits(joined, published)
    no_image = Dataset.from_dict({"x": [1]}, features=Features({"x": Value("int64")}))
    with pytest.raises(ValueError, match="There is no image column; the columns are x"):
        attach_teacher_logits(no_image, published)
