"""Fine-tuning a saved student: by the command, and with transformers alone."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from running import ENVIRONMENT, run, run_process
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from hf_ibdistill import IBViTConfig, IBViTForImageClassification
from hf_ibdistill.students import build_student


COLORS = ["blue", "green", "red"]
SHAPE = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
SHAPE["num_hidden_layers"] = 3
PARTS = ["ibvit.embeddings.", *(f"ibvit.layers.{i}." for i in range(3)), "ibvit.layernorm."]
# Evaluation after every epoch would take longer than training.
QUICK = ["--disable_tqdm", "--eval_strategy", "no", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of class folders of noise in one color."""
    folder, random = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, name in [(split, name) for split in ("train", "test") for name in COLORS]:
        (folder / split / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 80, (10, 12, 3), dtype=np.uint8)
            pixels[..., 2 - COLORS.index(name)] += 120
            PIL.Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A saved student of ten digits and two teachers."""
    folder = tmp_path_factory.mktemp("somewhere") / "student"
    torch.manual_seed(0)
    digits = {str(digit): digit for digit in range(10)}
    config = IBViTConfig(**SHAPE, id2label={i: name for name, i in digits.items()}, label2id=digits)
    IBViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


def tune(student, images, output_dir, *arguments):
    """The weights before and after, by name."""
    run("finetune", "--model", student, "--dataset", images, *QUICK, *arguments, "--output_dir", output_dir)
    return [load_file(folder / "model.safetensors") for folder in (student, output_dir)]


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_student_learns_other_classes_and_is_saved_with_its_results(student, images, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    tune(student, images, tuned, "--num_train_epochs", "15", "--learning_rate", "2e-3", "--layer_decay", "0.9")
    results = results_in(tuned)
    assert results["split"] == "test" and results["metrics"]["accuracy"] == 1.0
    # Teachers have no part, yet no head is left as it started.
    assert min(results["metrics"][f"{name}_token_accuracy"] for name in ("class", "conv", "inv")) == 1.0
    assert capsys.readouterr().out.rstrip().endswith(json.dumps(results["metrics"], indent=2))
    card = (tuned / "README.md").read_text()
    text = " ".join(card.split())
    assert "the model student on labels alone" in text and "(conv, inv)" in text
    assert "Every head learned the labels." in card and "taught by" not in card and "logits were stored" not in card
    assert str(student) not in card and "| accuracy | 1.0000 |" in card
    recipe = {"layer_decay": 0.9, "freeze_layers": 0, "linear_probe": False}
    assert {name: results["recipe"][name] for name in recipe} == recipe
    config = json.loads((tuned / "config.json").read_text())
    assert list(config["id2label"].values()) == COLORS
    assert (config["fusion"], config["teacher_names"]) == ("mean_probabilities", ["conv", "inv"])
    # The preprocessing of the student, not that of a model from nothing.
    assert json.loads((tuned / "preprocessor_config.json").read_text())["image_mean"] == [0.4, 0.5, 0.6]
    classify = pipeline("image-classification", model=str(tuned))
    for name in COLORS:
        assert classify(str(images / "test" / name / "0.png"))[0]["label"] == name
    run("evaluate", "--model", tuned, "--dataset", images)
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(results["metrics"], rel=1e-4)
    # Again on the same classes: its heads stay, and it is as good before the first step.
    tune(tuned, images, tmp_path / "again", "--max_steps", "1", "--learning_rate", "1e-9")
    assert results_in(tmp_path / "again")["metrics"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("flags", "frozen", "setting"),
    [
        (["--freeze_layers", "2", "--layer_decay", "0.8"], tuple(PARTS[:3]), "| freeze_layers | `2` |"),
        (["--linear_probe"], ("ibvit.",), "| linear_probe | `True` |"),
    ],
)
def test_frozen_layers_stay_as_they_are(flags, frozen, setting, student, images, tmp_path):
    before, after = tune(student, images, tmp_path, "--max_steps", "2", *flags)
    assert before.keys() == after.keys()
    for name in before:
        is_same = before[name].shape == after[name].shape and torch.equal(before[name], after[name])
        assert is_same == name.startswith(frozen), name
    assert setting in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("flags", "rate"), [([], 2e-4), (["--linear_probe"], 1e-3)])
def test_a_teacher_from_a_model_takes_the_default_rate_of_its_kind(flags, rate, student, images, tmp_path):
    """Adam's first step is the learning rate, so it is on the weights as well as in the results."""
    flags += [
        "--max_steps",
        "1",
        "--warmup_steps",
        "0",
        "--weight_decay",
        "0",
        "--adam_epsilon",
        "1e-12",
        "--num_views",
        "1",
    ]
    run("train-teacher", "--model", student, "--dataset", images, "--output_dir", tmp_path, *flags)
    assert results_in(tmp_path)["recipe"]["learning_rate"] == rate
    before, after = load_file(student / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    same_shape = [name for name in before if before[name].shape == after[name].shape]
    largest = max((after[name] - before[name]).abs().max().item() for name in same_shape)
    # A probe changes new heads alone.
    assert largest == (0 if "--linear_probe" in flags else pytest.approx(rate, rel=0.02))


def test_each_layer_takes_steps_of_its_own_size(student, images, tmp_path):
    rates = ["--learning_rate", "1e-2", "--layer_decay", "0.5", "--weight_decay", "0"]
    before, after = tune(student, images, tmp_path, "--max_steps", "1", "--adam_epsilon", "1e-12", *rates)
    for halvings, part in enumerate(reversed(PARTS)):
        steps = [(after[name] - before[name]).abs().max().item() for name in before if name.startswith(part)]
        # Adam's first step is the learning rate, whatever the gradient.
        assert max(steps) == pytest.approx(1e-2 / 2**halvings, rel=0.02), part


def test_an_interrupted_run_ends_the_same(student, images, tmp_path):
    settings = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--layer_decay", "0.7"]
    settings += ["--freeze_layers", "1", "--per_device_train_batch_size", "8"]
    _, expected = tune(student, images, tmp_path / "whole", *settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not (checkpoint / "training_args.bin").exists()
    _, resumed = tune(student, images, tmp_path / "resumed", *settings, "--resume_from_checkpoint", checkpoint)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert results_in(tmp_path / "resumed")["recipe"]["steps"] == 4
    shutil.copytree(checkpoint, tmp_path / "last" / "checkpoint-2")
    _, resumed = tune(student, images, tmp_path / "last", *settings, "--resume_from_checkpoint", "true")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["student", "vit"])
def test_a_larger_image_size_from_a_student_or_a_vit(kind, student, images, tmp_path):
    if kind == "vit":
        student = tmp_path / "vit"
        ViTForImageClassification(ViTConfig(**SHAPE)).save_pretrained(student)
        # As DeiT's: resized, then the middle cut out.
        sides = {"size": {"height": 9, "width": 9}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True}
        ViTImageProcessor(**sides).save_pretrained(student)
    sizes = ["--image_size", "16", "--fusion", "class_token", "--label_smoothing_factor", "0.1", "--max_steps", "1"]
    tune(student, images, tmp_path / "tuned", *sizes, "--num_views", "2")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert (config["image_size"], config["fusion"], config["model_type"]) == (16, "class_token", "ibvit")
    label = pipeline("image-classification", model=str(tmp_path / "tuned"))(str(images / "test" / "red" / "0.png"))
    assert {found["label"] for found in label} == set(COLORS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze_layers", "4"], "num_layers=4"),
        (["--freeze_layers", "1", "--linear_probe"], "freeze_layers=1"),
        (["--layer_decay", "2"], "layer_decay=2.0"),
        (["--image_size", "10"], "image_size=10"),
        (["--fusion", "median"], 'fusion="median"'),
        (["--model", "./nowhere"], "./nowhere"),
        (["--resume_from_checkpoint", "true"], "checkpoint"),
    ],
)
def test_mistakes_end_before_training(arguments, message, student, images, tmp_path):
    with pytest.raises(SystemExit) as exit:
        tune(student, images, tmp_path, *arguments)
    assert message in exit.value.code
    assert "\n" not in exit.value.code and not list(tmp_path.rglob("*.*"))


