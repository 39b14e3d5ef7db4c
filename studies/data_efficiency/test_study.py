"""The data-efficiency study."""

import json
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from huggingface_hub import ModelCard
from scipy.stats import ttest_rel
from transformers import pipeline

from studies.data_efficiency import report, study, tables
from studies.data_efficiency.recipes import TRIALS, combine


RESULTS = Path(__file__).parents[2] / "results" / "data_efficiency"


def run_study(folder, *arguments):
    few = [
        "--name",
        "fashion_mnist",
        "--dataset",
        "digits",
        "--images",
        "100",
        "--teacher_steps",
        "1",
        "--student_steps",
        "2",
    ]
    study.main([*few, "--results_dir", f"{folder}/results", "--work_dir", f"{folder}/work", *arguments])


def test_a_cell_runs_once_and_keeps_its_recipe(tmp_path):
    cell = ["--stage", "search", "--methods", "both_row", "--seeds", "1"]
    run_study(tmp_path, *cell)
    paths = sorted((tmp_path / "results" / "search").iterdir())
    assert [path.name for path in paths] == [
        f"100_{name}_base_1.json" for name in ("both_row", "conv", "inv")
    ]  # its teachers are cells as well
    content = json.loads(paths[0].read_text())
    assert content["split"] == "held out" and content["rows"] == 80 and len(content["predictions"]) == 20
    written = [path.stat().st_mtime_ns for path in paths]
    run_study(tmp_path, *cell)
    assert [path.stat().st_mtime_ns for path in paths] == written
    with pytest.raises(ValueError, match="made by another recipe"):
        run_study(tmp_path, *cell, "--student_steps", "4")


def test_the_search_decides_and_the_test_images_stay_closed_before(tmp_path):
    with pytest.raises(ValueError, match="no .*recipes.json.* --stage search"):
        run_study(tmp_path, "--methods", "undistilled")
    with pytest.raises(ValueError, match='undistilled has no cells of the trials "base"'):
        run_study(tmp_path, "--stage", "choose")
    with pytest.raises(ValueError, match="variations=trials .* base, "):
        run_study(tmp_path, "--variations", "trials")
    with pytest.raises(ValueError, match="methods=vit .* conv, inv, "):
        run_study(tmp_path, "--methods", "vit")
    with pytest.raises(ValueError, match="has no cells of conv, .* --stage grid"):
        report.main(["--name", "fashion_mnist", "--results_dir", f"{tmp_path}/results"])
    search = tmp_path / "results" / "search"
    search.mkdir(parents=True)
    random, best = np.random.default_rng(0), {}

    def results(method, variations):
        """Random accuracies of two seeds; returns the trials, best mean first."""
        accuracies = random.random((len(variations), 2))
        for variation, values in zip(variations, accuracies):
            for seed, accuracy in enumerate(values):
                path = search / f"3000_{method}_{variation}_{seed}.json"
                path.write_text(json.dumps({"metrics": {"accuracy": accuracy}}))
        return [variations[i] for i in (-accuracies.mean(1)).argsort()]

    for method, variations in TRIALS.items():
        finalists = results(method, variations)[:2]
        best[method] = results(method, [f"{name}+patience_2" for name in finalists])[0].removesuffix("+patience_2")
    run_study(tmp_path, "--stage", "choose")
    chosen = json.loads((tmp_path / "results" / "recipes.json").read_text())
    assert {method: chosen[method] for method in TRIALS} == {method: combine(best[method]) for method in TRIALS}
    assert chosen["conv_row"] == chosen["both_row"] and chosen["conv"] == {}


def test_a_share_of_the_distance_is_of_the_seeds_that_all_have():

    def cells(*accuracies):
        return {1000: {seed: {"metrics": {"accuracy": accuracy}} for seed, accuracy in enumerate(accuracies)}}

    found = {"conv": cells(0.8, 0.9), "inv": cells(0.7, 0.7), "undistilled": cells(0.4, 0.8)}
    # (0.85 − 0.6) / (0.85 − 0.6), of the first seed (0.6 − 0.4) / (0.8 − 0.4), and of no seed.
    found |= {"both_views": cells(0.8, 0.9), "deit": cells(0.6), "co_advise": {3000: {}}}
    assert "| 1,000 | 60.0 → 85.0 | 100 % | 50 % | – |" in tables.gap_table(found)


