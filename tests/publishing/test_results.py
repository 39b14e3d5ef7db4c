"""The folder of a finished run: model, image processor, results and card, all of the same facts."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets, load_from_disk
from huggingface_hub import ModelCard
from running import run_process
from transformers import ViTImageProcessor

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    attach_record,
    evaluate_and_save,
    evaluate_model,
    predict,
)
from hf_ibdistill.publishing.machine import describe_machine
from hf_ibdistill.publishing.predictions import Predictions
from hf_ibdistill.publishing.results import _count_unlabelled, _describe_teachers


CLASSES = ["cat", "dog", "owl", "fox", "cow", "hen"]
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6])
TEACHER_METRICS = {"conv": {"accuracy": 0.8125}, "inv": {"accuracy": 0.6875}}


def small_table(num_rows, seed):
    rng = np.random.default_rng(seed)
    features = {"picture": Image(), "animal": ClassLabel(names=CLASSES)}
    columns = {"picture": list(rng.integers(0, 256, (num_rows, 8, 8, 3), dtype=np.uint8))}
    columns["animal"] = rng.integers(0, len(CLASSES), num_rows)
    for name in ("conv", "inv"):
        features[f"{name}_logits"] = List(Value("float16"), length=len(CLASSES))
        columns[f"{name}_logits"] = list(rng.normal(size=(num_rows, len(CLASSES))).astype(np.float16))
    return Dataset.from_dict(columns, features=Features(features))


class Run(NamedTuple):
    kind: str
    folder: object
    trainer: object
    metrics: dict


def trained(kind, data, output_dir, columns=(None, None), **overrides):
    """A trainer after 2 epochs of a student or a teacher, and what its card is given."""
    torch.manual_seed(0)
    classes = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 5}
    settings |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, **overrides}
    shared = {"train_dataset": data["train"], "eval_dataset": data["test"], "processing_class": PROCESSOR}
    shared |= dict(zip(("image_column", "label_column"), columns))
    if kind == "teacher":
        shape = {"embedding_size": 16, "hidden_sizes": (16,), "depths": (1,), "downsample_strides": (1,)}
        config = IBResNetConfig(
            spatial_operator="involution", stem="plain", kernel_size=3, reduction=1, **shape, **classes
        )
        model, args = IBResNetForImageClassification(config), ImageTrainingArguments(str(output_dir), **settings)
        trainer = ImageClassificationTrainer(model, args, **shared)
        card = {"title": "A teacher", "data_name": "animals"}
    else:
        shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        model = IBViTForImageClassification(IBViTConfig(intermediate_size=32, **shape, **classes))
        args = DistillationArguments(str(output_dir), temperature=[2.0, 3.0], teacher_weights=0.5, **settings)
        trainer = EnsembleDistillationTrainer(model, args, **shared)
        card = {"title": "A student", "data_name": "animals", "teacher_metrics": TEACHER_METRICS}
        card["notes"] = "A note on this run."
    trainer.train()
    return trainer, card


def finish(kind, tables, output_dir, **overrides):
    """Train a student or a teacher, then save it."""
    data = {name: load_from_disk(tables / name) for name in ("train", "test")}
    trainer, card = trained(kind, data, output_dir, **overrides)
    return Run(kind, output_dir, trainer, evaluate_and_save(trainer, data["test"], "test", **card))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """21 rows to train on; 13 to measure on, which batches of 5 do not divide."""
    folder = tmp_path_factory.mktemp("tables")
    small_table(21, seed=0).save_to_disk(folder / "train")
    small_table(13, seed=1).save_to_disk(folder / "test")
    return folder


@pytest.fixture(scope="module")
def runs(tables, tmp_path_factory):
    """A finished run of a student and one of a teacher."""
    # As in the tests: another number of threads rounds differently.
    torch.set_num_threads(1)
    return {kind: finish(kind, tables, tmp_path_factory.mktemp(kind)) for kind in ("student", "teacher")}


@pytest.fixture(params=["student", "teacher"])
def finished(request, runs):
    return runs[request.param]


def results_in(folder):
    # Strictly JSON: "NaN" is not.
    def refuse(constant):
        raise AssertionError(f"results.json has {constant}")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


def rows_of_table(text, header):
    """name → value of the Markdown table under this header."""
    body = text.split(f"| {header} |\n| --- | --- |\n")[1].split("\n\n")[0]
    return dict(re.fullmatch(r"\| (.+) \| (.+) \|", line).groups() for line in body.splitlines())


def test_the_folder_holds_what_from_pretrained_needs_and_no_pickle(finished):
    kind, folder, _, _ = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # Its code as well, for those who have transformers alone.
    family = "ibvit" if kind == "student" else "ibresnet"
    code = {f"configuration_{family}.py", f"modeling_{family}.py", "involution.py", "involution_triton.py"}
    code |= {"conversion_vit.py"} if kind == "student" else set()
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "results.json", "README.md"} | code
    pictures = {"classes", "calibration", "examples", "curves"} | ({"attention"} if kind == "student" else set())
    expected |= {"predictions.safetensors", "report.html", *(f"pictures/{name}.png" for name in pictures)}
    assert expected == files
    name = "IBViT" if kind == "student" else "IBResNet"
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": f"configuration_{family}.{name}Config",
        **({"AutoModel": "modeling_ibvit.IBViTModel"} if kind == "student" else {}),
        "AutoModelForImageClassification": f"modeling_{family}.{name}ForImageClassification",
    }


NEW_PROCESS = """
import json
import sys

