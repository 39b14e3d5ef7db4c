"""Cards: their metadata, read back by huggingface_hub, and their text."""

import ast
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    attach_record,
    create_model_card,
)
from hf_ibdistill.publishing.cards import create_logits_card, markdown_table, mean_and_spread


METRICS = {
    "accuracy": 0.912345,
    "top_5_accuracy": 0.99,
    "negative_log_likelihood": 1 / 3,
    "expected_calibration_error": 0.031,
    "conv_agreement": 0.875,
}
TEACHERS = {
    "conv": {"metrics": {"accuracy": 0.8123, "negative_log_likelihood": 0.7}},
    "inv": {"metrics": {"accuracy": 0.7045, "negative_log_likelihood": 0.9}},
}
MACHINE = {"cpu": "A processor", "cores": 64, "versions": {"torch": "2.9.0", "datasets": "5.2.0"}}


def student(**overrides):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return IBViTForImageClassification(IBViTConfig(num_attention_heads=2, num_labels=7, **sizes, **overrides))


def teacher(**overrides):
    shape = {"stem": "plain", "embedding_size": 16, "hidden_sizes": [16], "depths": [1], "downsample_strides": [1]}
    return IBResNetForImageClassification(IBResNetConfig(num_labels=7, **shape, **overrides))


def card(model=None, repo_id=None, **overrides):
    results = {"title": "Small student", "data": "user/birds", "split": "test", "metrics": METRICS}
    results |= {"recipe": {"learning_rate": 0.001, "num_train_epochs": 40}}
    return create_model_card(model or student(), {**results, **overrides}, repo_id=repo_id)


def section(text, heading):
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def cells(text):
    """Every table's rows, without the dashes below the header."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def example(card):
    """The statements of the card's one Python example."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    return ast.parse(code).body


def save_and_load(model_card, tmp_path):
    model_card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


@pytest.mark.parametrize("number", [float, np.float64, np.float32])
def test_results_are_read_back_as_given(number, tmp_path):
    given = {name: number(value) for name, value in METRICS.items()}
    loaded = save_and_load(card(metrics=given), tmp_path)
    results = loaded.data.eval_results
    assert len(results) == len(METRICS)
    for result, (name, value) in zip(results, METRICS.items()):
        assert result.metric_type == name and result.metric_name == name.replace("_", " ")
        assert result.metric_value == pytest.approx(value, abs=1e-6)
        assert result.task_type == "image-classification"
        assert (result.dataset_name, result.dataset_split) == ("user/birds", "test")


@pytest.mark.parametrize("build", [student, teacher])
def test_metadata_are_read_back(build, tmp_path):
    model = build()
    data = save_and_load(card(model), tmp_path).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0" and data.model_name == "Small student"
    assert {"hf_ibdistill", "knowledge-distillation", model.config.model_type} == set(data.tags)


@pytest.mark.parametrize("title", ['Birds: "small" #1', "{{ braces }} & <b>", "größe – 🤗"])
def test_titles_survive(title, tmp_path):
    loaded = save_and_load(card(title=title), tmp_path)
    assert loaded.data.model_name == title and f"\n# {title}\n" in loaded.text


def test_the_results_section_shows_the_given_numbers_and_no_others():
    text = card(teachers=TEACHERS).text
    results = section(text, "Results")
    assert "Measured on the test split of `user/birds`" in results
    assert cells(results) == [
        ["metric", "test"],
        ["accuracy", "0.9123"],
        ["top_5_accuracy", "0.9900"],
        ["negative_log_likelihood", "0.3333"],
        ["expected_calibration_error", "0.0310"],
        ["conv_agreement", "0.8750"],
    ]
    assert len(re.findall(r"\d\.\d", results)) == 5
    assert cells(section(text, "Teachers")) == [
        ["teacher", "accuracy (test)"],
        ["conv", "81.23 %"],
        ["inv", "70.45 %"],
    ]


