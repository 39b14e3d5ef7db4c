"""Reports: their numbers, their HTML, and what a browser does with them."""

import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from browser import open_browser
from datasets import ClassLabel
from small import make_images, make_teacher
from transformers import AutoImageProcessor

from hf_ibdistill import IBViTConfig, IBViTForImageClassification, predict
from hf_ibdistill.publishing.predictions import PREDICTIONS, Predictions
from hf_ibdistill.publishing.report import (
    Run,
    add_images,
    check_same_rows,
    draw_facts,
    read_runs,
    write_comparison,
    write_report,
)
from hf_ibdistill.teachers import load_classifier


NAMES = ["<script>alert('cat')</script>", "a & b", "猫" * 30]
HISTORY = [{"step": 10 * i, "loss": 2 / i, "eval_accuracy": i / 10, "eval_loss": 1 / i} for i in range(1, 5)]


class Page(HTMLParser):
    """The elements, texts and tables of a page; every element that opens must close."""

    def __init__(self, path):
        super().__init__()
        self.open, self.attributes, self.texts, self.tables = [], [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def __getitem__(self, header):
        """The rows of the table with this first header."""
        (found,) = (table[1:] for table in self.tables if table[0][: len(header)] == header)
        return {row[0]: row[1:] for row in found}


def check_self_contained(path):
    page = Page(path)
    for tag, name, value in page.attributes:
        assert tag not in ("script", "link", "iframe", "object") and not name.startswith("on")
        assert name not in ("src", "href", "srcset", "data") or value.startswith("data:image/png;base64,")
    text = Path(path).read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    return page


@pytest.fixture(scope="module")
def images():
    return make_images(60).cast_column("label", ClassLabel(names=NAMES))


@pytest.fixture(scope="module")
def folders(images, tmp_path_factory):
    """A teacher, two students, and a copy of one as version 0.1.0 left it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "a").mkdir()
    made = {"teacher": root / "a" / "teacher", "alone": root / "a" / "student", "student": root / "b" / "student"}
    make_teacher(made["teacher"], names=NAMES)
    sizes = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    for name, teachers in (("alone", ()), ("student", ("conv", "inv"))):
        config = IBViTConfig(teacher_names=teachers, num_attention_heads=2, id2label=dict(enumerate(NAMES)), **sizes)
        IBViTForImageClassification(config).save_pretrained(made[name])
        AutoImageProcessor.from_pretrained(made["teacher"]).save_pretrained(made[name])
    for name, folder in made.items():
        model, processor = load_classifier(folder), AutoImageProcessor.from_pretrained(folder)
        tokens = getattr(model.config, "teacher_names", None)
        found = Predictions.of_outputs(predict(model, processor, images), images, tokens)
        found.save(folder / PREDICTIONS)
        metrics = {"accuracy": found.is_right.mean(), "negative_log_likelihood": float(-found.log_probability.mean())}
        results = {"title": f"The {name} <b>&", "data": "images", "split": "test", "metrics": metrics}
        results |= {"log_history": HISTORY, "recipe": {"steps": 40, "views": {"num_views": 2}}, "parameters": 1234}
        if name == "student":
            teachers = {
                "conv": {"source": "user/conv", "metrics": {"accuracy": 0.5}},
                "inv": {"source": None, "metrics": {}},
            }
            results |= {"teachers": teachers, "ensemble": {"accuracy": 0.25, "negative_log_likelihood": 1.5}}
        (folder / "results.json").write_text(json.dumps(results))
    made["old"] = root / "old"
    shutil.copytree(made["student"], made["old"])
    (made["old"] / PREDICTIONS).unlink()
    return made


def test_the_report_of_a_run(folders, images, tmp_path):
    (run,) = read_runs([folders["student"]])
    add_images([run], images)
    write_report(tmp_path / "report.html", run)
    page = check_self_contained(tmp_path / "report.html")
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == 5 and all(alts)
    found = run.predictions
    interval = scipy.stats.binomtest(int(found.is_right.sum()), 60).proportion_ci(method="wilson")
    shown = f"{100 * found.is_right.mean():.2f} % ({100 * interval.low:.2f} to {100 * interval.high:.2f})"
    assert ["accuracy", shown] in [row for table in page.tables for row in table]
    classes = page[["class", "rows"]]
    assert list(classes) == [f"#{i} {name}" for i, name in enumerate(NAMES)]
    for i, (rows, accuracy, taken) in enumerate(classes.values()):
        own = found.predicted[found.rows.labels == i]
        assert rows == str(len(own)) and accuracy == f"{100 * (own == i).mean():.1f} %"
        wrong = own[own != i].tolist()
        names = [NAMES[j] for j in set(wrong) if wrong.count(j) == wrong.count(statistics.mode(wrong))]
        assert (
            taken in [f"{name} ({wrong.count(statistics.mode(wrong))})" for name in names]
            or taken == "–"
            and not wrong
        )
    assert page[["teacher"]] == {
        "conv": ["user/conv", "50.00 %", "–"],
        "inv": ["–", "–", "–"],
        "mean probability": ["–", "25.00 %", "1.5000"],
    }
    assert page[["setting"]]["views"] == ['{"num_views": 2}']
    assert str(folders["student"].parent) not in (tmp_path / "report.html").read_text()


def test_the_comparison(folders, images, tmp_path):
    runs = read_runs([folders["alone"], folders["student"], folders["teacher"]])
    assert [run.name for run in runs] == ["a/student", "b/student", "a/teacher"]
    check_same_rows(runs)
    add_images(runs, images)
    write_comparison(tmp_path / "both.html", runs)
    page = check_self_contained(tmp_path / "both.html")
    differences = page[["run", "accuracy", "95 %"]]
    assert list(differences) == ["b/student", "a/teacher"]
    first = runs[0].predictions
    for run in runs[1:]:
        accuracy, interval, surprise, interval_of_surprise, here, there = (
            text.replace("−", "-") for text in differences[run.name]
        )
        for shown, ends, a, b in (
            (accuracy, interval, 100.0 * run.predictions.is_right, 100.0 * first.is_right),
            (surprise, interval_of_surprise, -run.predictions.log_probability, -first.log_probability),
        ):
            expected = scipy.stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval(0.95)
            assert float(shown) == pytest.approx(float(np.mean(a.astype(float) - b)), abs=6e-3)
            assert [float(end) for end in ends.split(" to ")] == pytest.approx(list(expected), abs=6e-3)
        right = run.predictions.is_right
        assert (int(here), int(there)) == ((right & ~first.is_right).sum(), (~right & first.is_right).sum())
    table = page[["run", "data"]]
    assert table["b/student"][0] == "images, test" and table["b/student"][4:6] == ["1,234", "40"]
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    # Curves, classes, calibration, two pictures of the student and one of the teacher.
    assert len(alts) == 6 and all(alts)


def test_a_run_of_version_0_1_0_has_a_report(folders, images, tmp_path):
    (old,) = read_runs([folders["old"]])
    write_report(tmp_path / "report.html", old)
    page = check_self_contained(tmp_path / "report.html")
    assert any(PREDICTIONS in text for text in page.texts) and any("--dataset" in text for text in page.texts)
    runs = read_runs([folders["alone"], folders["old"]])
    check_same_rows(runs)
    write_comparison(tmp_path / "both.html", runs)
    assert any(PREDICTIONS in text for text in check_self_contained(tmp_path / "both.html").texts)
    # With the images it predicts them, and is like a new one.
    add_images(runs, images)
    (student,) = read_runs([folders["student"]])
    np.testing.assert_array_equal(runs[1].predictions.predicted, student.predictions.predicted)
    assert not (folders["old"] / PREDICTIONS).exists()


def test_almost_nothing_is_known(tmp_path):
    write_report(tmp_path / "report.html", Run("bare", {"title": "Bare", "metrics": {"accuracy": float("nan")}}))
    check_self_contained(tmp_path / "report.html")
    write_comparison(tmp_path / "both.html", [Run("a", {}), Run("b", {"metrics": {"accuracy": 0.5}})])
    check_self_contained(tmp_path / "both.html")
    assert draw_facts(Run("a", {})) == {}


def test_different_rows_are_refused(folders, images):
    runs = read_runs([folders["alone"], folders["student"]])
    others = images.select([*range(58), 59, 58])
    for rows, message in ((others, "labels of 2 of 60"), (images.select(range(30)), "60 and 30 rows")):
        with pytest.raises(ValueError, match=f"dataset: runs=a/student .*{message}"):
            add_images(runs, rows)
    runs[1].predictions.rows = runs[1].predictions.rows._replace(images="other")
    with pytest.raises(ValueError, match="runs=a/student and b/student .*images differ"):
        check_same_rows(runs)
    old, first = read_runs([folders["old"], folders["alone"]])
    old.results["split"] = "validation"
    with pytest.raises(ValueError, match="splits test and validation"):
        check_same_rows([first, old])


def test_folders_that_are_no_runs_are_named(folders, tmp_path):
    for given, message in (
        ([tmp_path], re.escape(f"runs={tmp_path} holds no results.json")),
        ([folders["student"], str(folders["student"]) + "/"], "given twice"),
        ([""], "runs=''"),
    ):
        with pytest.raises(ValueError, match=message):
            read_runs(given)


def test_a_browser_loads_nothing_else_and_needs_no_wide_window(folders, images, tmp_path):
    runs = read_runs([folders["alone"], folders["student"]])
    add_images(runs, images)
    runs[1].results["recipe"] = {"a" * 200: "b" * 500, "x": "<img src=https://example.com/x.png onerror=alert(1)>"}
    write_report(tmp_path / "one.html", runs[1])
    write_comparison(tmp_path / "two.html", runs)
    with open_browser() as browser:
        for name in ("one.html", "two.html"):
            for width in (800, 390):
                page = browser.new_page(viewport={"width": width, "height": 800})
                requests, problems = [], []
                page.on("request", lambda request, requests=requests: requests.append(request.url))
                page.on("console", lambda message, problems=problems: problems.append(message.text))
                page.goto((tmp_path / name).as_uri())
                page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
                pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")
                assert len(pictures) >= 4 and set(pictures) == {1120}
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert [url for url in requests if not url.startswith(("file:", "data:"))] == [] == problems
                assert page.evaluate("document.scripts.length") == 0
                page.close()