attempts = []

def forbid(event, arguments):
    # Collected as well: a library might catch the error and go on.
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        attempts.append(event)
        raise OSError("there is no network")

sys.addaudithook(forbid)

import numpy as np
from datasets import load_from_disk
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from hf_ibdistill import build_image_processor, class_config, evaluate_model, load_image_dataset, predict

table, output, *folders = sys.argv[1:]
for number, folder in enumerate(folders):
    model = AutoModelForImageClassification.from_pretrained(folder)
    outputs = predict(model, AutoImageProcessor.from_pretrained(folder), load_from_disk(table), batch_size=5)
    np.savez(f"{output}/outputs-{number}.npz", **outputs)

digits = load_image_dataset("digits")["test"].select(range(20))
sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
model = ViTForImageClassification(ViTConfig(num_attention_heads=2, **sizes, **class_config(digits)))
metrics = evaluate_model(model, build_image_processor(digits), digits)
print(json.dumps({"metrics": sorted(metrics), "attempts": attempts}))
"""


def test_a_new_process_without_network_predicts_the_same(runs, tables, tmp_path):
    folders = [run.folder for run in runs.values()]
    printed = run_process("-c", NEW_PROCESS, tables / "test", tmp_path, *folders)
    for number, run in enumerate(runs.values()):
        expected = predict(run.trainer.model, PROCESSOR, load_from_disk(tables / "test"), batch_size=5)
        with np.load(tmp_path / f"outputs-{number}.npz") as found:
            assert set(found) == set(expected)
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values, err_msg=name)
    # A stock model on the bundled images as well, and no attempt to reach any address.
    names = ["accuracy", "expected_calibration_error", "negative_log_likelihood", "top_5_accuracy"]
    assert json.loads(printed.splitlines()[-1]) == {"metrics": names, "attempts": []}


def test_results_are_the_returned_metrics(finished, tables):
    kind, folder, trainer, metrics = finished
    results = results_in(folder)
    assert results["metrics"] == metrics
    assert results["data"] == "animals" and results["split"] == "test" and results["title"] == f"A {kind}"
    # The log went through JSON unchanged.
    assert results["log_history"] == trainer.state.log_history
    assert sum("eval_accuracy" in entry for entry in results["log_history"]) == 2


def test_metrics_are_those_of_the_saved_model(finished, tables):
    kind, folder, _, metrics = finished
    model_class = IBViTForImageClassification if kind == "student" else IBResNetForImageClassification
    model = model_class.from_pretrained(folder).eval()
    processor, table = ViTImageProcessor.from_pretrained(folder), load_from_disk(tables / "test")
    labels = np.array(table["animal"])
    with torch.no_grad():
        outputs = model(processor(list(table["picture"]), return_tensors="pt")["pixel_values"])
    logits = outputs.logits.double()
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1).numpy() == labels).mean())
    likelihoods = logits.softmax(-1)[torch.arange(len(labels)), torch.tensor(labels)]
    assert metrics["negative_log_likelihood"] == pytest.approx(-likelihoods.log().mean().item(), rel=1e-5)
    names = {"accuracy", "top_5_accuracy", "negative_log_likelihood", "expected_calibration_error"}
    if kind == "student":
        names |= {
            "class_token_accuracy",
            "conv_token_accuracy",
            "inv_token_accuracy",
            "conv_agreement",
            "inv_agreement",
        }
        for i, name in enumerate(["conv", "inv"]):
            choices = np.array(table[f"{name}_logits"]).argmax(-1)
            assert metrics[f"{name}_agreement"] == pytest.approx((logits.argmax(-1).numpy() == choices).mean())
            tokens = outputs.teacher_token_logits[:, i].argmax(-1).numpy()
            assert metrics[f"{name}_token_accuracy"] == pytest.approx((tokens == labels).mean())
    assert set(metrics) == names


@pytest.fixture
def state_of_its_own():
    """Accelerate's mixed precision belongs to the process; here it ends with the test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_metrics_of_a_bf16_run_are_those_of_the_saved_model(state_of_its_own, tables, tmp_path):
    # The weights are float32, and so is the model that `from_pretrained` opens, which the card describes.
    metrics = finish("student", tables, tmp_path, bf16=True).metrics
    model, table = IBViTForImageClassification.from_pretrained(tmp_path).eval(), load_from_disk(tables / "test")
    with torch.no_grad():
        logits = model(PROCESSOR(list(table["picture"]), return_tensors="pt")["pixel_values"]).logits
    likelihood = torch.nn.functional.cross_entropy(logits, torch.tensor(table["animal"])).item()
    assert metrics["negative_log_likelihood"] == pytest.approx(likelihood, rel=1e-6)


