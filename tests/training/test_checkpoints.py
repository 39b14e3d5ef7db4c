"""Training resumes from whole checkpoints of the same model, and from no others."""

import json
import shutil

import pytest
import torch
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_ibdistill import (
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
)
from hf_ibdistill.training.checkpoints import check_checkpoint, checkpoint_to_resume


NAMES = ["cat", "dog", "eel"]


def student(names=NAMES, **changes):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {**sizes, "intermediate_size": 16, "teacher_names": ("conv", "inv"), "id2label": dict(enumerate(names))}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    return IBViTForImageClassification(IBViTConfig(**{**config, **changes}))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A folder with three checkpoints, as transformers writes them."""
    folder = tmp_path_factory.mktemp("run")
    args = ImageTrainingArguments(str(folder), max_steps=12, save_steps=4, save_strategy="steps", eval_strategy="no")
    args.report_to, args.disable_tqdm = [], True
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    ImageClassificationTrainer(student(), args, train_dataset=images(8), processing_class=processor).train()
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_a_whole_checkpoint_passes_and_the_last_one_is_chosen(run):
    check_checkpoint(run / "checkpoint-4", student())
    given = str(run / "checkpoint-8")
    assert checkpoint_to_resume(given, str(run), student()) == given
    # By number: as text, 8 comes after 12.
    assert checkpoint_to_resume(True, str(run), student()) == str(run / "checkpoint-12")
    assert checkpoint_to_resume(None, str(run), student()) is checkpoint_to_resume(False, "", student()) is None


def vit(**changes):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**{**sizes, "intermediate_size": 16, "num_labels": 3, **changes}))


def swin(**changes):
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(**{**sizes, "num_labels": 3, **changes}))


@pytest.mark.parametrize(("build", "other"), [(vit, {"hidden_size": 32}), (swin, {"embed_dim": 16})])
def test_models_that_transformers_saves_under_other_names_resume(build, other, images, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "eval_strategy": "no", "warmup_steps": 0}
    args = ImageTrainingArguments(str(tmp_path), **settings, report_to=[], disable_tqdm=True)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})

    def train(checkpoint):
        torch.manual_seed(0)
        trainer = ImageClassificationTrainer(build(), args, train_dataset=images(8), processing_class=processor)
        trainer.train(checkpoint)
        return trainer

    whole = train(None).model.state_dict()
    resumed = train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, resumed.model.state_dict()[name]) for name, tensor in whole.items())
    resumed.model = build()
    resumed.state.best_model_checkpoint = str(tmp_path / "checkpoint-4")
    resumed._load_best_model()
    assert all(torch.equal(tensor, resumed.model.state_dict()[name]) for name, tensor in whole.items())
    with pytest.raises(ValueError, match="belongs to another model"):
        check_checkpoint(tmp_path / "checkpoint-2", build(**other))


NEEDED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("is_missing", [False, True], ids=["half", "missing"])
def test_a_checkpoint_that_is_not_whole_is_named_and_skipped(name, is_missing, copied, caplog):
    path = copied / "checkpoint-12" / name
    content = path.read_bytes()
    path.unlink()
    if not is_missing:
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"checkpoint-12 is not a whole checkpoint, because .*{name}"):
        checkpoint_to_resume(copied / "checkpoint-12", str(copied), student())
    assert checkpoint_to_resume(True, str(copied), student()) == str(copied / "checkpoint-8")
    assert "checkpoint-12 is not a whole checkpoint" in caplog.text and name in caplog.text


def test_random_states_that_are_missing_are_mentioned(copied, caplog):
    check_checkpoint(copied / "checkpoint-4", student())
    assert "rng_state" not in caplog.text
    (copied / "checkpoint-4" / "rng_state.pth").unlink()
    check_checkpoint(copied / "checkpoint-4", student())
    assert "checkpoint-4 has no rng_state.pth" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rng_state.pth", ""),
        ("rng_state.pth", "PK"),
        ("trainer_state.json", "{}"),
        ("trainer_state.json", "[]"),
        ("config.json", "[]"),
    ],
)
def test_files_with_other_content_are_not_whole(name, content, copied):
    (copied / "checkpoint-4" / name).write_text(content)
    with pytest.raises(ValueError, match=f"not a whole checkpoint, because {name}"):
        check_checkpoint(copied / "checkpoint-4", student())


def test_without_a_whole_checkpoint_there_is_an_error(copied, tmp_path):
    for folder in copied.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    for folder, message in (
        (copied, "checkpoint-4 is not"),
        (tmp_path, "no checkpoint"),
        (tmp_path / "x", "no check"),
    ):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint=True: .*{message}"):
            checkpoint_to_resume(True, str(folder), student())
    with pytest.raises(ValueError, match="no such folder"):
        check_checkpoint(tmp_path / "x", student())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The same shapes: only the names differ.
        ({"teacher_names": ("inv", "conv")}, "teacher_names .*conv.* instead of .*inv"),
        ({"teacher_names": ("conv",)}, "teacher_names"),
        ({"names": ["cat", "dog", "owl"]}, "id2label .*eel.* instead of .*owl"),
        ({"names": ["cat", "dog"]}, "id2label"),
        ({"hidden_size": 32}, r"shape \(.*16.*\) instead of \(.*32.*\).*more"),
        ({"num_hidden_layers": 2}, "layers.1.* has the shape None instead of"),
        ({"patch_size": 2}, "position_embeddings"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(changes, message, run):
    for given in (str(run / "checkpoint-4"), True):
        with pytest.raises(ValueError, match=f"belongs to another model: .*{message}"):
            checkpoint_to_resume(given, str(run), student(**changes))


def test_an_index_that_names_a_missing_file(copied):
    folder = copied / "checkpoint-4"
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no model-00001-of-00002.safetensors"):
        check_checkpoint(folder, student())
