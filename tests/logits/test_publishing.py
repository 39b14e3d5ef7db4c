import json

import pytest

from hf_ibdistill import (
    ViewRecipe,
    attach_teacher_logits,
    export_logits_table,
    open_logits_table,
    record_teacher_logits,
)
from hf_ibdistill.logits.provenance import read_records


@pytest.fixture(scope="module", params=[None, 2], ids=["dense", "top-k"])
def table(request, teachers, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t") / "t"
    return record_teacher_logits(
        images(30), teachers, output_dir=folder, views=ViewRecipe(num_views=2), top_k=request.param
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_types_and_provenance_come_back(table, streaming, tmp_path):
    opened = open_logits_table(export_logits_table(table, tmp_path / "p", rows_per_file=12), streaming=streaming)
    assert opened.features == table.features
    assert read_records(opened) == read_records(table)
    assert [row["conv_logits"] for row in opened] == table["conv_logits"][:]
    assert len(list((tmp_path / "p" / "data").iterdir())) == 3


def test_logits_without_images_find_their_images(table, images, tmp_path):
    folder = export_logits_table(table.select_columns(["row_key", "conv_logits"]), tmp_path / "p")
    joined = attach_teacher_logits(images(30), open_logits_table(folder))
    assert joined["conv_logits"][:] == table["conv_logits"][:]


def test_nothing_is_overwritten_and_provenance_is_needed(table, tmp_path):
    folder = export_logits_table(table, tmp_path / "p")
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        export_logits_table(table, folder)
    record = folder / "provenance.json"
    assert json.loads(record.read_text())["teachers"][0]["name"] == "conv"
    record.unlink()
    with pytest.raises(ValueError, match="has no provenance.json"):
        open_logits_table(folder)
    bare = table.select_columns(["image"])
    bare.info.description = ""
    with pytest.raises(ValueError, match="carries 0 provenance records"):
        export_logits_table(bare, tmp_path / "q")
