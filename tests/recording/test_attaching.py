"""Published logits find the images that they were recorded for."""

import numpy as np
import pytest
from comparing import same_bytes
from datasets import Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_from_disk

from hf_ibdistill import ViewRecipe, attach_teacher_logits, record_teacher_logits, rows
from hf_ibdistill.logits.provenance import read_records, stored_views


@pytest.fixture(scope="module")
def recorded(loaded, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    return record_teacher_logits(images(30), loaded, output_dir=folder, views=ViewRecipe(num_views=2))


@pytest.fixture(scope="module")
def published(recorded, tmp_path_factory):
    """A table of logits without the images."""
    folder = tmp_path_factory.mktemp("published")
    recorded.remove_columns(["image", "label", "note"]).save_to_disk(folder)
    return load_from_disk(folder)


@pytest.fixture
def other_decoder(monkeypatch):
    """Images that come out of their files one level brighter, as other versions of a JPEG library make them."""
    decode = rows.decode_image
    monkeypatch.setattr(rows, "decode_image", lambda *args: decode(*args).point(lambda level: min(level + 1, 255)))


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
    assert joined.column_names == ["image", "label", "note", "row_key", "file_key", "conv_logits", "inv_logits"]
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


def test_another_decoder_finds_the_files(recorded, published, images, loaded, other_decoder, caplog, tmp_path):
    own = images(30).shuffle(seed=1)
    joined = attach_teacher_logits(own, published)
    assert by_note(joined) == by_note(recorded)
    assert "30 of 30 images" in caplog.text and "same files" in caplog.text
    # Training makes the views that the teachers saw, from the recorded key.
    keys = dict(zip(recorded["note"], recorded["row_key"]))
    assert joined["row_key"][:] == [keys[note] for note in own["note"]]
    # So does a recording of more views.
    more = record_teacher_logits(joined, loaded, output_dir=tmp_path / "more", views=ViewRecipe(num_views=3))
    assert more["row_key"][:] == joined["row_key"][:] and more["file_key"][:] == joined["file_key"][:]
    assert [views[:2] for views in more["conv_logits"]] == joined["conv_logits"][:]


def test_without_file_keys_the_message_names_the_decoder(published, images, other_decoder):
    of_version_0_1_0 = published.remove_columns("file_key")
    with pytest.raises(ValueError, match="3 of 3 images .*decoder.*file_key"):
        attach_teacher_logits(images(3), of_version_0_1_0)


def test_a_table_of_an_earlier_version_still_matches_pixels(recorded, published, images):
    joined = attach_teacher_logits(images(30), published.remove_columns("file_key"))
    assert same_bytes(joined, recorded.remove_columns("file_key"))
    some = published.map(
        lambda row, number: {"file_key": None if number < 20 else row["file_key"]},
        with_indices=True,
        features=published.features,
    )
    assert by_note(attach_teacher_logits(images(30), some)) == by_note(recorded)


def test_one_decoded_image_is_held_at_a_time(published, images, monkeypatch):
    alive, most = [0], [0]
    decode = rows.decode_image

    class Counted:
        def __init__(self, image):
            self.size, self.tobytes = image.size, image.tobytes
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    monkeypatch.setattr(rows, "decode_image", lambda *args: Counted(decode(*args)))
    attach_teacher_logits(images(30), published.remove_columns("file_key"))
    assert 1 <= most[0] <= 2


def test_images_of_known_files_are_not_decoded(published, images, monkeypatch):
    decoded, decode = [], rows.decode_image
    monkeypatch.setattr(rows, "decode_image", lambda *args: decoded.append(1) or decode(*args))
    monkeypatch.setattr("hf_ibdistill.recording.attaching._SAMPLE", 5)
    attach_teacher_logits(images(30), published)
    assert len(decoded) == 5
    # Three of the images have no partner, by file or pixels.
    attach_teacher_logits(images(33), published, skip_missing=True)
    assert len(decoded) == 5 + 5 + 3


def test_several_processes_give_the_same(recorded, published, images):
    assert same_bytes(attach_teacher_logits(images(30), published, num_workers=2), recorded)


def test_wrong_tables_are_refused(published, images):
    joined = attach_teacher_logits(images(3), published)
    no_image = Dataset.from_dict({"x": [1]}, features=Features({"x": Value("int64")}))
    for own, table, kind, message in (
        (images(3), images(3), ValueError, '"row_key" and a logits column; its columns are image'),
        (
            joined,
            published,
            ValueError,
            r"already have the columns \['row_key', 'file_key', 'conv_logits', 'inv_logits'\]",
        ),
        (no_image, published, ValueError, "no image column; the columns are x"),
        (DatasetDict({"train": images(3)}), published, TypeError, "^images .*train"),
        (images(3), published.to_iterable_dataset(), TypeError, "^logits_table .*IterableDataset"),
    ):
        with pytest.raises(kind, match=message):
            attach_teacher_logits(own, table)
