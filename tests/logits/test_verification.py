import numpy as np
import pytest
from datasets import concatenate_datasets, load_from_disk

from hf_ibdistill import ViewRecipe, record_teacher_logits, verify_teacher_logits


@pytest.fixture(scope="module", params=["plain", "views", "top-k views"])
def folder(request, teachers, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified") / "t"
    views = None if request.param == "plain" else ViewRecipe(num_views=3, horizontal_flip=0.5)
    top_k = 2 if request.param == "top-k views" else None
    record_teacher_logits(images(40), teachers, output_dir=folder, views=views, top_k=top_k)
    return folder


def test_an_untouched_table_passes(folder, teachers):
    found = verify_teacher_logits(load_from_disk(folder), teachers)
    assert found.problems == [] and found.num_rows == 40
    assert all(0 <= difference < 0.02 for difference in found.largest_differences.values())
    assert verify_teacher_logits(load_from_disk(folder), teachers, num_rows=7).num_rows == 7


def test_changed_logits_are_found(folder, teachers):
    table = load_from_disk(folder)
    rolled = table.select(np.roll(np.arange(40), 1)).select_columns(["conv_logits"])
    tampered = concatenate_datasets([table.remove_columns("conv_logits"), rolled], axis=1)
    (problem,) = verify_teacher_logits(tampered, teachers).problems
    assert problem.startswith('"conv_logits" differs from what the teacher says in')


def test_other_images_are_found(folder, teachers, images):
    table = load_from_disk(folder)
    moved = images(40).select(np.roll(np.arange(40), 1)).select_columns(["image"])
    tampered = concatenate_datasets([table.remove_columns("image"), moved], axis=1)
    problems = verify_teacher_logits(tampered, teachers).problems
    assert any("The images of 40 rows are not the ones that were recorded" in problem for problem in problems)


def test_another_teacher_is_found(folder, teachers, save_teacher, tmp_path):
    other = {**teachers, "conv": save_teacher(tmp_path / "other", seed=5)}
    problems = verify_teacher_logits(load_from_disk(folder), other).problems
    assert any('"conv" is not the one that was recorded: weights_sha256' in problem for problem in problems)


def test_a_changed_file_is_found(teachers, images, tmp_path):
    table = record_teacher_logits(images(40), teachers, output_dir=tmp_path)
    data = tmp_path / "data-00000-of-00001.arrow"
    content = bytearray(data.read_bytes())
    # The last row's logits stand shortly before the end of the file.
    changed = content.rfind(table[39]["note"].encode())
    content[changed] ^= 1
    data.write_bytes(content)
    problems = verify_teacher_logits(load_from_disk(tmp_path), teachers).problems
    assert "The file data-00000-of-00001.arrow is not the one that recording wrote." in problems


def test_what_cannot_be_verified_is_refused(folder, teachers, images):
    with pytest.raises(ValueError, match='no column "x_logits", or no provenance of it; its columns are image'):
        verify_teacher_logits(load_from_disk(folder), {"x": teachers["conv"]})
    table = load_from_disk(folder)
    table.info.description = ""
    with pytest.raises(ValueError, match='no column "conv_logits", or no provenance'):
        verify_teacher_logits(table, teachers)