def test_the_recipe_is_what_was_run(finished):
    kind, folder, _, _ = finished
    recipe = results_in(folder)["recipe"]
    expected = {"training images": 21, "steps": 6, "epochs": 2.0, "processes": 1, "per_device_train_batch_size": 8}
    expected |= {"learning_rate": 2e-3, "weight_decay": 0.05, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    expected |= {"gradient_accumulation_steps": 1, "seed": 42, "bf16": False}
    if kind == "student":
        expected |= {
            "temperature": [2.0, 3.0],
            "teacher_weights": [0.5],
            "label_weight": 1.0,
            "distillation_mode": "soft",
        }
    assert expected == {name: recipe[name] for name in expected}
    assert ("temperature" in recipe) == (kind == "student")


def test_the_cards_figures_are_the_measured_ones(finished):
    kind, folder, _, metrics = finished
    card = ModelCard.load(folder / "README.md")
    shown = rows_of_table(card.text, "metric | test")
    assert {name: float(value) for name, value in shown.items()} == {
        name: pytest.approx(value, abs=5.1e-5) for name, value in metrics.items()
    }
    # What the Hub reads.
    results = {result.metric_name.replace(" ", "_"): result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == pytest.approx(metrics, abs=1e-6)
    assert all(result.dataset_split == "test" and result.dataset_name == "animals" for result in results.values())
    recipe = results_in(folder)["recipe"]
    assert rows_of_table(card.text, "setting | value") == {name: f"`{value}`" for name, value in recipe.items()}


def test_the_cards_other_parts(finished, tables):
    kind, folder, trainer, _ = finished
    card = ModelCard.load(folder / "README.md")
    assert f"# A {kind}\n" in card.text and "`animals`" in card.text
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert f"{parameters:,} parameters, 6 classes" in card.text
    if kind == "student":
        # These tables have no record, so the sources of the teachers are not known.
        shown = rows_of_table(card.text, "teacher | accuracy (test)")
        # The accuracies of the teachers are given; that of their mean probability follows from the columns.
        table = load_from_disk(tables / "test")
        logits = np.array([table[name] for name in ("conv_logits", "inv_logits")], np.float64)
        mean = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(0)
        accuracy = (mean.argmax(-1) == np.array(table["animal"])).mean()
        assert shown == {"conv": "81.25 %", "inv": "68.75 %", "mean probability": f"{100 * accuracy:.2f} %"}
        assert "A note on this run." in card.text
    else:
        assert "teacher |" not in card.text
    shown = re.findall(r"^!\[.+\]\((.+)\)$", card.text, re.MULTILINE)
    assert {folder / name for name in shown} == set(folder.glob("pictures/*.png"))


def test_the_predictions_are_those_of_the_metrics(finished):
    _, folder, _, metrics = finished
    found = Predictions.load(folder / "predictions.safetensors")
    assert found.is_right.mean() == pytest.approx(metrics["accuracy"])
    assert -found.log_probability.mean() == pytest.approx(metrics["negative_log_likelihood"], rel=1e-5)
    for token, predicted in found.tokens.items():
        name = "class_token_accuracy" if token == "class token" else f"{token}_token_accuracy"
        assert (predicted == found.rows.labels).mean() == pytest.approx(metrics[name])


def test_examples_are_compared_with_the_baseline(tables, runs, tmp_path):
    data = {name: load_from_disk(tables / name) for name in ("train", "test")}
    trainer, card = trained("student", data, tmp_path)
    evaluate_and_save(trainer, data["test"], "test", baseline=runs["teacher"].folder, **card)
    alt = results_in(tmp_path)["pictures"]["pictures/examples.png"]
    assert runs["teacher"].folder.name in alt and "](pictures/examples.png)" in (tmp_path / "README.md").read_text()


def test_a_run_whose_pictures_cannot_be_drawn_is_saved(tables, tmp_path, caplog):
    data = {name: load_from_disk(tables / name) for name in ("train", "test")}
    trainer, card = trained("teacher", data, tmp_path / "run")
    # A stale picture would belong to another model.
    (tmp_path / "run" / "pictures").mkdir(parents=True)
    (tmp_path / "run" / "pictures" / "curves.png").write_bytes(b"stale")
    metrics = evaluate_and_save(trainer, data["test"], "test", baseline=tmp_path / "gone", **card)
    assert "gone holds no results.json" in caplog.text and "has no pictures" in caplog.text
    results = results_in(tmp_path / "run")
    assert results["metrics"] == metrics and results["pictures"] == {}
    assert "![" not in (tmp_path / "run" / "README.md").read_text()
    assert not list((tmp_path / "run" / "pictures").iterdir())


def test_hardware_and_time_are_the_measured_ones(finished):
    _, folder, trainer, _ = finished
    results = results_in(folder)
    (seconds,) = (entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    assert results["train_seconds"] == seconds
    assert results["machine"] == describe_machine()
    shown = rows_of_table(ModelCard.load(folder / "README.md").text.partition("## Hardware and time")[2], " | ")
    assert shown.pop("training") == f"{seconds:.1f} s"
    assert shown.pop("versions").startswith(f"torch {torch.__version__.partition('+')[0]}")
    assert shown == {name: str(value) for name, value in results["machine"].items() if name != "versions"}


def record_of(teachers):
    whole = [{"weights_sha256": "0", "encoding": {}, "label_names": CLASSES, **teacher} for teacher in teachers]
    return {"format": "hf_ibdistill/1", "teachers": whole, "dataset": {}, "views": None, "versions": {}}


def test_a_card_links_the_teachers_that_recorded_its_table(tables, tmp_path):
    recorded = load_from_disk(tables / "train")
    # A relative folder that is gone looks like a Hub id, which alone has a revision.
    sources = {"conv": ("user/conv", "0123456789abcdef"), "inv": ("outputs/inv", None)}
    teachers = [
        {"name": name, "source": source, "revision": revision, "label_names": CLASSES}
        for name, (source, revision) in sources.items()
    ]
    attach_record(recorded, record_of(teachers))
    shutil.copytree(tables / "test", tmp_path / "test")
    recorded.save_to_disk(tmp_path / "train")
    finish("student", tmp_path, tmp_path / "student")
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert "| conv | [user/conv](https://huggingface.co/user/conv) | 81.25 % |\n| inv | inv | 68.75 % |" in card.text
    assert str(tmp_path) not in card.content and "outputs" not in card.content
    # results.json has the fact, so a card that is made of it elsewhere has no other links.
    stored = results_in(tmp_path / "student")["teachers"]
    assert {name: teacher["source"] for name, teacher in stored.items()} == {"conv": "user/conv", "inv": "inv"}


def test_tables_with_several_candidates_are_measured_by_the_columns_of_the_trainer(tables, tmp_path):
    data = {}
    for name in ("train", "test"):
        table = load_from_disk(tables / name)
        backward = table.select(range(len(table) - 1, -1, -1)).select_columns(["picture", "animal"])
        backward = backward.rename_columns({"picture": "mask", "animal": "breed"})
        data[name] = concatenate_datasets([table, backward], axis=1)
    trainer, card = trained("student", data, tmp_path, columns=("picture", "animal"))
    metrics = evaluate_and_save(trainer, data["test"], "test", **card)
    expected = evaluate_model(trainer.model, PROCESSOR, load_from_disk(tables / "test"), batch_size=5)
    assert metrics == pytest.approx(expected, rel=1e-12)


def test_teachers_are_measured_by_the_logits_of_the_table(tables, tmp_path):
    trainer, card = trained("student", {name: load_from_disk(tables / name) for name in ("train", "test")}, tmp_path)
    card["teacher_metrics"] = None
    table = load_from_disk(tables / "test")
    evaluate_and_save(trainer, table, "test", **card)
    measured = results_in(tmp_path)["teachers"]
    assert list(measured) == ["conv", "inv"]
    for name, teacher in measured.items():
        right = np.array(table[f"{name}_logits"]).argmax(-1) == np.array(table["animal"])
        assert teacher["source"] is None and teacher["metrics"]["accuracy"] == pytest.approx(right.mean())


def test_a_run_on_a_stream_is_saved(tables, tmp_path):
    data = {"train": load_from_disk(tables / "train").to_iterable_dataset(), "test": load_from_disk(tables / "test")}
    trainer, card = trained("student", data, tmp_path, max_steps=2)
    metrics = evaluate_and_save(trainer, data["test"], "test", **card)
    results = results_in(tmp_path)
    assert results["metrics"] == metrics and results["recipe"]["steps"] == 2
    assert results["recipe"]["training images"] == "streamed"


def test_training_images_without_a_label_are_counted(tables):
    table = load_from_disk(tables / "train").rename_column("animal", "label")
    hidden = table.remove_columns("label").add_column("label", [-1, None] + table["label"][2:])
    for rows, count in ((table, None), (hidden, 2), (table.remove_columns("label"), len(table))):
        assert _count_unlabelled(SimpleNamespace(table=rows)) == count
    assert _count_unlabelled(SimpleNamespace(table=table.to_iterable_dataset())) is None


def test_a_split_that_cannot_be_measured_does_not_cost_the_model(tables, tmp_path):
    data = {name: load_from_disk(tables / name) for name in ("train", "test")}
    trainer, card = trained("teacher", data, tmp_path)
    cells = data["test"].cast_column("picture", Image(decode=False))["picture"][:]
    cells[7] = {"bytes": b"not an image", "path": None}
    broken = Dataset.from_dict(
        {"picture": cells, "animal": data["test"]["animal"][:]},
        features=Features({name: data["test"].features[name] for name in ("picture", "animal")}),
    )
    with pytest.raises(ValueError, match="Row 7"):
        evaluate_and_save(trainer, broken, "test", **card)
    model = IBResNetForImageClassification.from_pretrained(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    ViTImageProcessor.from_pretrained(tmp_path)


def test_only_the_students_own_teachers_are_listed_and_the_online_ones_if_they_ran(tmp_path):
    tables = SimpleNamespace(table=Dataset.from_dict({"x": [0]}))
    described = [{"name": name, "source": f"outputs/{name}_of_table", "revision": None} for name in ("conv", "inv")]
    attach_record(tables.table, record_of(described))
    online = SimpleNamespace(
        name="conv", revision=None, model=SimpleNamespace(config=SimpleNamespace(name_or_path="outputs/conv_online"))
    )
    for trainer, expected in (
        (SimpleNamespace(train_dataset=tables), {}),
        (SimpleNamespace(train_dataset=tables, teacher_names=["inv"], teachers=[]), {"inv": "inv_of_table"}),
        (SimpleNamespace(train_dataset=tables, teacher_names=["conv"], teachers=[online]), {"conv": "conv_online"}),
        (SimpleNamespace(train_dataset=None, teacher_names=["conv"], teachers=[online]), {"conv": "conv_online"}),
    ):
        found = {name: facts["source"] for name, facts in _describe_teachers(trainer, {}).items()}
        assert found == expected
