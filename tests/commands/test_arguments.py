"""How commands read their arguments: flags, files, help and mistakes."""

import dataclasses
import importlib
import json
import re
from importlib.metadata import entry_points

import pytest
import yaml
from running import ROOT, run
from transformers import TrainingArguments
from transformers.utils.import_utils import BACKENDS_MAPPING

from hf_ibdistill.commands import COMMANDS, main
from hf_ibdistill.commands.arguments import DataArguments, ViewArguments, last_checkpoint, name_folders, parse
from hf_ibdistill.commands.arguments import run as run_command
from hf_ibdistill.commands.distill import StudentArguments
from hf_ibdistill.training.arguments import DistillationArguments


TRAINING = ["train-teacher", "distill", "finetune"]


def module_of(command):
    return importlib.import_module(f"hf_ibdistill.commands.{command.replace('-', '_')}")


def mistake(*arguments):
    """The sentence that a command ends in."""
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code
    assert exit.value.code.startswith(f"hf-ibdistill {arguments[0]}: ")
    return exit.value.code


# Flags and files


def parse_distill(*arguments):
    """All arguments of the command, as one dictionary."""
    types = (DataArguments, ViewArguments, StudentArguments, DistillationArguments)
    *parsed, args = parse("distill", "", arguments, *types)
    return {name: value for part in parsed for name, value in vars(part).items()} | args.to_dict()


FLAGS = [
    ["--dataset", "some folder"],
    ["--output_dir", "out"],
    ["--learning_rate", "1e-3"],
    ["--max_steps", "12"],
    ["--weight_decay", "0.25"],
    ["--adam_beta1", "-1e-3"],
    ["--temperature", "2"],
    ["--teacher_weights", "1", "0.5"],
    ["--teacher_names", "conv"],
    ["--hub_model_id", "-name-"],
    ["--bf16", "false"],
    ["--standardize_logits"],
    ["--eval_strategy", "no"],
    ["--resume_from_checkpoint", "true"],
    ["--lr_scheduler_kwargs", '{"num_cycles": 2}'],
]
FILE = """
dataset: some folder
output_dir: out
learning_rate: 1e-3
max_steps: 12
weight_decay: "0.25"
adam_beta1: -1e-3
temperature: 2
teacher_weights: [1, 0.5]
teacher_names: conv
hub_model_id: -name-
bf16: false
standardize_logits: true
eval_strategy: no
resume_from_checkpoint: true
lr_scheduler_kwargs: {num_cycles: 2}
images_per_class: null
"""


@pytest.fixture
def settings(tmp_path):
    """Write a file of arguments; returns its path."""

    def write(text, name="settings.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_a_file_equals_its_flags(settings):
    # argparse takes what starts with a dash for a flag, unless "=" comes before it.
    flags = [f"{flag[0]}={flag[1]}" if flag[1:] and flag[1].startswith("-") else flag for flag in FLAGS]
    flags = [part for flag in flags for part in ([flag] if isinstance(flag, str) else flag)]
    expected = parse_distill(*flags)
    assert parse_distill("--config", settings(FILE)) == expected
    assert parse_distill(f"--config={settings(FILE)}") == expected
    as_json = json.dumps({**yaml.safe_load(FILE), "eval_strategy": "no"})
    assert parse_distill("--config", settings(as_json, "settings.json")) == expected
    # The values are those of the flags, not their spelling.
    values = {"learning_rate": 0.001, "max_steps": 12, "adam_beta1": -0.001, "temperature": [2.0], "bf16": False}
    values |= {"teacher_weights": [1.0, 0.5], "teacher_names": ["conv"], "images_per_class": None}
    values |= {"standardize_logits": True, "lr_scheduler_kwargs": {"num_cycles": 2}, "hub_model_id": "-name-"}
    assert {name: expected[name] for name in values} == values
    assert expected["eval_strategy"] == "no"


def test_flags_on_top_of_a_file_win(settings):
    path = settings(FILE)
    changes = ["--max_steps", "5", "--temperature", "1", "3", "--standardize_logits", "false"]
    for arguments in (["--config", path, *changes], [*changes, "--config", path]):
        found = parse_distill(*arguments)
        assert (found["max_steps"], found["temperature"], found["standardize_logits"]) == (5, [1.0, 3.0], False)
        assert found["learning_rate"] == 1e-3


def test_an_empty_file_changes_nothing(settings):
    assert parse_distill("--config", settings("# nothing"), "--output_dir", "x") == parse_distill("--output_dir", "x")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_stepz: 3", ["settings.yaml", "max_stepz", "max_steps"]),
        ("- max_steps", ["settings.yaml", "list"]),
        ("max_steps", ["settings.yaml", "str"]),
        ("max_steps: [3", ["settings.yaml", "line 1"]),
        ("max_steps: many", ["--max_steps", "many"]),
        ("max_steps: [1, 2]", ["2"]),
        ("max_steps: {a: 1}", ["--max_steps", '{"a": 1}']),
        ("bf16: perhaps", ["--bf16", "perhaps"]),
        ("config: other.yaml", ["settings.yaml", "config"]),
        ("traceback: true", ["settings.yaml", "traceback"]),
        ("1: 2", ["settings.yaml", "1"]),
        ("max_steps: 2\nmax_steps: 3", ["settings.yaml", "max_steps is given twice"]),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", ["settings.yaml", "a is given twice"]),
        ("accelerator_config: {a: 1}", ["'a'"]),
    ],
)
def test_mistakes_in_a_file_are_named(text, parts, settings):
    message = mistake("distill", "--output_dir", "x", "--config", settings(text))
    assert all(part in message for part in [*parts, "hf-ibdistill distill --help"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert str(tmp_path / "nowhere.yaml") in mistake("distill", "--config", tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert str(tmp_path / "binary.yaml") in mistake("distill", "--config", tmp_path / "binary.yaml")
    assert "--config" in mistake("distill", "--config")


@pytest.mark.parametrize("flag", ["--standardize_logits", "--bf16", "--without_teachers", "--push_to_hub"])
def test_a_flag_needs_no_value(flag):
    name = flag[2:]
    assert parse_distill("--output_dir", "x", flag, "--seed", "1")[name] is True
    assert parse_distill("--output_dir", "x", flag, "false")[name] is False
    assert parse_distill("--output_dir", "x", f"{flag}=yes")[name] is True


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), ("True", True), ("false", None), ("outputs/checkpoint-2",) * 2]
)
def test_what_training_resumes_from(value, expected, tmp_path):
    args = TrainingArguments(str(tmp_path), resume_from_checkpoint=value, report_to=[])
    assert last_checkpoint(args) == expected
    assert last_checkpoint(TrainingArguments(str(tmp_path), report_to=[])) is None


