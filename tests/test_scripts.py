"""The scripts, as a user runs them."""

import json
import re
import runpy
import shutil
import statistics

import numpy as np
import PIL.Image
import pytest
from datasets import load_from_disk
from huggingface_hub import ModelCard
from running import SCRIPTS, run, run_process
from scipy.stats import ttest_rel
from transformers import DeiTConfig, DeiTForImageClassification, ViTImageProcessor
from transformers.utils.import_utils import BACKENDS_MAPPING

from hf_ibdistill import IBViTForImageClassification, load_student


NAMES = sorted(path.name for path in SCRIPTS.glob("*.py") if path.name not in ("arguments.py", "timing.py"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two teachers of one step, their table and a student of one step."""
    folder = tmp_path_factory.mktemp("outputs")
    few = ["--images_per_class", "3"]
    for name, preset in (("conv", "convolution-small"), ("inv", "involution-small")):
        run("train_teacher.py", *few, "--preset", preset, "--max_steps", "1", "--output_dir", folder / name)
    teachers = [f"{name}={folder / name}" for name in ("conv", "inv")]
    run("record_logits.py", *few, "--teachers", *teachers, "--output_dir", folder / "table")
    run("distill_student.py", "--dataset", folder / "table", "--max_steps", "1", "--output_dir", folder / "student")
    return folder


def test_teachers_record_and_student_fit_together(outputs):
    tables = load_from_disk(outputs / "table")
    assert set(tables) == {"train", "validation", "test"}
    assert len(tables["train"]) == 30
    results = json.loads((outputs / "student" / "results.json").read_text())
    assert results["split"] == "test"
    assert {"accuracy", "conv_token_accuracy", "inv_agreement"} <= results["metrics"].keys()
    card = (outputs / "student" / "README.md").read_text()
    assert f"| accuracy | {results['metrics']['accuracy']:.4f} |" in card
    # Recorded on the test images too, so the card tells how good the teachers were, and nothing of where they lay.
    for name in ("conv", "inv"):
        measured = json.loads((outputs / name / "results.json").read_text())["metrics"]["accuracy"]
        assert f"| {name} | {name} | {100 * measured:.2f} % |" in card
    assert results["recipe"]["model"]["patch_embedding"] == "convolution" and str(outputs) not in card


def test_evaluate_model_repeats_the_measured_figures(outputs, capsys):
    measured = json.loads((outputs / "student" / "results.json").read_text())["metrics"]
    capsys.readouterr()
    run("evaluate_model.py", "--model", outputs / "student", "--dataset", outputs / "table")
    printed = json.loads(capsys.readouterr().out)
    # Another batch size may round differently.
    assert printed["metrics"] == pytest.approx(measured, rel=1e-4)
    assert printed["split"] == "test"


def test_a_student_loads_in_a_fresh_process_and_classifies_an_image_file(outputs, tmp_path):
    PIL.Image.new("L", (20, 30), 128).save(tmp_path / "image.png")
    code = (
        "import hf_ibdistill, transformers, sys;"
        "print(transformers.pipeline('image-classification', model=sys.argv[1])(sys.argv[2])[0]['label'])"
    )
    label = run_process("-c", code, outputs / "student", tmp_path / "image.png").strip()
    assert label in {str(digit) for digit in range(10)}


def test_online_teachers_and_a_student_without_teachers(outputs, tmp_path):
    few = ["--images_per_class", "3", "--max_steps", "1"]
    teachers = [f"conv={outputs / 'conv'}"]
    run("distill_student.py", *few, "--teachers", *teachers, "--output_dir", tmp_path / "online")
    assert json.loads((tmp_path / "online" / "config.json").read_text())["teacher_names"] == ["conv"]
    run("distill_student.py", *few, "--without_teachers", "--output_dir", tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["teacher_names"] == []


def test_a_saved_student_learns_from_other_teachers(outputs, tmp_path):
    start = IBViTForImageClassification.from_pretrained(outputs / "student")
    start.config.fusion = "class_token"
    start.save_pretrained(tmp_path / "start")
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "start")
    names = ["--teacher_names", "inv", "--learning_rate", "1e-9", "--max_steps", "1", "--image_size", "12"]
    arguments = ["--dataset", outputs / "table", "--model", tmp_path / "start", *names]
    run("distill_student.py", *arguments, "--output_dir", tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (config["teacher_names"], config["image_size"], config["fusion"]) == (["inv"], 12, "class_token")
    # Its own preprocessing and, after a step that is next to none, weights.
    processor = json.loads((tmp_path / "student" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.4, 0.5, 0.6] and processor["size"] == {"height": 12, "width": 12}
    expected = load_student(tmp_path / "start", ["inv"], image_size=12).state_dict()
    found = IBViTForImageClassification.from_pretrained(tmp_path / "student").state_dict()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-6, err_msg=name)
    card = " ".join((tmp_path / "student" / "README.md").read_text().split())
    assert "taught by other image classifiers (inv)" in card and "It started as the model start." in card
    run("distill_student.py", *arguments, "--fusion", "mean_logits", "--output_dir", tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["fusion"] == "mean_logits"


@pytest.mark.parametrize("flags", [[], ["--without_teachers"]])
def test_a_deit_to_start_from(flags, outputs, tmp_path):
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    DeiTForImageClassification(DeiTConfig(num_attention_heads=2, **shape)).save_pretrained(tmp_path / "deit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "deit")
    arguments = ["--dataset", outputs / "table", "--model", tmp_path / "deit", "--max_steps", "1", *flags]
    run("distill_student.py", *arguments, "--output_dir", tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["teacher_names"] == ([] if flags else ["conv", "inv"]) and config["model_type"] == "ibvit"
    assert config["fusion"] == "mean_probabilities" and len(config["id2label"]) == 10
    text = "fine-tuned from the model deit on labels alone." if flags else "It started as the model deit."
    assert text in " ".join((tmp_path / "student" / "README.md").read_text().split())


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_file_in_place_of_flags(kind, outputs, tmp_path):
    settings = {"dataset": str(outputs / "table"), "output_dir": str(tmp_path / "s"), "max_steps": 1, "temperature": 2}
    path = tmp_path / f"settings.{kind}"
    # JSON is YAML too.
    path.write_text(json.dumps(settings))
    run("distill_student.py", path)
    assert json.loads((tmp_path / "s" / "results.json").read_text())["recipe"]["temperature"] == [2.0]


def test_two_processes_train(outputs, tmp_path):
    # `accelerate launch --cpu --num_processes 2` starts one process only, so the launcher beneath it.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPTS / "distill_student.py"]
    run_process(
        *launcher,
        "--use_cpu",
        "--dataset",
        outputs / "table",
        "--max_steps",
        "2",
        "--output_dir",
        tmp_path / "student",
    )
    results = json.loads((tmp_path / "student" / "results.json").read_text())
    assert results["recipe"]["processes"] == 2
    assert results["recipe"]["steps"] == 2


def test_quickstart_leaves_table_student_card_and_picture(tmp_path, capsys):
    steps = ["--teacher_steps", "2", "--student_steps", "2", "--images_per_class", "3"]
    # Run again with other settings, it makes everything anew.
    run("quickstart.py", "--teacher_steps", "1", *steps[2:], "--output_dir", tmp_path)
    run("quickstart.py", *steps, "--output_dir", tmp_path, "--seeds", "0", "1")
    printed = capsys.readouterr().out
    for model in ("conv", "inv", "student without teachers", "student with both teachers"):
        assert f"| {model} | " in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seeds"] == [0, 1] and len(summary["metrics"]) == 2
    student = tmp_path / "seed_1" / "student"
    accuracy = summary["metrics"][1]["student with both teachers"]["accuracy"]
    assert f"| accuracy | {accuracy:.4f} |" in (student / "README.md").read_text()
    with PIL.Image.open(student / "quickstart.png") as picture:
        assert min(picture.size) > 300
    # Nothing that needs unpickling: only weights in safetensors, JSON, Markdown, the picture and the model's code.
    endings = {path.suffix for path in student.iterdir()}
    assert endings == {".safetensors", ".json", ".md", ".png", ".py"}


@pytest.mark.parametrize("script", NAMES)
def test_help_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit) as exit:
        run(script, "--help")
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: " in printed and "help" in printed


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_teacher.py", ["--preset", "resnet7", "--output_dir", "x"], 'There is no preset "resnet7"'),
        ("train_teacher.py", ["--dataset", "./nowhere", "--output_dir", "x"], "no folder or file ./nowhere"),
        ("train_teacher.py", ["--images_per_class", "500", "--output_dir", "x"], '500 images of class "0"'),
        ("record_logits.py", ["--teachers", "conv", "--output_dir", "x"], "given as NAME=FOLDER"),
        ("distill_student.py", ["--teacher_names", "conv", "--output_dir", "x"], 'no column "conv_logits"'),
        ("distill_student.py", ["--temperature", "0", "--output_dir", "x"], "A temperature is above 0"),
        ("evaluate_model.py", ["--model", "x", "--split", "dev"], 'There is no split "dev"; the splits are'),
        ("push_to_hub.py", ["--folder", "x", "--repo_id", "user/x"], "Give the folder of a trained model"),
    ],
)
def test_mistakes_end_in_one_sentence(script, arguments, message, tmp_path):
    arguments = [tmp_path / "x" if argument == "x" else argument for argument in arguments]
    with pytest.raises(SystemExit) as exit:
        run(script, *arguments)
    assert message in exit.value.code
    assert "\n" not in exit.value.code


def test_a_library_that_is_not_installed_ends_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper", "architecture": "resnet18"}))
    monkeypatch.setitem(BACKENDS_MAPPING, "timm", (lambda: False, BACKENDS_MAPPING["timm"][1]))
    with pytest.raises(SystemExit) as exit:
        run("record_logits.py", "--teachers", f"conv={tmp_path}", "--output_dir", tmp_path / "table")
    assert exit.value.code.startswith("record_logits.py: Timm") and "`pip install timm`" in exit.value.code
    assert "\n" not in exit.value.code


# The data-efficiency study


def study(folder, *arguments, images=100):
    few = ["--dataset", "digits", "--images", images, "--teacher_steps", "1", "--student_steps", "2"]
    folders = ["--results_dir", folder / "results", "--work_dir", folder / "work"]
    run("study_data_efficiency.py", *few, *folders, *arguments)


def test_a_cell_runs_once_and_keeps_its_recipe(tmp_path):
    cell = ["--stage", "search", "--methods", "both_row", "--seeds", "1"]
    study(tmp_path, *cell)
    paths = sorted((tmp_path / "results" / "search").iterdir())
    assert [path.name for path in paths] == [
        f"100_{name}_base_1.json" for name in ("both_row", "conv", "inv")
    ]  # its teachers are cells too
    content = json.loads(paths[0].read_text())
    assert content["split"] == "held out" and content["rows"] == 80 and len(content["predictions"]) == 20
    written = [path.stat().st_mtime_ns for path in paths]
    study(tmp_path, *cell)
    assert [path.stat().st_mtime_ns for path in paths] == written
    with pytest.raises(SystemExit, match="made by another recipe"):
        study(tmp_path, *cell, "--student_steps", "4")


def test_the_search_decides_and_the_test_images_stay_closed_before(tmp_path):
    with pytest.raises(SystemExit, match="search and choose first"):
        study(tmp_path, "--methods", "undistilled")
    with pytest.raises(SystemExit, match="run the search first"):
        study(tmp_path, "--stage", "choose")
    with pytest.raises(SystemExit, match="There is no variation trials; choose from base, "):
        study(tmp_path, "--variations", "trials")
    with pytest.raises(SystemExit, match="There is no method vit; choose from conv, inv, "):
        study(tmp_path, "--methods", "vit")
    with pytest.raises(SystemExit, match="has no cells of conv, .*; run study_data_efficiency.py --stage grid first"):
        run("report_data_efficiency.py", "--results_dir", tmp_path / "results")
    search = tmp_path / "results" / "search"
    search.mkdir(parents=True)
    script = runpy.run_path(str(SCRIPTS / "study_data_efficiency.py"))
    trials, combine = script["TRIALS"], script["combine"]
    random, best = np.random.default_rng(0), {}

    def results(method, variations):
        """Random accuracies of two seeds; returns the trials, best mean first."""
        accuracies = random.random((len(variations), 2))
        for variation, values in zip(variations, accuracies):
            for seed, accuracy in enumerate(values):
                path = search / f"3000_{method}_{variation}_{seed}.json"
                path.write_text(json.dumps({"metrics": {"accuracy": accuracy}}))
        return [variations[i] for i in (-accuracies.mean(1)).argsort()]

    for method, variations in trials.items():
        finalists = results(method, variations)[:2]
        best[method] = results(method, [f"{name}+patience_2" for name in finalists])[0].removesuffix("+patience_2")
    study(tmp_path, "--stage", "choose")
    chosen = json.loads((tmp_path / "results" / "recipes.json").read_text())
    assert {method: chosen[method] for method in trials} == {method: combine(best[method]) for method in trials}
    assert chosen["conv_row"] == chosen["both_row"] and chosen["conv"] == {}


def test_a_share_of_the_distance_is_of_the_seeds_that_all_have(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    table = runpy.run_path(str(SCRIPTS / "report_data_efficiency.py"))["gap_table"]

    def cells(*accuracies):
        return {1000: {seed: {"metrics": {"accuracy": accuracy}} for seed, accuracy in enumerate(accuracies)}}

    found = {"conv": cells(0.8, 0.9), "inv": cells(0.7, 0.7), "undistilled": cells(0.4, 0.8)}
    # (0.85 − 0.6) / (0.85 − 0.6), of the first seed (0.6 − 0.4) / (0.8 − 0.4), and of no seed.
    found |= {"both_views": cells(0.8, 0.9), "deit": cells(0.6), "co_advise": {3000: {}}}
    assert "| 1,000 | 60.0 → 85.0 | 100 % | 50 % | – |" in table(found)


def test_pairs_of_all_sizes_are_compared_together(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    table = runpy.run_path(str(SCRIPTS / "report_data_efficiency.py"))["difference_table"]
    labels = np.arange(10)

    def cells(*predictions):
        return {
            seed: {"metrics": {"accuracy": np.mean([int(c) == y for c, y in zip(text, labels)])}, "predictions": text}
            for seed, text in enumerate(predictions)
        }

    ours = {1000: cells("0123456780", "0123456700"), 3000: cells("0123456789")}
    alone = {1000: cells("0123456000", "0123400000"), 3000: cells("0123456700")}
    rows = table({"both_views": ours, "undistilled": alone, "deit": {1000: alone[1000]}}, labels).splitlines()[2:]
    interval = ttest_rel([0.9, 0.8, 1.0], [0.7, 0.5, 0.8]).confidence_interval()
    expected = f"| 3 | +23.33 | {100 * interval.low:+.2f} … {100 * interval.high:+.2f} |"
    assert len(rows) == 4 and rows[3].startswith("| 1,000 + 3,000 | no teachers " + expected)
    assert rows[0].startswith("| 1,000 | no teachers | 2 | +25.00 |")
    # What a rival has at one size only is not told twice.
    assert rows[1].startswith("| 1,000 | DeiT") and rows[2].startswith("| 3,000 | no teachers | 1 | +20.00 | – |")
    # Any method's pairs, against those that are asked for.
    given = {"both_row": ours, "conv_row": alone, "deit": alone}
    rows = table(given, labels, "both_row", ("conv_row",)).splitlines()[2:]
    assert len(rows) == 3 and rows[2].startswith("| 1,000 + 3,000 | convolution, one stored row " + expected)
    assert table(given, labels).splitlines()[2:] == []


def test_a_change_is_told_over_the_seeds_that_were_also_run_without_it(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    table = runpy.run_path(str(SCRIPTS / "report_data_efficiency.py"))["ablation_table"]
    cells = {seed: {"metrics": {"accuracy": 0.5}, "predictions": "01"} for seed in range(3)}
    changed = {seed: {"metrics": {"accuracy": 0.25}, "predictions": "11"} for seed in (1, 3)}
    found = {"base": {"both_views": {1000: cells}}}
    found["linear"] = {"both_views": {1000: changed, 3000: changed}, "deit": {1000: changed}}
    rows = table(found, np.array([0, 0])).splitlines()[2:]
    assert rows == ["| 1,000 | both, stored views | linear | 1 | -25.00 | – | -685.31 … +585.31 |"]


def test_seconds_compare_on_the_machine_that_made_most_of_a_size(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    report = runpy.run_path(str(SCRIPTS / "report_data_efficiency.py"))

    def cells(**seconds):
        return {1000: {seed: {"seconds": {"training": {"cpu": value}}, "machine": {"cpu": machine},
                              "metrics": {"accuracy": value / 1000}}
                       for seed, (machine, value) in enumerate(seconds.items())}}  # fmt: skip

    found = {"conv": cells(fast=10, slow=90), "inv": cells(fast=20)}
    found |= {"undistilled": cells(slow=300), "deit": cells(fast=30, other=200)}
    # The second DeiT's teacher ran elsewhere, and so did the student without teachers.
    comparable = report["on_one_machine"](found)
    assert report["time_table"](comparable).splitlines()[2:] == [
        "| convolution teacher | 1,000 | 0 | 0 | 10 | 10 |",
        "| involution teacher | 1,000 | 0 | 0 | 20 | 20 |",
        "| DeiT: convolution, hard, online | 1,000 | 10 | 0 | 30 | 40 |",
    ]
    # In the picture, seconds of those and accuracies of all seeds, as in the table of accuracies.
    points = {name: report["accuracies_by_seconds"](found, comparable, name, 1000) for name in found}
    assert points == {"conv": {10: [0.01, 0.09]}, "inv": {20: [0.02]}, "undistilled": {}, "deit": {40: [0.03, 0.2]}}


def test_the_study_ends_in_tables_pictures_and_cards(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    methods = ["conv", "inv", "undistilled", "both_views"]
    (results / "recipes.json").write_text(json.dumps(dict.fromkeys(methods, {})))
    study(tmp_path, "--methods", *methods, "--seeds", "0", "1")
    study(tmp_path, "--methods", "both_views", "--seeds", "1", "--variations", "hard+label_weight_0")
    folders = ["--results_dir", results, "--work_dir", tmp_path / "work", "--cards_dir", tmp_path / "cards"]
    run("report_data_efficiency.py", "--dataset", "digits", "--card_images", "100", *folders)
    accuracies = {
        name: [json.loads((results / f"grid/100_{name}_base_{seed}.json").read_text())["metrics"]["accuracy"] for seed in (0, 1)]
        for name in methods
    }  # fmt: skip
    report = (results / "README.md").read_text()
    ours, alone = accuracies["both_views"], accuracies["undistilled"]
    assert f"| both, stored views | {50 * sum(ours):.1f} ± {100 * statistics.stdev(ours):.1f} (2 seeds) |" in report
    difference = 50 * (sum(ours) - sum(alone))
    assert f"| 100 | no teachers | 2 | {difference:+.2f} |" in report
    changed = json.loads((results / "grid/100_both_views_hard+label_weight_0_1.json").read_text())
    difference = 100 * (changed["metrics"]["accuracy"] - ours[1])
    assert f"| 100 | both, stored views | hard+label_weight_0 | 1 | {difference:+.2f} | – |" in report
    logits = [json.loads((results / f"grid/100_both_views_base_{seed}.json").read_text())["logits"] for seed in (0, 1)]
    assert f"| {statistics.mean(found['conv_inv_divergence'] for found in logits):.3f} |\n" in report
    found = [json.loads((results / f"grid/100_both_views_base_{seed}.json").read_text()) for seed in (0, 1)]
    for cell in found:
        assert cell["fusions"]["mean_probabilities"] == cell["metrics"]["accuracy"]
        assert cell["fusions"]["class_token"] == cell["metrics"]["class_token_accuracy"]
    mean = statistics.mean(cell["fusions"]["mean_logits"] for cell in found)
    assert re.search(rf"\| both, stored views \| 100 \| 2 \| [^|]+ \| {100 * mean:.1f} ± ", report)
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
    run("report_data_efficiency.py", "--dataset", "digits", "--card_images", "100", *folders)
    again = ModelCard.load(tmp_path / "cards" / "fashion_mnist_100_student.md")
    assert again.content == card.content
