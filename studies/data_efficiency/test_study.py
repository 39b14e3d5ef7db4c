"""The data-efficiency study."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard
from scipy.stats import ttest_rel
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_ibdistill import EnsembleDistillationTrainer
from hf_ibdistill.images.views import make_view, row_key
from hf_ibdistill.logits.provenance import stored_views
from studies.data_efficiency import compression, report, runs, shifts, study, tables, targets
from studies.data_efficiency.recipes import METHODS, TRIALS, Recipe, combine
from studies.data_efficiency.runs import Study, build_model
from studies.data_efficiency.shifts import KINDS


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


def made_up(random, labels, seeds, wrong, machine="fast", **fields):
    """Cells of predictions, of which about this share is drawn at random."""
    cells = {}
    for seed in seeds:
        choices = np.where(random.random(len(labels)) < wrong, random.integers(0, 10, len(labels)), labels)
        cells[seed] = {"metrics": {"accuracy": float((choices == labels).mean())}, "machine": {"cpu": machine}}
        cells[seed] |= {"predictions": "".join(map(str, choices)), **fields}
    return cells


def right(cell, labels):
    return [int(int(digit) == label) for digit, label in zip(cell["predictions"], labels)]


def signed_interval(first, second, labels):
    """The points between two methods' cells, and their interval over the seeds, by scipy."""
    means = [[100 * statistics.mean(right(of[seed], labels)) for seed in sorted(of)] for of in (first, second)]
    interval = ttest_rel(*means).confidence_interval()
    points = statistics.mean(means[0]) - statistics.mean(means[1])
    return f"{points:+.2f} | {interval.low:+.2f} … {interval.high:+.2f}"


def test_pairs_of_two_kinds_are_measured_against_pairs_of_one_kind():
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 200)
    pairs = {"both_views": ("ensemble", "conv", "inv"), "two_conv": ("two_conv_ensemble", "conv", "conv_b")}
    names = {name for student, parts in pairs.items() for name in (student, *parts)}
    found = {name: {1000: made_up(random, labels, range(4), random.uniform(0.1, 0.5))} for name in sorted(names)}
    # One teacher of the last seed is missing: nothing of a size with this seed counts.
    del found["conv_b"][1000][3]
    rows = [line.strip("| ").split(" | ") for line in tables.pair_table(found, labels).splitlines()[2:]]
    assert [row[1] for row in rows] == [METHODS[name].title for name in pairs]
    of = {name: {seed: by_size[1000][seed] for seed in range(3)} for name, by_size in found.items()}
    for row, (student, (ensemble, first, second)) in zip(rows, pairs.items()):
        agree, either = [], []
        for seed in range(3):
            one, other = of[first][seed], of[second][seed]
            agree += [a == b for a, b in zip(one["predictions"], other["predictions"])]
            either += [a or b for a, b in zip(right(one, labels), right(other, labels))]
        assert row[2:5] == ["3", f"{100 * statistics.mean(agree):.1f}", f"{100 * statistics.mean(either):.1f}"]
        for shown, name in zip(row[5:9], (first, second, ensemble, student)):
            values = [100 * statistics.mean(right(cell, labels)) for cell in of[name].values()]
            assert shown == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert rows[0][9:] == ["–"] * 3
    assert " | ".join(rows[1][9:11]) == signed_interval(of["both_views"], of["two_conv"], labels)
    # There is nothing to compare without a second pair.
    assert not tables.pair_table({"both_views": found["both_views"]}, labels).splitlines()[2:]