def test_teachers_are_names_and_folders():
    assert name_folders(["conv=outputs/conv", "inv=user/a=b"]) == {"conv": "outputs/conv", "inv": "user/a=b"}
    with pytest.raises(ValueError, match="teachers=conv "):
        name_folders(["conv"])
    with pytest.raises(ValueError, match='"conv".*: a and b'):
        name_folders(["conv=a", "conv=b"])


# Help


def read_help(capsys, command, flag="--help"):
    """Group → argument → its text, of lines of at most 100 columns."""
    with pytest.raises(SystemExit) as exit:
        run(command, flag)
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    groups = dict(re.findall(r"^([a-z]\S+):\n((?:  .*\n)+)", printed, re.MULTILINE))
    found = {}
    for title, text in groups.items():
        blocks = re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]
        found[title] = [" ".join(block.split()) for block in blocks]
        assert flag == "--help_all" or text.count("\n") <= 45, title
    return printed, found


def names_in(groups):
    """The arguments in the order of the help, without `-h`."""
    return [block.removeprefix("-h, ").split()[0] for blocks in groups.values() for block in blocks]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_each_argument_once(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed, groups = read_help(capsys, command)
    assert printed.startswith(f"usage: hf-ibdistill {command} ") and f"\nhf-ibdistill {command} " in f"\n{printed}"
    names = names_in(groups)
    assert len(names) == len(set(names)) and not [name for name in names if "-" in name[2:]]
    types = [kind for kind in vars(module_of(command)).values() if hasattr(kind, "_argument_group_name")]
    if command not in TRAINING:
        types = [kind for kind in types if not issubclass(kind, TrainingArguments)]
    ours = {f"--{field.name}" for kind in types for field in dataclasses.fields(kind)} | {"--help", "--config"}
    inherited = {f"--{field.name}" for field in dataclasses.fields(TrainingArguments)}
    if command in TRAINING:
        assert {"--output_dir", "--max_steps", "--learning_rate", "--seed", "--bf16", "--help_all"} <= set(names)
        assert len(set(names) & inherited) < 40 < len(inherited)
    assert ours - inherited <= set(names) <= ours | {"--traceback", "--help_all"}
    for block in [block for blocks in groups.values() for block in blocks]:
        assert block.count("default") <= 1, block
    booleans = {field.name for kind in types for field in dataclasses.fields(kind) if "bool" in str(field.type)}
    for block in [block for blocks in groups.values() for block in blocks]:
        if block.split()[0][2:] in booleans:
            assert "VALUE" not in block, block


@pytest.mark.parametrize("command", TRAINING)
def test_help_all_shows_the_arguments_of_transformers(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    few, many = (names_in(read_help(capsys, command, flag)[1]) for flag in ("--help", "--help_all"))
    assert set(few) < set(many) and {"--optim", "--max_grad_norm", "--ddp_backend"} <= set(many) - set(few)
    spellings = {name.replace("-", "_") for name in many}
    assert len(many) == len(set(many)) == len(spellings)


def test_the_command_lists_all_commands(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        printed = capsys.readouterr().out
        assert re.findall(r"^  (\S+) ", printed, re.MULTILINE) == list(COMMANDS)
    with pytest.raises(SystemExit, match='"distil".*distill'):
        main(["distil"])


def test_commands_launchers_and_entry_point_belong_together():
    (entry,) = entry_points(group="console_scripts", name="hf-ibdistill")
    assert entry.load() is main
    launchers = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py")}
    assert launchers.keys() == {command.replace("-", "_") for command in COMMANDS}
    # One text for all: the processes in test_launchers.py start only some of them.
    texts = {
        re.sub(rf'(?<=[ "]){command}(?=[`"])', "NAME", launchers[command.replace("-", "_")]) for command in COMMANDS
    }
    assert len(texts) == 1 and texts.pop().count("NAME") == 2
    assert all(callable(module_of(command).main) for command in COMMANDS)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["distill", "--outputdir", "x"], ["--outputdir", "--output_dir", "--help"]),
        (["distill", "--output_dir", "x", "--qqq=3"], ["--qqq", "--help"]),
        # An abbreviation would become ambiguous with the next release of transformers.
        (["distill", "--output_dir", "x", "--learning", "3"], ["--learning", "--learning_rate"]),
        (["train-teacher", "--output_dir", "x", "y"], ["y", "hf-ibdistill train-teacher --help"]),
        (["train-teacher", "--output_dir", "x", "--max_steps", "many"], ["--max_steps", "many", "--help"]),
        (["train-teacher"], ["--output_dir", "--help"]),
        (["evaluate", "--batch_size", "3"], ["--model", "--help"]),
        (["export", "--model", "x", "--quantize", "perhaps"], ["--quantize", "perhaps"]),
        (["distill", "--config", "a.yaml", "--config=b.yaml"], ["--config is given twice"]),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, parts):
    message = mistake(*arguments)
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train-teacher", "--preset", "resnet7", "--output_dir", "x"], ['preset="resnet7"', "resnet26"]),
        (["train-teacher", "--dataset", "./nowhere", "--output_dir", "x"], ["./nowhere"]),
        (["train-teacher", "--images_per_class", "500", "--output_dir", "x"], ["images_per_class=500", '"0"']),
        (["record", "--teachers", "conv", "--output_dir", "x"], ["teachers=conv ", "NAME=FOLDER"]),
        (["distill", "--output_dir", "x"], ["--teachers", "--without_teachers"]),
        (
            ["distill", "--without_teachers", "--teachers", "conv=y", "--output_dir", "x"],
            ["--without_teachers", "--teachers"],
        ),
        (["distill", "--teacher_names", "conv", "--output_dir", "x"], ["conv_logits"]),
        (["distill", "--temperature", "0", "--output_dir", "x"], ["temperature=[0.0]"]),
        (["evaluate", "--model", "x", "--split", "dev"], ["split=dev", "train", "validation", "test"]),
        (["push", "--folder", "x", "--repo_id", "user/x"], ["x", "config.json"]),
        (["export", "--model", "user/student"], ["model=user/student", "--output_dir"]),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, parts, tmp_path):
    message = mistake(*[tmp_path / "x" if argument == "x" else argument for argument in arguments])
    assert all(part in message for part in parts)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["distill", "--student", "y", "--hidden_size", "96"], ["hidden_size=96", "student=y"]),
        (["distill", "--student", "y", "--drop_path_rate", "0.1"], ["drop_path_rate=0.1", "student=y"]),
        (["distill", "--model", "y", "--patch_size=2"], ["patch_size=2", "student=y"]),
        (
            ["distill", "--student_config", "resnet", "--hidden_size", "8"],
            ["hidden_size=8", "student_config=['resnet']"],
        ),
        (["distill", "--student", "y", "--student_config", "resnet"], ["student_config=['resnet']", "student=y"]),
        (["distill", "--keep_rest"], ["keep_rest=True", "images_per_class=None"]),
        (["distill", "--without_teachers", "--unlabelled", "y"], ["unlabelled=y", "without_teachers=True"]),
        (["distill", "--min_confidence", "0.5"], ["min_confidence=0.5", "unlabelled_target=none"]),
        (
            ["distill", "--label_weight", "0", "--unlabelled_target", "teachers"],
            ['unlabelled_target="teachers"', "label_weight=0"],
        ),
        (["distill", "--unlabelled_target", "labels"], ["unlabelled_target", "labels", "pseudo_labels"]),
        (["distill", "--unlabelled", "x"], ["output_dir=", "unlabelled"]),
        (["train-teacher", "--linear_probe"], ["linear_probe=True", "model=None"]),
        (["distill", "--weight_decay", "-1"], ["weight_decay=-1"]),
        (["distill", "--save_strategy", "steps", "--save_steps", "0"], ["save_steps=0"]),
        (["distill", "--horizontal_flip", "0.5"], ["horizontal_flip=0.5", "num_views=0"]),
        (["record", "--crop", "resized", "--teachers", "a=y"], ["crop=resized", "num_views=0"]),
        (["record", "--num_views", "2", "--min_scale", "0.1", "--teachers", "a=y"], ["min_scale=0.1", "crop=pad"]),
        (
            ["record", "--num_views", "2", "--magnitude", "9", "--teachers", "a=y"],
            ["magnitude=9", "photometric_ops=0", "geometric_ops=0"],
        ),
        (["distill", "--without_teachers", "--temperature", "4"], ["temperature=[4.0]", "without_teachers=True"]),
        (["distill", "--without_teachers", "--label_weight", "0"], ["label_weight=0.0", "without_teachers=True"]),
        (
            ["finetune", "--model", "y", "--linear_probe", "--layer_decay", "0.5"],
            ["layer_decay=0.5", "linear_probe=True"],
        ),
        (["train-teacher", "--save_steps", "5"], ["save_steps=5", "save_strategy=no"]),
        (["train-teacher", "--image_size", "1"], ["image_size=1", "at least 2"]),
        (["distill", "--mlp_ratio", "0"], ["mlp_ratio=0.0"]),
        (["distill", "--lr_scheduler_kwargs", '{"foo": 1}'], ["lr_scheduler_kwargs", "foo", "cosine"]),
        (["distill", "--lr_scheduler_kwargs", "[1]"], ["lr_scheduler_kwargs"]),
        (["distill", "--student", "x"], ["output_dir=", "student"]),
        (["finetune", "--model", "y", "--dataset", "x"], ["output_dir=", "dataset"]),
        (["record", "--teachers", "a=y", "b=x/"], ["output_dir=", "teachers=b"]),
    ],
)
def test_arguments_without_effect_or_sense_are_refused_first(arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = mistake(*arguments, "--output_dir", "x")
    assert all(part in message for part in parts)


def test_dates_in_a_mapping_are_texts(settings):
    path = settings(
        "optim_target_modules: null\naccelerator_config: {split_batches: false, gradient_accumulation_kwargs: {a: 2020-01-01}}"
    )
    assert "2020-01-01" in str(parse_distill("--config", path, "--output_dir", "x")["accelerator_config"])


def test_flags_without_effect_may_have_no_value_or_be_false():
    found = parse_distill("--output_dir", "x", "--without_teachers", "--standardize_logits", "false")
    assert found["without_teachers"] is True and found["standardize_logits"] is False


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 0},
        {"per_device_train_batch_size": 0},
        {"label_smoothing_factor": 1.5},
        {"label_smoothing_factor": -0.1},
        {"num_train_epochs": 0},
    ],
)
def test_training_that_cannot_run_is_refused(changes, tmp_path):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DistillationArguments(str(tmp_path), report_to=[], **changes)


def test_a_library_that_is_not_installed_ends_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper", "architecture": "resnet18"}))
    monkeypatch.setitem(BACKENDS_MAPPING, "timm", (lambda: False, BACKENDS_MAPPING["timm"][1]))
    message = mistake("record", "--teachers", f"conv={tmp_path}", "--output_dir", tmp_path / "table")
    assert "`pip install timm`" in message


def test_a_traceback_is_shown_on_request():
    with pytest.raises(ValueError, match="split=dev"):
        run("evaluate", "--model", "x", "--split", "dev", "--traceback")
    with pytest.raises(ValueError, match="--qqq"):
        run("evaluate", "--model", "x", "--traceback", "--qqq")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_train_keep_freed_memory(monkeypatch, name):
    called = []
    monkeypatch.setattr("hf_ibdistill.commands.arguments.keep_freed_memory", lambda: called.append("memory"))
    run_command(name, called.append, [])
    # Before the command allocates.
    trains = name in ("quickstart", "train-teacher", "distill", "finetune")
    assert called == (["memory", []] if trains else [[]])