def test_pairs_of_all_sizes_are_compared_together():
    labels = np.arange(10)

    def cells(*predictions):
        return {
            seed: {"metrics": {"accuracy": np.mean([int(c) == y for c, y in zip(text, labels)])}, "predictions": text}
            for seed, text in enumerate(predictions)
        }

    ours = {1000: cells("0123456780", "0123456700"), 3000: cells("0123456789")}
    alone = {1000: cells("0123456000", "0123400000"), 3000: cells("0123456700")}
    rows = tables.difference_table(
        {"both_views": ours, "undistilled": alone, "deit": {1000: alone[1000]}}, labels
    ).splitlines()[2:]
    interval = ttest_rel([0.9, 0.8, 1.0], [0.7, 0.5, 0.8]).confidence_interval()
    expected = f"| 3 | +23.33 | {100 * interval.low:+.2f} … {100 * interval.high:+.2f} |"
    assert len(rows) == 4 and rows[3].startswith("| 1,000 + 3,000 | no teachers " + expected)
    assert rows[0].startswith("| 1,000 | no teachers | 2 | +25.00 |")
    # What a rival has at one size only is not repeated.
    assert rows[1].startswith("| 1,000 | DeiT") and rows[2].startswith("| 3,000 | no teachers | 1 | +20.00 | – |")
    # Any method's pairs, against those that are asked for.
    given = {"both_row": ours, "conv_row": alone, "deit": alone}
    rows = tables.difference_table(given, labels, "both_row", ("conv_row",)).splitlines()[2:]
    assert len(rows) == 3 and rows[2].startswith("| 1,000 + 3,000 | convolution, one stored row " + expected)
    assert tables.difference_table(given, labels).splitlines()[2:] == []


def test_a_change_is_measured_over_the_seeds_that_were_also_run_without_it():
    cells = {seed: {"metrics": {"accuracy": 0.5}, "predictions": "01"} for seed in range(3)}
    changed = {seed: {"metrics": {"accuracy": 0.25}, "predictions": "11"} for seed in (1, 3)}
    found = {"base": {"both_views": {1000: cells}}}
    found["linear"] = {"both_views": {1000: changed, 3000: changed}, "deit": {1000: changed}}
    rows = tables.ablation_table(found, np.array([0, 0])).splitlines()[2:]
    assert rows == ["| 1,000 | both, stored views | linear | 1 | -25.00 | – | -685.31 … +585.31 |"]


def test_seconds_compare_on_the_machine_that_made_most_of_a_size():

    def cells(**seconds):
        return {1000: {seed: {"seconds": {"training": {"cpu": value}}, "machine": {"cpu": machine},
                              "metrics": {"accuracy": value / 1000}}
                       for seed, (machine, value) in enumerate(seconds.items())}}  # fmt: skip

    found = {"conv": cells(fast=10, slow=90), "inv": cells(fast=20)}
    found |= {"undistilled": cells(slow=300), "deit": cells(fast=30, other=200)}
    # The second DeiT's teacher ran elsewhere, and so did the student without teachers.
    comparable = tables.on_one_machine(found)
    assert tables.time_table(comparable).splitlines()[2:] == [
        "| convolution teacher | 1,000 | 0 | 0 | 10 | 10 |",
        "| involution teacher | 1,000 | 0 | 0 | 20 | 20 |",
        "| DeiT: convolution, hard, online | 1,000 | 10 | 0 | 30 | 40 |",
    ]
    # In the picture, seconds of those and accuracies of all seeds, as in the table of accuracies.
    points = {name: tables.accuracies_by_seconds(found, comparable, name, 1000) for name in found}
    assert points == {"conv": {10: [0.01, 0.09]}, "inv": {20: [0.02]}, "undistilled": {}, "deit": {40: [0.03, 0.2]}}


@pytest.mark.parametrize("name", sorted(file.parent.name for file in RESULTS.glob("*/tables.md")))
def test_the_committed_tables_are_those_of_the_committed_cells(name):
    folder = RESULTS / name
    labels = tables.undigits(json.loads((folder / "test_labels.json").read_text()))
    text = report.write_sections(name, tables.read_cells(folder / "grid"), labels, folder / "search")
    assert (folder / "tables.md").read_text() == text