def test_the_linear_patch_embedding_stands_beside_the_convolution():
    random = np.random.default_rng(1)
    labels = random.integers(0, 10, 200)
    wrong = {"conv": 0.2, "inv": 0.3, "undistilled": 0.7, "both_views": 0.4}
    base = {name: {5000: made_up(random, labels, range(3), share)} for name, share in wrong.items()}
    linear = {name: {5000: made_up(random, labels, range(3), wrong[name])} for name in ("undistilled", "both_views")}
    table = tables.patch_embedding_table({"base": base, "linear": linear}, labels)
    rows = {tuple(line.strip("| ").split(" | ")[1:3]): line for line in table.splitlines()[2:]}
    assert len(rows) == 8

    def mean(cells):
        return statistics.mean(cell["metrics"]["accuracy"] for cell in cells[5000].values())

    for title, cells in (("convolution", base), ("linear", linear)):
        ours, alone = cells["both_views"], cells["undistilled"]
        share = (mean(ours) - mean(alone)) / (mean(base["conv"]) - mean(alone))
        row = rows[title, METHODS["both_views"].title]
        assert f"| 3 | {signed_interval(ours[5000], alone[5000], labels)} |" in row
        assert row.endswith(f"| {100 * share:.0f} % |")
        assert rows[title, METHODS["conv"].title].endswith("| 100 % |")
        assert f"| {100 * mean(alone):.1f} ± " in rows[title, METHODS["undistilled"].title]
    assert not tables.patch_embedding_table(
        {"base": base, "linear": {"both_views": base["conv"]}}, labels
    ).splitlines()[2:]


def test_stored_logits_and_online_teachers_compare_in_time_on_one_machine():
    random = np.random.default_rng(2)
    labels = random.integers(0, 10, 200)
    seconds = {"seconds": {"training": {"cpu": 100.0}, "recording": {"cpu": 20.0}}}
    stored = made_up(random, labels, range(4), 0.3, **seconds)
    online = made_up(random, labels, range(3), 0.3, seconds={"training": {"cpu": 400.0}})
    online[2] |= {"machine": {"cpu": "slow"}, "seconds": {"training": {"cpu": 9000.0}}}
    found = {"linear": {"both_views": {1000: stored}, "co_advise": {1000: online}}}
    (row,) = tables.online_table(found, labels).splitlines()[2:]
    common = {seed: stored[seed] for seed in range(3)}
    assert row.startswith(f"| 1,000 | both, stored views | linear | 3 | {signed_interval(common, online, labels)} |")
    assert row.endswith("| 2 | 120 | 400 | 0.30 |")
    # Online teachers store no views, so more of them are compared with the same students.
    found = {"base": found["linear"], "views_32": {"both_row": {1000: stored}, "both_views": {1000: stored}}}
    rows = [row.split(" | ") for row in tables.online_table(found, labels).splitlines()[2:]]
    both = ["both, stored views", "both, one stored row"]
    assert [row[1:3] for row in rows] == [[both[0], "base"], [both[0], "views_32"], [both[1], "views_32"]]
    assert rows[0][3:] == rows[1][3:] == rows[2][3:]
    found = {"linear": found["base"]}
    for cell in online.values():
        cell["machine"] = {"cpu": "slow"}
    (row,) = tables.online_table(found, labels).splitlines()[2:]
    assert row.endswith("| 0 | – | – | – |")


def test_families_compare_with_and_without_teachers():
    random = np.random.default_rng(3)
    labels = random.integers(0, 10, 200)

    def cells(training, machine="fast"):
        spent = {"training": {"cpu": training}, "prediction": {"cpu": 4.0, "images": 1000}}
        fields = {"seconds": spent, "parameters": 1234, "rows": 100, "recipe": {"steps": 40, "batch_size": 64}}
        return made_up(random, labels, range(3), 0.3, machine, **fields)

    alone, taught = cells(10.0), cells(20.0)
    base = {"undistilled": {1000: cells(30.0, "slow")}, "both_views": {1000: cells(30.0)}}
    found = {"base": base, "resnet": {"undistilled": {1000: alone}, "pretrained_all": {1000: taught}}}
    rows = tables.family_table(found, labels).splitlines()[2:]
    # The stored views were given to no other family. 20 epochs of 100 images: 64 and 36 a step.
    assert (
        len(rows) == 3 and rows[0].startswith("| IBViT | 1,234 | no teachers |") and rows[0].endswith("| – | – | – |")
    )
    assert rows[1].startswith("| resnet | 1,234 | no teachers |") and rows[1].endswith(
        "| – | – | – | 10 | 200 | 250 |"
    )
    assert rows[2].endswith(f"| 3 | {signed_interval(taught, alone, labels)} | 20 | 100 | 250 |")