# Nothing of this package: a fine-tuning script as anybody writes it for any image classifier.
STOCK = """
import sys

import torch
from datasets import load_dataset
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

student, images, output_dir = sys.argv[1:]
splits = load_dataset("imagefolder", data_dir=images)
names = splits["train"].features["label"].names
processor = AutoImageProcessor.from_pretrained(student, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(
    student,
    trust_remote_code=True,
    ignore_mismatched_sizes=True,
    num_labels=len(names),
    id2label=dict(enumerate(names)),
    label2id={name: i for i, name in enumerate(names)},
    fusion="class_token",
)
size = (processor.size["height"], processor.size["width"])
scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(processor.image_mean, processor.image_std)]
transforms = {
    "train": v2.Compose([v2.RandomResizedCrop(size, scale=(0.5, 1)), v2.RandomHorizontalFlip(), *scale]),
    "test": v2.Compose([v2.Resize(size), *scale]),
}
for split, transform in transforms.items():
    splits[split] = splits[split].with_transform(
        lambda rows, transform=transform: {
            "pixel_values": [transform(image.convert("RGB")) for image in rows["image"]],
            "label": rows["label"],
        }
    )


def collate(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


args = TrainingArguments(
    output_dir, use_cpu=True, learning_rate=2e-3, num_train_epochs=15, per_device_train_batch_size=15,
    remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True,
)
trainer = Trainer(
    model, args, data_collator=collate, train_dataset=splits["train"], eval_dataset=splits["test"],
    compute_metrics=accuracy, processing_class=processor,
)
trainer.train()
print(trainer.evaluate()["eval_accuracy"])
trainer.save_model()
classify = pipeline("image-classification", model=output_dir, trust_remote_code=True)
print([classify(f"{images}/test/{name}/0.png")[0]["label"] for name in names])
print("hf_ibdistill" in sys.modules)
"""


def test_transformers_alone_fine_tunes_a_saved_student(student, images, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    printed = run_process("-c", STOCK, student, images, tmp_path / "tuned").splitlines()
    assert printed[-3:] == ["1.0", str(COLORS), "False"]
    code = {"configuration_ibvit.py", "modeling_ibvit.py", "involution.py", "involution_triton.py"}
    assert code <= {path.name for path in (tmp_path / "tuned").iterdir()}


@pytest.mark.parametrize(("name", "value"), [("layer_decay", "0.0"), ("layer_decay", "nan"), ("freeze_layers", "-1")])
def test_numbers_out_of_range_are_refused_before_anything_is_read(name, value, tmp_path):
    arguments = ["--model", tmp_path / "none", "--dataset", tmp_path / "none", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=f"{name}={value}"):
        run("finetune", *arguments, f"--{name}", value)


def test_a_size_that_a_model_does_not_take_is_refused_before_training(images, tmp_path):
    tower = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 8,
    }
    build_student("siglip", image_size=32, vision_config=tower, num_labels=3).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    for command in ("finetune", "train-teacher"):
        with pytest.raises(SystemExit, match="SiglipForImageClassification.*48.*image_size"):
            run(
                command,
                "--model",
                tmp_path / "model",
                "--image_size",
                48,
                "--dataset",
                images,
                "--output_dir",
                tmp_path / "out",
            )