def test_teachers_on_the_hub_are_linked_and_folders_keep_their_path_to_themselves(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "inv").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def teachers(**given):
        made = card(teachers=given)
        assert str(tmp_path) not in made.content and "outputs" not in made.content
        return cells(section(made.text, "Teachers"))

    link = "[user/conv.v2](https://huggingface.co/user/conv.v2)"
    rows = [["teacher", "from"], ["conv", link], ["inv", "inv"]]
    conv = {"source": "user/conv.v2"}
    assert teachers(conv=conv, inv={"source": str(tmp_path / "outputs" / "inv")}) == rows
    # The order is that of the tokens; a model that the student has no token for is none of its teachers.
    assert teachers(other=conv, inv={"source": "outputs/inv"}, conv={**conv, "metrics": {}}) == rows
    # What is measured of one teacher only leaves a gap at the other. What is known of none is no column.
    assert teachers(conv=conv, inv={"source": None, **TEACHERS["inv"]}) == [
        ["teacher", "from", "accuracy (test)"],
        ["conv", link, ""],
        ["inv", "", "70.45 %"],
    ]
    assert teachers() == teachers(conv={"source": None}, inv={"metrics": {}}) == []


def test_what_was_not_measured_is_absent(tmp_path):
    bare = create_model_card(student(), {"title": "Small student"})
    for word in ("None", "Results", "Recipe", "Hardware", "## Teachers", "trained on `", "model-index"):
        assert word not in bare.content
    assert not re.search(
        r"\d\.\d", bare.text.replace("2310.00369", "").replace("2012.12877", "").replace("2106.12378", "")
    )
    assert save_and_load(bare, tmp_path).data.eval_results is None
    # `results.json` has null for what a run did not have.
    nothing = dict.fromkeys(("data", "split", "metrics", "recipe", "teachers", "online", "base_model", "picture"))
    nothing |= dict.fromkeys(("machine", "train_seconds"), None)
    assert create_model_card(student(), {"title": "Small student", **nothing, "notes": ""}).content == bare.content
    # Without the name of a dataset, the Hub would refuse metadata of results. The card still shows them.
    unnamed = card(data=None, split=None)
    assert "None" not in unnamed.content and save_and_load(unnamed, tmp_path).data.eval_results is None
    assert cells(section(unnamed.text, "Results"))[:2] == [["metric", "value"], ["accuracy", "0.9123"]]


def test_hardware_and_time_are_there_if_they_were_measured():
    shown = cells(section(card(machine=MACHINE, train_seconds=75.25).text, "Hardware and time"))
    assert shown[1:] == [
        ["training", "75.2 s"],
        ["cpu", "A processor"],
        ["cores", "64"],
        ["versions", "torch 2.9.0, datasets 5.2.0"],
    ]
    assert cells(section(card(machine=MACHINE).text, "Hardware and time"))[1] == ["cpu", "A processor"]
    assert "Hardware" not in card().text


def test_a_dataset_is_linked_if_it_is_on_the_hub(tmp_path):
    assert save_and_load(card(data="user/birds"), tmp_path).data.datasets == ["user/birds"]
    assert save_and_load(card(data="digits"), tmp_path).data.datasets is None
    (tmp_path / "my" / "birds").mkdir(parents=True)
    local = card(data=str(tmp_path / "my" / "birds"))
    assert "trained on `birds`" in local.text and str(tmp_path) not in local.content
    data = save_and_load(local, tmp_path).data
    assert data.datasets is None and data.eval_results[0].dataset_name == "birds"


@pytest.mark.parametrize("only", METRICS)
def test_no_metric_appears_that_was_not_given(only, tmp_path):
    loaded = save_and_load(card(metrics={only: METRICS[only]}), tmp_path)
    assert [result.metric_type for result in loaded.data.eval_results] == [only]
    rest = loaded.content.replace(only, "").replace(only.replace("_", " "), "")
    for name in METRICS:
        assert name not in rest and name.replace("_", " ") not in rest
    assert "## Teachers" not in loaded.content
    assert len(re.findall(r"\d\.\d", section(loaded.text, "Results"))) == 1