def test_a_second_teacher_differs_by_its_seed_and_sees_the_same_images(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    run_study(tmp_path, "--stage", "choose", "--methods", "two_conv")
    methods = ["two_conv", "two_conv_ensemble"]
    chosen = json.loads((results / "recipes.json").read_text())
    (results / "recipes.json").write_text(json.dumps({**chosen, "two_conv": {}}))
    run_study(tmp_path, "--methods", *methods, "--seeds", "0")
    cells = {path.stem: json.loads(path.read_text()) for path in (results / "grid").iterdir()}
    assert cells.keys() == {f"100_{name}_base_0" for name in ("conv", "conv_b", *methods)}
    student = cells["100_two_conv_base_0"]
    assert {"conv_token_accuracy", "conv_b_token_accuracy"} < student["metrics"].keys()
    assert cells["100_two_conv_ensemble_base_0"]["parameters"] == 2 * cells["100_conv_base_0"]["parameters"]
    try_out = Study("fashion_mnist", "digits", results, tmp_path / "work", teacher_steps=1, student_steps=2)
    first, second, other = (
        try_out.recipe(*cell, {}) for cell in (("conv", 100, 0), ("conv_b", 100, 0), ("conv", 100, 100))
    )
    images = [[image.tobytes() for image in try_out.rows(recipe)[0]["image"]] for recipe in (first, second, other)]
    assert images[0] == images[1] != images[2]
    # Everything else is of the other seed, as the views are.
    weights = [build_model(recipe, {"num_labels": 10}, 8).state_dict() for recipe in (first, second, other)]
    name = next(name for name, value in weights[0].items() if value.dim() == 4)
    assert weights[1][name].equal(weights[2][name]) and not weights[0][name].equal(weights[1][name])
    assert second.views() == other.views() != first.views()


def committed(file):
    """The folders of cells that have a file of this name, some of them within that of their data set."""
    return {"argvalues": [path.parent for path in sorted(RESULTS.rglob(file))], "ids": lambda folder: folder.name}


@pytest.mark.parametrize("folder", **committed("recipes.json"))
def test_the_recipes_of_today_are_those_of_the_committed_cells(folder):
    made = Study(folder.relative_to(RESULTS).parts[0], "not opened", folder, folder / "no models")
    for file in (folder / "grid").glob("*.json"):
        cell = json.loads(file.read_text())
        recipe = Recipe(**cell["recipe"])
        # The number of views of unlabelled images follows from the number of all images.
        if not METHODS[recipe.method].uses_unlabelled:
            changes = {**made.chosen(recipe.method), **combine(cell["variation"])}
            assert made.recipe(recipe.method, recipe.images, recipe.seed, changes) == recipe, file.name


@pytest.mark.parametrize("folder", **committed("tables.md"))
def test_the_committed_tables_are_those_of_the_committed_cells(folder):
    name = folder.relative_to(RESULTS).parts[0]
    labels = tables.undigits(json.loads((folder / "test_labels.json").read_text()))
    text = report.write_sections(name, tables.read_cells(folder / "grid"), labels, folder / "search")
    assert (folder / "tables.md").read_text() == text


def test_a_longer_schedule_is_compared_with_what_its_recipe_is_compared_with():
    folder, change = RESULTS / "fashion_mnist_unlabelled", "views_4+patience_2"
    text = (folder / "tables.md").read_text()
    section = text.split(f"with unlabelled images ({change}), against")[1].split("\n## ")[0]
    rows = {
        line.split(" | ")[1]: line.split(" | ")[2:4] for line in section.splitlines() if line.startswith("| 1,000")
    }
    cells = {path.stem: json.loads(path.read_text()) for path in (folder / "grid").iterdir()}
    for title, method in (("both, stored views", "both_views"), ("convolution teacher", "conv")):
        pairs = [
            cells[f"1000_both_all_{change}_{seed}"]["metrics"]["accuracy"]
            - cells[f"1000_{method}_base_{seed}"]["metrics"]["accuracy"]
            for seed in range(5)
            if f"1000_both_all_{change}_{seed}" in cells
        ]
        assert rows[title] == [str(len(pairs)), f"{100 * statistics.mean(pairs):+.2f}"]


def test_a_student_of_another_shape_is_compared_with_its_own_shape_alone():
    folder = RESULTS / "cifar10"
    assert list((folder / "grid").glob("5000_both_all_linear_*.json"))
    sections = dict(part.split("\n", 1) for part in (folder / "tables.md").read_text().split("\n## ")[1:])
    assert not [title for title in sections if "(linear)" in title]
    rows = [line.split(" | ") for line in sections["With the linear patch embedding"].splitlines()]
    found = {row[2]: row[5] for row in rows if row[:2] == ["| 5,000", "linear"]}
    gains = [
        statistics.mean(
            json.loads((folder / f"grid/5000_{method}_linear_{seed}.json").read_text())["metrics"]["accuracy"]
            for seed in range(3)
        )
        for method in ("both_all", "undistilled")
    ]
    assert found["both, stored views, with unlabelled images"] == f"{100 * (gains[0] - gains[1]):+.2f}"


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
    labels = tables.undigits(json.loads((results / "test_labels.json").read_text()))
    text = tables.family_table(tables.read_cells(results / "grid"), labels)
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
    changed = {"clean": 0.5, "accuracy": {kind: [0.4] * 5 for kind in KINDS}}
    runs.write(results / "shifts/100_conv_base_0.json", changed)
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
    for name in ("accuracy_images", "accuracy_time", attention, "corrections", "shifts_100"):
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


@pytest.mark.parametrize(("student", "seed"), [("both_row", 0), ("both_all", 2)])
def test_the_committed_cards_are_those_of_the_best_cells(tmp_path, student, seed):
    # Of the images, the cards need the size and the classes.
    classes = runs.DATASETS["cifar10"].classes
    for name in classes:
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(10):
            color = (20 * i, 20 * classes.index(name), 0)
            PIL.Image.new("RGB", (32, 32), color).save(tmp_path / "train" / name / f"{i}.png")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    made = Study("cifar10", str(tmp_path), RESULTS / "cifar10", tmp_path / "no models")
    given = {"cards_dir": str(tmp_path), "card_images": [5000], "card_student": student}
    report.write_cards(
        made, tables.read_cells(RESULTS / "cifar10/grid")["base"], report.ReportArguments("cifar10", **given)
    )
    for method, name, best in (("conv", "conv", 1), ("inv", "inv", 0), (student, "student", seed)):
        cell = json.loads((RESULTS / f"cifar10/grid/5000_{method}_base_{best}.json").read_text())
        card = ModelCard.load(tmp_path / f"cifar10_5000_{name}.md")
        found = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert found == pytest.approx(cell["metrics"], abs=1e-6)
        assert f"{cell['parameters']:,} parameters, 10 classes" in card.text and f"seed {best}" in card.text
        assert f"| training | {cell['seconds']['training']['wall']:.1f} s |" in card.text and "H200" in card.text
        assert f"| steps | `{cell['recipe']['steps']}` |" in card.text
        # These are not the images of the Hub.
        assert card.data.datasets is None and "copy of `uoft-cs/cifar10`: JPEG" in card.text
        assert ("50,000 images, of which 5,000 have a label" in card.text) == (method == "both_all")
        if method != "both_all":
            committed = ModelCard.load(RESULTS.parents[1] / "model_cards" / f"cifar10_5000_{name}.md")
            assert committed.data.to_dict() == card.data.to_dict() and committed.text == card.text
    teachers = {
        name: json.loads((RESULTS / f"cifar10/grid/5000_{name}_base_{seed}.json").read_text())
        for name in ("conv", "ensemble")
    }
    for title, name in (("conv", "conv"), ("mean probability", "ensemble")):
        assert f"| {title} | {100 * teachers[name]['metrics']['accuracy']:.2f} % |" in card.text
    with pytest.raises(ValueError, match="has no cells of inv_views"):
        report.main(["--name", "cifar10", "--results_dir", str(RESULTS / "cifar10"), "--card_student", "inv_views"])


def few_cells(results, methods):
    """The cells of the grid of `run_study` with these methods, 100 labelled images, seed 0."""
    return {name: json.loads((results / f"grid/100_{name}_base_0.json").read_text()) for name in methods}


def test_teachers_of_folds_record_what_they_did_not_train_on(tmp_path, monkeypatch):
    results, fitted, tables_of = tmp_path / "results", {}, {}
    results.mkdir()
    # Methods that came after the search have the recipe of those that they are compared with.
    recipes = {name: {} for name in ("conv", "inv", "both_views")} | {"both_all": {"temperature": 1.0}}
    (results / "recipes.json").write_text(json.dumps(recipes))
    make_trainer = runs.Study._trainer

    def keep(self, recipe, model, processor, train, **kwargs):
        trainer = make_trainer(self, recipe, model, processor, train, **kwargs)
        kept = tables_of if "conv_logits" in train.column_names else fitted
        kept[recipe.method, recipe.fold] = trainer.train_dataset.table
        return trainer

    monkeypatch.setattr(runs.Study, "_trainer", keep)
    # In float32, as the teachers are asked below.
    run_study(tmp_path, "--methods", "both_folds", "both_all_folds", "--seeds", "0", "--bf16", "false")

    def keys(table):
        return [row_key(image.convert("RGB")) for image in table["image"]]

    seen = {key: set(keys(table)) for key, table in fitted.items()}
    folders = sorted(path.name for path in (tmp_path / "work/100_0").iterdir() if path.name.startswith("conv_"))
    assert folders == ["conv_base", *(f"conv_fold_{fold}" for fold in range(5))]
    labelled = seen["conv", None]
    assert len(labelled) == 100
    for method, num_rows in (("both_folds", 100), ("both_all_folds", 1437)):
        table = tables_of[method, None]
        assert len(table) == num_rows
        # In the order without folds, so that both methods train on the same batches.
        assert table["row_key"] == keys(table) and table["row_key"][:100] == keys(fitted["conv", None])
        views, places = stored_views(table), np.array([label is not None for label in table["label"]])
        rows = [*np.flatnonzero(places)[::9].tolist(), *np.flatnonzero(~places)[::300].tolist()]
        for name in ("conv", "inv"):
            used = set()
            for row in rows:
                key, stored = table[row]["row_key"], np.array(table[row][f"{name}_logits"])
                unseen = [fold for fold in range(5) if key in labelled and key not in seen[name, fold]]
                assert len(unseen) == (table[row]["label"] is not None)
                folder = tmp_path / "work/100_0" / (f"{name}_fold_{unseen[0]}" if unseen else f"{name}_base")
                # What the saved teacher says about the first view, one image at a time.
                view = make_view(table[row]["image"].convert("RGB"), views, key, 0)
                model = AutoModelForImageClassification.from_pretrained(folder).eval()
                inputs = AutoImageProcessor.from_pretrained(folder)(view, return_tensors="pt")
                expected = model(**inputs).logits[0].detach().numpy()
                np.testing.assert_allclose(stored[0], expected, rtol=1e-3, atol=5e-4)
                used.add(folder.name)
            assert len(used) > 3
        labels = np.array([-1 if label is None else label for label in table["label"]])
        for fold in range(5):
            left_out = labelled - seen["inv", fold]
            of_fold = [label for key, label in zip(table["row_key"], labels) if key in left_out and label >= 0]
            assert np.bincount(of_fold).tolist() == [2] * 10
    cells = few_cells(results, ["both_folds", "both_all_folds", "conv", "inv"])
    assert {name: cell["rows"] for name, cell in cells.items()} == {
        "both_folds": 100, "both_all_folds": 1437, "conv": 100, "inv": 100
    }  # fmt: skip
    assert (
        cells["both_all_folds"]["recipe"]["temperature"] == 1.0 and cells["both_folds"]["logits"]["conv_entropy"] > 0
    )
    # Their seconds are those of all their teachers.
    folds = [json.loads(path.read_text()) for path in (results / "grid/folds").iterdir()]
    assert len(folds) == 10 and {cell["rows"] for cell in folds} == {80}
    spent = sum(cell["seconds"]["training"]["cpu"] for cell in folds)
    assert tables.seconds(tables.read_cells(results / "grid")["base"], "both_folds", 100, 0)["teachers"] == (
        pytest.approx(spent)
    )


def test_another_view_teaches_the_class_token_of_unlabelled_images(tmp_path, monkeypatch):
    batches, compute = [], EnsembleDistillationTrainer.compute_loss

    def watch(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = compute(self, model, inputs, True, num_items_in_batch)
        batches.append((loss.item(), outputs.class_logits, outputs.teacher_token_logits, inputs["labels"]))
        return (loss, outputs) if return_outputs else loss

    def watch_sum(self, *args, **kwargs):
        loss = add(self, *args, **kwargs)
        sums.append(loss.item())
        return loss

    sums, add = [], targets.ConsistencyTrainer.compute_loss
    monkeypatch.setattr(EnsembleDistillationTrainer, "compute_loss", watch)
    monkeypatch.setattr(targets.ConsistencyTrainer, "compute_loss", watch_sum)
    search = ["--stage", "search", "--methods", "both_all", "--seeds", "0", "--variations"]
    # With the teachers' targets, which the variation replaces.
    run_study(tmp_path, *search, "target_teachers+consistency", "consistency_confident")
    assert len(sums) == len(batches) == 4
    for step, (loss, class_logits, token_logits, labels) in enumerate(batches):
        classes = torch.cat((class_logits[:, None], token_logits), 1).detach().double().softmax(-1)
        expected = confident = 0.0
        for row in range(len(labels)):
            other = classes[row + 1 if row % 2 == 0 else row - 1].mean(0)
            if labels[row] < 0:
                term = sum(p * (p.log() - q.log()) for p, q in zip(other, classes[row, 0])).item()
                expected += term / len(labels)
                confident += term / len(labels) * (other.max().item() >= 0.95)
        assert (labels < 0).any() and expected > confident == 0.0  # an untrained student is not sure of anything
        assert sums[step] - loss == pytest.approx(expected if step < 2 else confident, abs=1e-5)
        assert labels[::2].tolist() == labels[1::2].tolist()
    cells = [json.loads(path.read_text()) for path in (tmp_path / "results/search").glob("*both_all*")]
    assert {(c["recipe"]["consistency"], c["recipe"]["unlabelled_target"]) for c in cells} == {
        (0.0, "none"), (0.95, "none")
    }  # fmt: skip


def test_only_confident_views_teach_and_no_gradient_flows_into_them():
    # The first image: both views sure, of different classes. The second: one of two views is sure. The third has a label.
    fused = torch.tensor([[9.0, 0, 0], [0, 9, 0], [9, 0, 0], [1, 0, 0], [9, 0, 0], [9, 0, 0]], requires_grad=True)
    classes, labels = torch.zeros(6, 3, requires_grad=True), torch.tensor([-1, -1, -100, -100, 0, 0])
    loss = targets.consistency_loss(classes, fused, labels, min_confidence=0.95)
    sure = fused[0].detach().softmax(-1)
    assert loss.item() == pytest.approx(3 * (math.log(3) + (sure * sure.log()).sum().item()) / 6)
    loss.backward()
    assert fused.grad is None
    # Pushed to the class of the other view; the view whose other view is unsure is not taught.
    assert classes.grad.argmin(-1)[:2].tolist() == [1, 0]
    assert [bool(row.any()) for row in classes.grad] == [True, True, False, True, False, False]


def test_consistency_needs_pairs_of_views(tmp_path):
    with pytest.raises(ValueError, match="views_per_image=4"):
        cell = ["--stage", "search", "--methods", "both_all", "--seeds", "0"]
        run_study(tmp_path, *cell, "--variations", "consistency+views_per_image_4")


@pytest.mark.parametrize("command", [report.main, shifts.main, compression.main])
def test_commands_refuse_an_unknown_study(command):
    with pytest.raises(ValueError, match="name=cifar100.*cifar10, digits"):
        command(["--name", "cifar100"])
