"""Model cards: what huggingface_hub reads back from them, and what they say."""

import re

import numpy as np
import pytest
from huggingface_hub import ModelCard

from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    create_model_card,
)


METRICS = {
    "accuracy": 0.912345,
    "top_5_accuracy": 0.99,
    "negative_log_likelihood": 1 / 3,
    "expected_calibration_error": 0.031,
    "conv_agreement": 0.875,
}
TEACHERS = {
    "conv": {"accuracy": 0.8123, "negative_log_likelihood": 0.7},
    "inv": {"accuracy": 0.7045, "negative_log_likelihood": 0.9},
}


def student(**overrides):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return IBViTForImageClassification(IBViTConfig(num_attention_heads=2, num_labels=7, **sizes, **overrides))


def teacher():
    config = IBResNetConfig(
        stem="plain", embedding_size=16, hidden_sizes=[16], depths=[1], downsample_strides=[1], num_labels=7
    )
    return IBResNetForImageClassification(config)


def card(model=None, **overrides):
    arguments = {"title": "Small student", "data_name": "user/birds", "split": "test", "metrics": METRICS}
    arguments |= {"recipe": {"learning_rate": 0.001, "num_train_epochs": 40}}
    return create_model_card(model or student(), **{**arguments, **overrides})


def section(text, heading):
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def cells(text):
    """Every table's rows, without the dashes below the header."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


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
    results = section(card(teacher_metrics=TEACHERS).text, "Results")
    assert "Measured on the test split of `user/birds`" in results
    assert cells(results) == [
        ["metric", "test"],
        ["accuracy", "0.9123"],
        ["top_5_accuracy", "0.9900"],
        ["negative_log_likelihood", "0.3333"],
        ["expected_calibration_error", "0.0310"],
        ["conv_agreement", "0.8750"],
        ["teacher", "accuracy (test)"],
        ["conv", "81.23 %"],
        ["inv", "70.45 %"],
    ]
    assert len(re.findall(r"\d\.\d", results)) == 7


@pytest.mark.parametrize("only", METRICS)
def test_no_metric_appears_that_was_not_given(only, tmp_path):
    loaded = save_and_load(card(metrics={only: METRICS[only]}), tmp_path)
    assert [result.metric_type for result in loaded.data.eval_results] == [only]
    rest = loaded.content.replace(only, "").replace(only.replace("_", " "), "")
    for name in METRICS:
        assert name not in rest and name.replace("_", " ") not in rest
    assert "teachers on the same images" not in loaded.content
    assert len(re.findall(r"\d\.\d", section(loaded.text, "Results"))) == 1


def test_texts_of_a_student_and_of_a_teacher():
    taught, alone, light = card(student()).text, card(student(teacher_names=())).text, card(teacher()).text
    assert "A vision transformer taught by" in taught and "Its prediction fuses all tokens' heads" in taught
    for text in (alone, light):
        assert "An image classifier trained with" in text and "by cross-entropy on labels" in text
        assert "taught by" not in text and "tokens" not in text
    assert "arxiv.org/abs/2310.00369" in taught and "cross-entropy" not in taught


@pytest.mark.parametrize("build", [student, teacher])
def test_sizes_are_the_models(build):
    model = build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters, 7 classes, trained on `user/birds`" in card(model).text


def test_picture_and_notes_appear_when_given():
    text = card(picture="run.png", notes="Seed 3 of 5.").text
    assert "](run.png)" in section(text, "Results") and "\nSeed 3 of 5.\n" in text
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
    (code,) = re.findall(r"```python\n(.*?)```", card().text, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert "import hf_ibdistill" in code and 'pipeline("image-classification"' in code


@pytest.mark.parametrize(("online", "text"), [(False, "logits were stored"), (True, "in every training step")])
def test_a_students_card_tells_how_its_teachers_taught(online, text):
    config = IBViTConfig(
        teacher_names=("oak", "elm"), image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=8,
    )  # fmt: skip
    card = create_model_card(
        IBViTForImageClassification(config), title="T", data_name="d", split="test", metrics={"accuracy": 0.5},
        recipe={}, online=online,
    )  # fmt: skip
    assert "(oak, elm)" in card.content and text in " ".join(card.content.split())