def test_texts_of_a_student_and_of_a_teacher():
    taught, alone, light = card(student()).text, card(student(teacher_names=())).text, card(teacher()).text
    assert "A vision transformer taught by" in taught and "Its prediction fuses all tokens' heads" in taught
    for text in (alone, light):
        assert "An image classifier trained with" in text and "by cross-entropy on labels" in text
        assert "taught by" not in text and "tokens" not in text
    assert "arxiv.org/abs/2310.00369" in taught and "cross-entropy" not in taught
    class_token = card(student(fusion="class_token")).text
    assert "Its prediction is the class token's." in class_token and "fuses" not in class_token
    involution = card(teacher(spatial_operator="involution", kernel_size=3)).text
    assert "arxiv.org/abs/2103.06255" in involution and "arxiv.org" not in light
    for text in (taught, alone, light):
        assert "**Meant for**" in text and "**Not meant for**" in text


@pytest.mark.parametrize("build", [student, teacher])
def test_sizes_are_the_models(build):
    model = build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters, 7 classes, trained on `user/birds`" in card(model).text


def test_picture_and_notes_appear_when_given():
    pictures = {"pictures/a.png": "Line one\n[two] *three* <b>", "pictures/b.png": "Plain"}
    text = card(pictures=pictures, notes="Seed 3 of 5.").text
    assert "\n![Line one \\[two\\] \\*three\\* \\<b\\>](pictures/a.png)\n" in text
    assert "\n![Plain](pictures/b.png)\n" in text and "\nSeed 3 of 5.\n" in text
    # Results of version 0.1.0 have one.
    assert "](run.png)" in card(picture="run.png").text
    without = card().text
    assert "![" not in without and "None" not in without


def test_the_recipe_is_shown():
    assert cells(section(card(recipe={"seed": 3, "temperature": 2.0, "weights": [0.5, 0.25]}).text, "Recipe")) == [
        ["setting", "value"],
        ["seed", "`3`"],
        ["temperature", "`2.0`"],
        ["weights", "`[0.5, 0.25]`"],
    ]


def test_the_example_in_the_card_is_python():
    call = example(card(repo_id="user/student"))[1].value
    assert [argument.value for argument in call.args] == ["image-classification"]
    keywords = {keyword.arg: keyword.value.value for keyword in call.keywords}
    assert keywords == {"model": "user/student", "trust_remote_code": True}
    assert "installed, `import hf_ibdistill` replaces it" in card().text
    # Models of transformers need no further code.
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    plain = card(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape)))
    assert "trust_remote_code" not in plain.text


@pytest.mark.parametrize(("online", "text"), [(False, "logits were stored"), (True, "in every training step")])
def test_a_students_card_describes_how_its_teachers_taught(online, text):
    config = IBViTConfig(
        teacher_names=("oak", "elm"), image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=8,
    )  # fmt: skip
    made = card(IBViTForImageClassification(config), online=online)
    assert "(oak, elm)" in made.content and text in " ".join(made.content.split())


@pytest.mark.parametrize("build", [student, teacher])
def test_the_model_that_it_started_as_is_linked_if_it_is_on_the_hub(build, tmp_path):
    loaded = save_and_load(card(build(), base_model="user/start"), tmp_path)
    assert loaded.data.base_model == "user/start"
    assert "fine-tuned from the model [user/start](https://huggingface.co/user/start) on labels alone" in loaded.text
    (tmp_path / "outputs" / "start").mkdir(parents=True)
    local = card(build(), base_model=str(tmp_path / "outputs" / "start"))
    assert "from the model start on labels" in local.text and str(tmp_path) not in local.content
    assert save_and_load(local, tmp_path).data.base_model is None
    assert "base_model" not in card(build()).content and "started as" not in card(build()).content


