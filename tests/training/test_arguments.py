"""Arguments as users write them: in Python, on the command line, in a YAML file."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_ibdistill import DistillationArguments, IBViTConfig, IBViTForImageClassification, ImageTrainingArguments


ARGUMENTS = [ImageTrainingArguments, DistillationArguments]


def parse_flags(*flags):
    (arguments,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(list(flags))
    return arguments


@pytest.mark.parametrize(
    ("value", "expected"), [(2, [2.0]), (0.5, [0.5]), ([1, 2.5], [1.0, 2.5]), ((3.0, 4.0), [3.0, 4.0])]
)
@pytest.mark.parametrize("name", ["temperature", "teacher_weights"])
def test_one_number_or_several_become_a_list(name, value, expected, tmp_path):
    arguments = DistillationArguments(str(tmp_path), **{name: value})
    assert getattr(arguments, name) == expected
    assert all(type(number) is float for number in getattr(arguments, name))


def test_defaults_are_one_number_for_all_teachers(tmp_path):
    first, second = DistillationArguments(str(tmp_path)), DistillationArguments(str(tmp_path))
    assert first.temperature == [4.0] and first.teacher_weights == [1.0] and first.label_weight == 1.0
    assert first.distillation_mode == "soft"
    # Changing one run's list must not change the next run's.
    first.temperature.append(1.0)
    assert second.temperature == [4.0] and DistillationArguments(str(tmp_path)).temperature == [4.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_mode": "medium"}, 'distillation_mode="medium"'),
        ({"temperature": 0}, r"temperature=\[0\.0\]"),
        ({"temperature": [2.0, -1.0]}, r"temperature=\[2\.0, -1\.0\]"),
        ({"teacher_weights": -0.5}, r"teacher_weights=\[-0\.5\].*label_weight=1\.0"),
        ({"teacher_weights": [1.0, -2.0]}, r"teacher_weights=\[1\.0, -2\.0\]"),
        ({"label_weight": -1.0}, r"label_weight=-1\.0"),
        (
            {"standardize_logits": True, "distillation_mode": "hard"},
            'standardize_logits=True.*distillation_mode="hard"',
        ),
        ({"temperature": []}, r"temperature=\[\]"),
        ({"teacher_weights": []}, r"teacher_weights=\[\]"),
        ({"temperature": float("nan")}, r"temperature=\[nan\]"),
        ({"teacher_weights": [0.5, float("nan")]}, r"teacher_weights=\[0\.5, nan\]"),
    ],
)
def test_errors_name_the_field_and_the_value(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(str(tmp_path), **settings)


def test_weights_may_be_zero(tmp_path):
    arguments = DistillationArguments(str(tmp_path), teacher_weights=[0.0, 1.0], label_weight=0.0)
    assert arguments.teacher_weights == [0.0, 1.0] and arguments.label_weight == 0.0


# Flags and files


def test_flags(tmp_path):
    arguments = parse_flags(
        "--output_dir", str(tmp_path), "--temperature", "2", "8", "--teacher_weights", "0.5", "--label_weight", "0.25",
        "--distillation_mode", "hard", "--learning_rate", "1e-4", "--warmup_steps", "5", "--num_train_epochs", "2",
    )  # fmt: skip
    assert arguments.temperature == [2.0, 8.0] and arguments.teacher_weights == [0.5]
    assert arguments.label_weight == 0.25 and arguments.distillation_mode == "hard"
    assert arguments.learning_rate == 1e-4 and arguments.warmup_steps == 5 and arguments.num_train_epochs == 2


def test_flags_left_out_leave_the_defaults(tmp_path):
    parsed, built = (
        parse_flags("--output_dir", str(tmp_path)).to_dict(),
        DistillationArguments(str(tmp_path)).to_dict(),
    )
    own = [field.name for field in own_fields(DistillationArguments)]
    assert {name: parsed[name] for name in own} == {name: built[name] for name in own}


def test_dictionary_and_yaml_file(tmp_path):
    values = {"output_dir": str(tmp_path / "run"), "temperature": 3, "teacher_weights": [0.5, 2], "weight_decay": 0.1}
    (tmp_path / "run.yaml").write_text("\n".join(f"{name}: {value}" for name, value in values.items()))
    parser = HfArgumentParser(DistillationArguments)
    for (arguments,) in (parser.parse_dict(values), parser.parse_yaml_file(str(tmp_path / "run.yaml"))):
        assert arguments.temperature == [3.0] and arguments.teacher_weights == [0.5, 2.0]
        assert arguments.weight_decay == 0.1 and arguments.output_dir == str(tmp_path / "run")


def test_a_wrong_flag_is_refused_with_its_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_flags("--output_dir", str(tmp_path), "--temperature", "warm")
    assert "argument --temperature: invalid float value: 'warm'" in capsys.readouterr().err


# Help


def own_fields(arguments):
    """The fields that transformers does not have, or has with another default."""
    inherited = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    missing = object()
    return [
        field for field in dataclasses.fields(arguments) if inherited.get(field.name, missing) is not field.default
    ]


def test_own_fields_are_found():
    # The tests below would pass on an empty list.
    names = {field.name for field in own_fields(DistillationArguments)}
    assert {"distillation_mode", "temperature", "teacher_weights", "label_weight", "learning_rate"} <= names
    assert "seed" not in names


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_the_help_of_every_own_field_has_its_default(arguments):
    parser = HfArgumentParser(arguments)
    actions = {action.dest: action for action in parser._actions}
    for field in own_fields(arguments):
        assert len(field.metadata.get("help", "").split()) > 3, field.name
        # Formatting fails on a help text with a bare percent sign.
        help = parser._get_formatter()._expand_help(actions[field.name])
        if field.default is None:
            assert "by default" in help.lower(), field.name
        elif field.default is not dataclasses.MISSING:
            assert f"(default: {field.default})" in help, field.name
        else:
            assert f"(default: {field.default_factory()[0]:g})" in help, field.name


def test_biases_and_layer_norms_have_no_weight_decay(tmp_path):
    # As its help has it. Not only weight matrices have it.
    shape = {"image_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = IBViTForImageClassification(IBViTConfig(patch_size=4, num_hidden_layers=1, **shape))
    optimizer = Trainer(model, ImageTrainingArguments(str(tmp_path), eval_strategy="no")).create_optimizer()
    groups = {group["weight_decay"]: set(group["params"]) for group in optimizer.param_groups}
    assert groups.keys() == {0.05, 0.0}
    norms = {p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter in groups[0.0 if parameter in norms or name.endswith("bias") else 0.05], name


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_the_parser_shows_the_help(arguments):
    text = " ".join(HfArgumentParser(arguments).format_help().split())
    for field in own_fields(arguments):
        assert f"--{field.name}" in text
        assert " ".join(field.metadata["help"].split())[:30] in text


# As any other `TrainingArguments`


@pytest.mark.parametrize(("warmup_steps", "expected"), [(None, 20), (0.25, 50), (0.101, 21), (0, 0), (1, 1), (7, 7)])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_warm_up_is_a_share_below_one_and_a_number_of_steps_above(arguments, warmup_steps, expected, tmp_path):
    settings = {} if warmup_steps is None else {"warmup_steps": warmup_steps}
    assert arguments(str(tmp_path), **settings).get_warmup_steps(200) == expected


def test_image_arguments_change_nothing_else(tmp_path):
    # "eval_strategy" decides `do_eval` as well.
    ours = ImageTrainingArguments(str(tmp_path), eval_strategy="no")
    theirs = TrainingArguments(str(tmp_path), eval_strategy="no")
    # Without an accelerator, pinning has no use and torch warns, and transformers refuses bf16 unless `use_cpu` is set.
    own = {field.name for field in own_fields(ImageTrainingArguments)} | {"dataloader_pin_memory", "use_cpu"}
    assert ours.use_cpu != torch.accelerator.is_available()
    assert ours.dataloader_pin_memory == torch.accelerator.is_available()
    for field in dataclasses.fields(TrainingArguments):
        if field.init and field.name not in own:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_bf16_if_the_hardware_has_it_unless_given(tmp_path):
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if torch.accelerator.is_available() or "flags" not in flags:
        pytest.skip("/proc/cpuinfo does not list the units of the processor")
    has_units = "avx512_bf16" in flags or "amx_bf16" in flags
    assert ImageTrainingArguments(str(tmp_path)).bf16 == has_units
    assert ImageTrainingArguments(str(tmp_path), bf16=False).bf16 is False
    assert ImageTrainingArguments(str(tmp_path), bf16=True).bf16 is True
    (parsed,) = HfArgumentParser(ImageTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--bf16", "false"]
    )
    assert parsed.bf16 is False


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_a_hub_token_is_never_shown(arguments, tmp_path):
    # transformers masks it; a generated `__repr__` would not.
    shown = arguments(str(tmp_path), hub_token="hf_secret")
    assert "hf_secret" not in f"{shown!r} {shown!s} {shown.to_json_string()}"


def test_arguments_go_through_json(tmp_path):
    arguments = DistillationArguments(str(tmp_path), temperature=[2.0, 3.0], teacher_weights=0.5)
    values = json.loads(arguments.to_json_string())
    assert values["temperature"] == [2.0, 3.0] and values["teacher_weights"] == [0.5]
    assert values["distillation_mode"] == "soft" and values["label_weight"] == 1.0
