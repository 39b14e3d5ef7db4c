"""Random arguments, of Python and of the commands: each ends in a result, or in an error that names the argument."""

import dataclasses
import itertools
import json
import math
import os

import PIL.Image
import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_ibdistill import (
    DistillationArguments,
    IBViTConfig,
    ViewRecipe,
    assess_table,
    build_image_processor,
    class_config,
    logits_metrics,
    predict,
    record_teacher_logits,
    select_per_class,
    verify_teacher_logits,
)
from hf_ibdistill.commands.arguments import DataArguments, ViewArguments, parse
from hf_ibdistill.commands.record import RecordingArguments
from hf_ibdistill.images.views import make_view


# 2,000 were run once; each takes some 20 ms.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))
few = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = [
    0, 1, 2, 3, -1, 0.5, 1.5, math.nan, math.inf, 10**12, "", "x", "1", "0.5", None, True, False, [], [1], [0.5, 1.0],
    (1, 2), (1, 0.5), ["a"], ["a", "a"], {}, {"a": 1}, "pad", "none", "resized", "float32", "hard", b"x", 1j,
]  # fmt: skip
# What Python itself says about a value that nobody checked.
OF_PYTHON = (
    "no len()", "not iterable", "object has no attribute", "not supported between", "not subscriptable", "unhashable",
    "unsupported operand", "cannot be interpreted", "must be real number",
)  # fmt: skip


@pytest.fixture(scope="module")
def calls(teachers, tmp_path_factory, images):
    """Name → a call, and its arguments."""
    from hf_ibdistill import load_teachers

    (teacher,) = load_teachers({"conv": teachers["conv"]})
    conv = {"conv": (teacher.model, teacher.image_processor)}
    table, folders = images(3), (tmp_path_factory.mktemp("t") / "t" for _ in itertools.count())
    recorded = record_teacher_logits(table, conv, output_dir=next(folders))

    def names(kind, *without):
        return [field.name for field in dataclasses.fields(kind) if field.init and field.name not in without]

    ours = names(DistillationArguments)
    ours = [name for name in ("temperature", "teacher_weights", "label_weight", "distillation_mode") if name in ours]
    recording = ["views", "top_k", "dtype", "batch_size", "shard_size", "image_column", "label_column"]
    shape = ["teacher_names", "fusion", "patch_embedding", "hidden_size", "num_attention_heads", "image_size"]
    return {
        "views": (
            lambda **given: make_view(PIL.Image.new("RGB", (8, 8)), ViewRecipe(**given), 5, 0),
            names(ViewRecipe, "photometric_ops", "geometric_ops", "image_size"),
        ),
        "record": (lambda **given: record_teacher_logits(table, conv, output_dir=next(folders), **given), recording),
        "distillation": (lambda **given: DistillationArguments(next(folders), use_cpu=True, **given), ours),
        "student": (lambda **given: IBViTConfig(**given), [*shape, "patch_size", "teacher_spatial_operators"]),
        "metrics": (lambda **given: logits_metrics(recorded, **given), ["temperature", "num_rows", "seed"]),
        "assess": (
            lambda **given: assess_table({"train": recorded}, **given),
            ["temperature", "num_rows", "seed", "label_column"],
        ),
        "verify": (lambda **given: verify_teacher_logits(recorded, conv, **given), ["num_rows", "seed", "tolerance"]),
        "select": (
            lambda **given: select_per_class(table, **{"images_per_class": 1, **given}),
            ["images_per_class", "label_column", "seed"],
        ),
        "processor": (lambda **given: build_image_processor(table, **given), ["image_column"]),
        "classes": (lambda **given: class_config(table, **given), ["label_column"]),
        "predict": (
            lambda **given: predict(teacher.model, teacher.image_processor, table, **given),
            ["batch_size", "image_column", "label_column"],
        ),
    }


@few
@given(st.data())
def test_arguments_fit_or_are_named(calls, data):
    name = data.draw(st.sampled_from(sorted(calls)))
    call, arguments = calls[name]
    drawn = data.draw(
        st.dictionaries(
            st.sampled_from(arguments), st.sampled_from(VALUES), min_size=1, max_size=min(3, len(arguments))
        )
    )
    try:
        call(**drawn)
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        assert any(argument in str(error) for argument in drawn), (name, drawn, error)
        assert not any(words in str(error) for words in OF_PYTHON), (name, drawn, error)


# Spellings that YAML 1.1 takes for numbers, booleans, dates or nothing
TEXTS = [
    "1e-3", "12", "012", "0o17", "1_000", "1.5", ".5", "-1e-3", "inf", ".nan", "1:30", "2024-01-01", "yes", "no", "on", "off",
    "true", "False", "x", "a b", "~/x", "conv=a", "no=b", "e3", "=",
]  # fmt: skip
TYPES = (DataArguments, ViewArguments, RecordingArguments)
FIELDS = sorted(field.name for kind in TYPES for field in dataclasses.fields(kind))


def outcome(arguments):
    """What the arguments are read as, or the error."""
    try:
        return [vars(part) for part in parse("record", "", arguments, *TYPES)]
    except ValueError as error:
        return str(error)


@few
@given(
    st.dictionaries(st.sampled_from(FIELDS), st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3), max_size=4),
    st.data(),
)
def test_a_file_of_any_settings_equals_its_flags(tmp_path, chosen, data):
    chosen = {"teachers": ["conv=a"], "output_dir": ["x"], **chosen}
    lines, flags = [], []
    for name, values in chosen.items():
        written = [json.dumps(value) if data.draw(st.booleans()) else value for value in values]
        if len(values) > 1 or data.draw(st.booleans()):
            lines.append(f"{name}: [{', '.join(written)}]")
            flags += [f"--{name}", *values]
        else:
            lines.append(f"{name}: {written[0]}")
            flags.append(f"--{name}={values[0]}")
    path = tmp_path / "settings.yaml"
    path.write_text("\n".join(lines))
    found, expected = outcome(["--config", str(path)]), outcome(flags)
    assert repr(found) == repr(expected), lines
    if isinstance(found, str):
        assert "--help" in found or any(name in found for name in chosen), found