def test_the_card_of_a_fine_tuned_student_has_no_stored_logits():
    def text_of(*args, **kwargs):
        return " ".join(card(*args, base_model="user/start", **kwargs).text.split())

    tuned, alone = text_of(), text_of(student(teacher_names=()))
    for text in (tuned, alone):
        assert "taught by" not in text and "logits" not in text and "matches them" not in text
        assert "biases of its data and of the model it started as. Measure" in text
    end = "(conv, inv), which had no part in this training. Its prediction fuses all tokens' heads. "
    assert "on labels alone. It keeps the tokens of the teachers of that model " + end in tuned
    assert "on labels alone. " in alone and "tokens" not in alone
    assert "Its prediction is the class token's." in text_of(student(fusion="class_token"))
    # One that was fine-tuned with teachers has both.
    for online, how in ((False, "logits were stored"), (True, "in every training step")):
        taught = text_of(online=online)
        assert how in taught and "started as the model [user/start]" in taught and "fine-tuned from" not in taught
        assert "of its data and of its teachers and of the model it started as. Measure" in taught


# The cards of recorded logits


def logits_table(images=False, top_k=None, views=None, teachers=("conv", "inv"), **overrides):
    """Three rows and their provenance."""
    logits = List(Value("float16"), length=7)
    features = {"row_key": Value("int64"), **{f"{name}_logits": logits for name in teachers}}
    columns = {"row_key": [1, 2, 3], **{f"{name}_logits": [[0.5] * 7] * 3 for name in teachers}}
    if images:
        features |= {"image": Image(), "label": ClassLabel(num_classes=7)}
        columns |= {"image": [np.zeros((8, 8, 3), np.uint8)] * 3, "label": [0, 1, 2]}
    table = Dataset.from_dict(columns, features=Features(features))
    described = [
        {
            "name": name,
            "source": f"user/{name}",
            "revision": "0123456789abcdef" if name == "conv" else None,
            "weights_sha256": f"{name}" * 16,
            "config": {"model_type": "ibresnet"},
            "label_names": [f"bird {i}" for i in range(25)],
            "encoding": {"dtype": "float16", "top_k": top_k},
        }
        for name in ("conv", "inv")
    ]
    record = {"format": "hf_ibdistill/1", "teachers": described, "views": views, "versions": {"torch": "2.9.0"}}
    record["dataset"] = {"source": None, "split": "None", "num_rows": 3, "sha256": "abc"}
    attach_record(table, {**record, **overrides})
    return table


def save_and_load_logits(table, tmp_path, **keywords):
    create_logits_card(table, **keywords).save(tmp_path / "README.md")
    return DatasetCard.load(tmp_path / "README.md")


def test_a_logits_card_has_size_teachers_encoding_and_views(tmp_path):
    views = {"num_views": 4, "crop": "pad", "scale": [0.5, 1.0]}
    loaded = save_and_load_logits(logits_table(top_k=5, views=views), tmp_path)
    assert loaded.data.pretty_name == "Logits of conv, inv" and loaded.data.task_categories == ["image-classification"]
    assert {"hf_ibdistill", "knowledge-distillation", "logits"} == set(loaded.data.tags)
    assert "Predictions of conv, inv about 3 images, 4 augmented views of each." in loaded.text
    kept = "the 5 largest and the log-sum-exp of the rest, float16"
    assert cells(section(loaded.text, "Teachers")) == [
        ["column", "model", "from", "logits", "sha256 of the weights"],
        ["`conv_logits`", "ibresnet", "[user/conv](https://huggingface.co/user/conv) @ 0123456789ab", kept, "`" + "conv" * 4 + "`"],
        # Without a revision it is not known to be on the Hub: "outputs/inv" would look the same.
        ["`inv_logits`", "ibresnet", "inv", kept, "`" + ("inv" * 6)[:16] + "`"],
    ]  # fmt: skip
    assert ", bird 19 and 5 more." in loaded.text and "bird 20" not in loaded.text
    shown = [["setting", "value"], *([name, f"`{views[name]}`"] for name in sorted(views))]
    assert cells(section(loaded.text, "Views")) == shown
    # What the record leaves open is left out.
    data = [["num_rows", "3"], ["sha256", "abc"], ["versions", "torch 2.9.0"]]
    assert cells(section(loaded.text, "Data"))[1:] == data and "None" not in loaded.content