def test_methods_with_unlabelled_images_train_on_every_image(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    methods = ["conv", "inv", "ensemble", "both_all", "pseudo_labels", "pretrained", "pretrained_all"]
    (results / "recipes.json").write_text(json.dumps(dict.fromkeys(methods, {})))
    run_study(tmp_path, "--methods", *methods, "--seeds", "0")
    cells = {name: json.loads((results / f"grid/100_{name}_base_0.json").read_text()) for name in methods}
    # 1,437 training images of digits, of which 100 have a label.
    all_images = {"both_all", "pseudo_labels", "pretrained_all"}
    assert {name: cell["rows"] for name, cell in cells.items()} == {
        m: 1437 if m in all_images else 100 for m in methods
    }
    # The naive mean of the probabilities that the two saved teachers give.
    test = study.Study("fashion_mnist", "digits", results, tmp_path / "work").test_rows()
    folders = [tmp_path / "work" / "100_0" / f"{name}_base" for name in ("conv", "inv")]
    pipes = [pipeline("image-classification", str(folder), top_k=10) for folder in folders]
    names, choices = study.DATASETS["fashion_mnist"].classes, ""
    for row in test.select(range(50)):
        scores = [{entry["label"]: entry["score"] for entry in pipe(row["image"])} for pipe in pipes]
        choices += str(max(range(10), key=lambda class_id: sum(score[names[class_id]] for score in scores)))
    assert cells["ensemble"]["predictions"].startswith(choices)
    # A student of another family learns from the same table.
    tables_before = sorted((tmp_path / "work/100_0/tables").iterdir())
    run_study(tmp_path, "--methods", "both_all", "--seeds", "0", "--variations", "resnet")
    assert sorted((tmp_path / "work/100_0/tables").iterdir()) == tables_before
    text = tables.family_table(tables.read_cells(results / "grid"))
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert [(row[0], row[2]) for row in rows] == [
        (f"| {student}", "both, stored views, with unlabelled images") for student in ("IBViT", "resnet")
    ]


def test_the_study_ends_in_tables_pictures_and_cards(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    methods = ["conv", "inv", "undistilled", "both_views"]
    (results / "recipes.json").write_text(json.dumps(dict.fromkeys(methods, {})))
    run_study(tmp_path, "--methods", *methods, "--seeds", "0", "1")
    run_study(tmp_path, "--methods", "both_views", "--seeds", "1", "--variations", "hard+label_weight_0")
    (results / "README.md").write_text("by hand")
    flags = [
        "--name",
        "fashion_mnist",
        "--results_dir",
        f"{results}",
        "--work_dir",
        f"{tmp_path}/work",
        "--cards_dir",
        f"{tmp_path}/cards",
    ]
    flags += ["--dataset", "digits", "--card_images", "100"]
    report.main(flags)
    cells = {
        name: [json.loads((results / f"grid/100_{name}_base_{seed}.json").read_text()) for seed in (0, 1)]
        for name in methods
    }
    accuracies = {name: [cell["metrics"]["accuracy"] for cell in pair] for name, pair in cells.items()}
    text = (results / "tables.md").read_text()
    assert (results / "README.md").read_text() == "by hand"
    ours, alone = accuracies["both_views"], accuracies["undistilled"]
    assert f"| both, stored views | {50 * sum(ours):.1f} ± {100 * statistics.stdev(ours):.1f} (2 seeds) |" in text
    difference = 50 * (sum(ours) - sum(alone))
    assert f"| 100 | no teachers | 2 | {difference:+.2f} |" in text
    changed = json.loads((results / "grid/100_both_views_hard+label_weight_0_1.json").read_text())
    difference = 100 * (changed["metrics"]["accuracy"] - ours[1])
    assert f"| 100 | both, stored views | hard+label_weight_0 | 1 | {difference:+.2f} | – |" in text
    found = cells["both_views"]
    assert f"| {statistics.mean(cell['logits']['conv_inv_divergence'] for cell in found):.3f} |\n" in text
    for cell in found:
        assert cell["fusions"]["mean_probabilities"] == cell["metrics"]["accuracy"]
        assert cell["fusions"]["class_token"] == cell["metrics"]["class_token_accuracy"]
    mean = statistics.mean(cell["fusions"]["mean_logits"] for cell in found)
    assert re.search(rf"\| both, stored views \| 100 \| 2 \| [^|]+ \| {100 * mean:.1f} ± ", text)
    # The tokens are those of the best student, whose card shows them.
    attention = f"attention_100_{ours.index(max(ours))}"
    for name in ("accuracy_images", "accuracy_time", attention, "corrections"):
        PIL.Image.open(results / f"{name}.png").verify()
    card = ModelCard.load(tmp_path / "cards" / "fashion_mnist_100_student.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["accuracy"] == pytest.approx(max(ours), abs=1e-6)
    # Of the teachers that taught it, not of the best of all seeds.
    assert f"| conv | {100 * accuracies['conv'][ours.index(max(ours))]:.2f} % |" in card.text
    picture = re.search(r"!\[Where each token looks.*\]\((.+)\)", card.text)[1]
    assert (tmp_path / "cards" / picture).samefile(results / f"{attention}.png")
    # Cards and the picture outlive the models, which are on the machine that trained them.
    shutil.rmtree(tmp_path / "work")
    report.main(flags)
    again = ModelCard.load(tmp_path / "cards" / "fashion_mnist_100_student.md")
    assert again.content == card.content