def test_a_logits_card_of_some_teachers_and_of_images_as_they_are(tmp_path):
    loaded = save_and_load_logits(logits_table(teachers=["inv"]), tmp_path)
    assert loaded.data.pretty_name == "Logits of inv" and "3 images, as they are" in loaded.text
    assert [row[0] for row in cells(section(loaded.text, "Teachers"))[1:]] == ["`inv_logits`"]
    assert "| all, float16 |" in loaded.text and "## Views" not in loaded.text


@pytest.mark.parametrize("images", [False, True])
def test_a_logits_card_shows_how_to_use_it_with_and_without_images(images, tmp_path):
    loaded = save_and_load_logits(logits_table(images), tmp_path, repo_id="user/logits")
    imported, *steps = example(loaded)
    opened = ["open_logits_table"] if images else ["attach_teacher_logits", "load_image_dataset", "open_logits_table"]
    assert [name.name for name in imported.names] == opened
    assert ast.unparse(steps[0]) == "table = open_logits_table('user/logits')"
    assert ("attach_teacher_logits(images, table)" in ast.unparse(steps[-1])) == (not images)
    assert ("The images and their labels are included." in loaded.text) == images
    if images:
        unnamed = save_and_load_logits(logits_table(images).remove_columns("label"), tmp_path)
        assert "The images are included." in unnamed.text
    # The publisher of the logits cannot license the images of others.
    assert loaded.data.license == (None if images else "apache-2.0")


def test_a_table_without_logits_or_provenance_has_no_card():
    with pytest.raises(ValueError, match="columns are row_key"):
        create_logits_card(logits_table(teachers=[]))
    table = logits_table()
    table.info.description = "Birds."
    with pytest.raises(ValueError, match="0 provenance records"):
        create_logits_card(table)


# Results of earlier runs


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_the_results_of_version_0_1_0_make_a_card(name, tmp_path):
    folder = Path(__file__).parents[1] / "version_0_1_0" / name
    results = json.loads((folder / "results.json").read_text())
    made = create_model_card(AutoModelForImageClassification.from_pretrained(folder), results, repo_id="user/old")
    loaded = save_and_load(made, tmp_path)
    assert {result.metric_type: result.metric_value for result in loaded.data.eval_results} == pytest.approx(
        results["metrics"], abs=1e-6
    )
    assert loaded.data.model_name == results["title"] and "None" not in made.text.partition("## Recipe")[0]
    recipe = dict(cells(section(made.text, "Recipe"))[1:])
    assert (
        recipe.keys() == results["recipe"].keys()
        and recipe["learning_rate"] == f"`{results['recipe']['learning_rate']}`"
    )
    assert ["training", f"{results['train_seconds']:.1f} s"] in cells(section(made.text, "Hardware and time"))
    # That version stored nothing about the teachers.
    assert "## Teachers" not in made.text


# Tables and figures in Markdown


def test_a_markdown_table():
    expected = "| run | accuracy |\n| --- | --- |\n| plain | 0.5 |\n| distilled | 71 % |"
    assert markdown_table(["run", "accuracy"], [["plain", 0.5], ("distilled", "71 %")]) == expected
    assert markdown_table(["run"], []) == "| run |\n| --- |"


def test_a_bar_in_a_cell_does_not_begin_another_cell():
    # https://github.github.com/gfm/#example-200
    line = markdown_table(["setting", "value"], [["recipe", "crop|flip"]]).splitlines()[2]
    found = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert found == ["recipe", "crop|flip"]


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.913, 0.921, 0.9, 0.87], [0.25, 0.25]])
def test_mean_and_spread(values):
    expected = f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
    assert mean_and_spread(values) == expected


def test_one_run_has_no_spread():
    assert mean_and_spread([0.9137]) == "91.4"
