"""Every form of a teacher, its logits, and the hash of its weights."""

import copy
import json
import re
import unicodedata

import numpy as np
import pytest
import torch
import torchvision
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, Teacher, load_teachers
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.teachers import on_device, require_model


LABELS = {0: "cat", 1: "dog", 2: "owl"}
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3])


def small_model(family):
    shape = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "id2label": LABELS}
    if family == "resnet":
        return ResNetForImageClassification(ResNetConfig(layer_type="basic", **shape))
    if family == "vit":
        sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16, "id2label": LABELS}
        return ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    config = IBResNetConfig(stem="plain", downsample_strides=[1, 2], reduction=1, spatial_operator=family, **shape)
    return IBResNetForImageClassification(config)


FAMILIES = ["convolution", "involution", "resnet", "vit"]


def save(model, folder, processor=PROCESSOR):
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


# Forms of a teacher


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["folder", "folder as text", "model", "tuple"])
def test_forms_of_a_teacher(form, family, tmp_path):
    model, pixel_values = small_model(family).eval(), torch.randn(2, 3, 8, 8)
    save(model, tmp_path)
    given = {
        "folder": tmp_path,
        "folder as text": str(tmp_path),
        "model": AutoModelForImageClassification.from_pretrained(tmp_path),
        "tuple": (model, PROCESSOR),
    }[form]
    (teacher,) = load_teachers({"light_1": given})
    assert isinstance(teacher, Teacher) and teacher.name == "light_1"
    assert type(teacher.model) is type(model) and not teacher.model.training
    assert list(teacher.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert teacher.class_names == ["cat", "dog", "owl"]
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(pixel_values), model(pixel_values).logits, rtol=0, atol=1e-5)


def test_several_teachers_keep_their_order_and_their_own_processors(tmp_path):
    save(small_model("resnet"), tmp_path / "a", ConvNextImageProcessor(size={"shortest_edge": 12}))
    teachers = load_teachers({"z": tmp_path / "a", "a": (small_model("involution"), PROCESSOR)})
    assert [teacher.name for teacher in teachers] == ["z", "a"]
    assert teachers[0].image_processor.size["shortest_edge"] == 12 and teachers[1].image_processor is PROCESSOR


def test_a_model_in_training_mode_is_put_into_evaluation_mode():
    model = small_model("resnet").train()
    (teacher,) = load_teachers({"a": (model, PROCESSOR)})
    before = teacher.weights_sha256()
    pixel_values = torch.randn(4, 3, 8, 8)
    together, alone = teacher.logits(pixel_values), teacher.logits(pixel_values[:1])
    # Batch norm uses the running statistics and leaves them as they are, so the logits of a row do not depend on its batch.
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)
    assert teacher.weights_sha256() == before


# Errors


@pytest.mark.parametrize("form", ["folder", "model of a folder", "model of no folder"])
@pytest.mark.parametrize("family", ["involution", "resnet"])
def test_a_missing_image_processor_is_explained(family, form, tmp_path):
    model = small_model(family)
    save(model, tmp_path, processor=None)
    if form == "model of a folder":
        model = AutoModelForImageClassification.from_pretrained(tmp_path)
    folder = f" in {re.escape(str(tmp_path))}" if form != "model of no folder" else ""
    with pytest.raises(ValueError, match=rf'"light" has no image processor{folder}\..*\(model, image_processor\)'):
        load_teachers({"light": tmp_path if form == "folder" else model})


@pytest.mark.parametrize("name", ["", "my teacher", "conv-1", "1st", "a.b", "org/name"])
def test_names_that_cannot_name_a_column_are_refused(name):
    with pytest.raises(ValueError, match=f'"{re.escape(name)}" cannot name a teacher'):
        load_teachers({"good": (small_model("resnet"), PROCESSOR), name: (small_model("resnet"), PROCESSOR)})


def test_no_teacher_and_other_objects_are_refused():
    with pytest.raises(ValueError, match="teachers={}"):
        load_teachers({})
    with pytest.raises(ValueError, match='"a" is a Linear, .*Pass a Hub id'):
        load_teachers({"a": torch.nn.Linear(2, 2)})


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="nothing-here"):
        load_teachers({"a": tmp_path / "nothing-here"})


# Logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_float32_without_gradients(dtype, family, tmp_path):
    model, pixel_values = small_model(family).to(dtype).eval(), torch.randn(2, 3, 8, 8)
    # transformers opens a checkpoint in the type it was saved in; image processors return float32 in any case.
    (teacher,) = load_teachers({"a": save(model, tmp_path)})
    logits = teacher.logits(pixel_values)
    assert logits.dtype == torch.float32 and logits.shape == (2, 3)
    assert not logits.requires_grad
    with torch.no_grad():
        expected = model(pixel_values.to(dtype)).logits.float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


# Hash


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_hash_survives_saving_and_use(family, dtype, tmp_path):
    model = small_model(family).to(dtype)
    teacher = Teacher("a", model.eval(), PROCESSOR)
    before = teacher.weights_sha256()
    assert len(before) == 64 and int(before, 16) >= 0
    (loaded,) = load_teachers({"other_name": save(model, tmp_path)})
    assert loaded.weights_sha256() == before
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8, dtype=dtype))
    assert teacher.weights_sha256() == before


@pytest.mark.parametrize("family", ["convolution", "involution", "resnet"])
def test_the_hash_changes_with_any_parameter_or_buffer(family):
    teacher = Teacher("a", small_model(family), PROCESSOR)
    hashes = [teacher.weights_sha256()]
    tensors = teacher.model.state_dict()
    assert any(name.endswith("running_mean") for name in tensors)
    for tensor in tensors.values():
        # The smallest possible change of one number.
        flat = tensor.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0)) if tensor.is_floating_point() else flat[-1] + 1
        hashes.append(teacher.weights_sha256())
    assert len(set(hashes)) == len(tensors) + 1


def test_the_hash_depends_on_types_and_places():
    model = small_model("resnet")
    teacher = Teacher("a", model, PROCESSOR)
    before = teacher.weights_sha256()
    weight = model.classifier[1].weight.data
    # The same numbers in another order, and then in another type.
    weight.copy_(weight.flip(0))
    flipped = teacher.weights_sha256()
    model.double()
    assert len({before, flipped, teacher.weights_sha256()}) == 3


def test_the_hash_depends_on_names_and_shapes():
    numbers = torch.arange(6.0)
    tensors = [{"a": numbers}, {"b": numbers}, {"a": numbers.view(2, 3)}, {"a": numbers[:3], "b": numbers[3:]}]
    hashes = [Teacher("a", torch.nn.ParameterDict(tensors), PROCESSOR).weights_sha256() for tensors in tensors]
    assert len(set(hashes)) == len(tensors)


# Teachers as people have them


@pytest.mark.parametrize("pair", ["folder and processor", "folder and folder", "model and folder"])
def test_each_of_a_pair_may_be_a_folder(pair, tmp_path):
    model = small_model("resnet").eval()
    save(model, tmp_path, ViTImageProcessor(size={"height": 4, "width": 4}))
    pairs = {
        "folder and processor": (tmp_path, PROCESSOR),
        "folder and folder": (str(tmp_path), tmp_path),
        "model and folder": (model, tmp_path),
    }
    (teacher,) = load_teachers({"a": pairs[pair]})
    assert teacher.image_processor.size["height"] == (8 if pair == "folder and processor" else 4)
    assert teacher.weights_sha256() == Teacher("a", model, PROCESSOR).weights_sha256()


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ((torch.nn.Sequential(torch.nn.Flatten()), PROCESSOR), "Sequential"),
        ((small_model("resnet"), torchvision.transforms.ToTensor()), "ToTensor"),
        ((small_model("resnet"), PROCESSOR, 1), "tuple"),
        (torch.compile(small_model("resnet")), "OptimizedModule"),
        (3, "int"),
        (None, "NoneType"),
    ],
    ids=["module", "transform", "three", "compiled", "number", "none"],
)
def test_what_is_no_teacher_is_named(teacher, words):
    with pytest.raises(ValueError, match=f'teacher "light".*{words}|{words}.*teacher "light"'):
        load_teachers({"light": teacher})


@pytest.mark.parametrize("teachers", [["outputs/conv"], "outputs/conv", None])
def test_teachers_without_names_are_refused(teachers):
    with pytest.raises(TypeError, match=re.escape(f"teachers={teachers!r}")):
        load_teachers(teachers)


@pytest.mark.parametrize("name", ["cafe\u0301", "ﬁ", 3, None])
def test_names_that_look_like_others_are_refused(name):
    with pytest.raises(ValueError, match=f'"{name}" cannot name a teacher'):
        load_teachers({name: (small_model("resnet"), PROCESSOR)})


class Wrapped(torch.nn.Module):
    """Returns what the wrapped model returns in another form."""

    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, pixel_values):
        logits = self.model(pixel_values).logits
        return {"tensor": logits, "tuple": (logits, None), "dict": {"logits": logits}}[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "return_dict=False"])
def test_outputs_of_other_forms(form):
    model, pixel_values = small_model("resnet").eval(), torch.randn(2, 3, 8, 8)
    expected = model(pixel_values).logits
    if form == "return_dict=False":
        model.config.return_dict = False
    else:
        model.forward = Wrapped(copy.deepcopy(model), form).forward
    (teacher,) = load_teachers({"a": (model, PROCESSOR)})
    torch.testing.assert_close(teacher.logits(pixel_values), expected, rtol=0, atol=1e-5)


def test_a_head_that_the_configuration_does_not_fit_is_named():
    model = small_model("resnet")
    model.classifier[1] = torch.nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r'teacher "a" .*\(2, 5\).* 3 classes'):
        Teacher("a", model.eval(), PROCESSOR).logits(torch.randn(2, 3, 8, 8))


def test_a_teacher_that_fails_is_named():
    config = ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=[16], depths=[1], id2label=LABELS)
    with pytest.raises(ValueError, match=r'teacher "a" .*ResNet.*\(2, 3, 8, 8\).*channel'):
        Teacher("a", ResNetForImageClassification(config).eval(), PROCESSOR).logits(torch.randn(2, 3, 8, 8))
    model = small_model("resnet")
    model.forward = lambda **inputs: {"scores": 1}
    with pytest.raises(ValueError, match='teacher "a"'):
        Teacher("a", model, PROCESSOR).logits(torch.randn(2, 3, 8, 8))


def test_memory_that_runs_out_is_not_a_fault_of_the_teacher():
    model = small_model("resnet")

    def forward(**inputs):
        raise torch.OutOfMemoryError("full")

    model.forward = forward
    with pytest.raises(torch.OutOfMemoryError):
        Teacher("a", model, PROCESSOR).logits(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "labels", [{1: "cat", 2: "dog", 3: "owl"}, {0: "cat", 1: "dog", 3: "owl"}, {"a": "cat"}, {}, None]
)
def test_classes_that_are_not_numbered_from_0_are_named(labels):
    model = small_model("resnet")
    model.config.id2label = labels
    with pytest.raises(ValueError, match='id2label of the teacher "a"'):
        Teacher("a", model, PROCESSOR).match_classes(["cat", "dog", "owl"])


def test_numbers_of_classes_may_be_text_and_names_must_differ():
    model = small_model("resnet")
    model.config.id2label = {"2": "owl", "0": "cat", "1": "dog"}
    teacher = Teacher("a", model, PROCESSOR)
    teacher.match_classes(["cat", "dog", "owl"])
    assert teacher.class_names == ["cat", "dog", "owl"]
    model.config.id2label = {0: "cat", 1: "cat", 2: "owl"}
    with pytest.raises(ValueError, match=r'the teacher "a" .*dog'):
        teacher.match_classes(["cat", "dog", "owl"])


@pytest.mark.parametrize("given", [("cat", 1), [0, "dog"], range(2), [np.int64(0), np.int32(1)]])
@torch.no_grad()
def test_classes_of_any_sequence_are_the_same_record(given):
    model, pixels = small_model("resnet").eval(), torch.rand(2, 3, 8, 8)
    (teacher,) = load_teachers({"a": (model, PROCESSOR)}, classes={"a": {"pet": given}})
    teacher.match_classes(["pet", "owl"])
    logits = model(pixels).logits
    expected = torch.stack([logits[:, :2].logsumexp(1), logits[:, 2]], dim=1)
    torch.testing.assert_close(teacher.logits(pixels), expected)
    found = teacher.describe(LogitsEncoding())
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("spelling", ["NFC", "NFD"])
@pytest.mark.parametrize("other", ["NFC", "NFD"])
def test_an_accented_letter_in_a_mapping_is_one_sign(spelling, other):
    model = small_model("resnet")
    model.config.id2label = {0: unicodedata.normalize(other, "b\u00e4r"), 1: "dog", 2: "owl"}
    bear = unicodedata.normalize(spelling, "b\u00e4r")
    for mapping, expected in (({"x": bear}, ["x", "dog"]), ({bear: 0}, [unicodedata.normalize(other, bear), "dog"])):
        (teacher,) = load_teachers({"a": (model, PROCESSOR)}, classes={"a": mapping})
        teacher.match_classes(expected)
        assert list(teacher._matched.values()) == [[0], [1]]
        assert 0 in teacher.describe(LogitsEncoding())["classes"].values() or mapping == {"x": bear}


@pytest.mark.parametrize("wrong", [None, 1.0, True, {"cat": 1}, {0, 1}, [None]])
def test_what_is_no_class_is_named(wrong):
    with pytest.raises(
        TypeError, match=f'teacher "a" .*{re.escape(repr(wrong[0] if isinstance(wrong, list) else wrong))}'
    ):
        load_teachers({"a": (small_model("resnet"), PROCESSOR)}, classes={"a": {"x": wrong}})


def test_a_misspelled_class_of_the_dataset_is_the_one_that_is_named():
    (teacher,) = load_teachers({"a": (small_model("resnet"), PROCESSOR)}, classes={"a": {"pett": "cat"}})
    with pytest.raises(ValueError, match="pett"):
        teacher.match_classes(["pet", "owl"])


def test_classes_may_be_matched_again():
    (teacher,) = load_teachers({"a": (small_model("resnet"), PROCESSOR)})
    for expected in (["owl", "cat"], ["cat", "dog", "owl"], ["dog", "cat", "owl"]):
        teacher.match_classes(expected)
        assert teacher.class_names == expected


def test_a_module_is_named_by_its_type_alone():
    with pytest.raises(TypeError, match=r"^model=Sequential\(…\) is"):
        require_model(torch.nn.Sequential(torch.nn.Linear(1, 1)))


class Packed(torch.nn.Module):
    """Keeps its weights in an object of its own, as quantized layers do."""

    def get_extra_state(self):
        return object()


def test_weights_that_cannot_be_hashed_are_named():
    with pytest.raises(ValueError, match='teacher "a" .*_extra_state'):
        Teacher("a", Packed(), PROCESSOR).weights_sha256()


# Damaged files


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_teacher_without_its_head_is_refused(family, tmp_path):
    model = small_model(family)
    save(model.base_model, tmp_path)
    head = next(name for name, _ in model.named_parameters() if name.startswith("classifier"))
    with pytest.raises(ValueError, match=f'teacher "conv" has no .*{head}') as error:
        load_teachers({"conv": tmp_path})
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", None], ids=["empty", "list", "half"])
def test_a_damaged_file_is_named_with_its_teacher(name, content, tmp_path):
    save(small_model("convolution"), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises((ValueError, OSError), match='teacher "conv" cannot be loaded from') as error:
        load_teachers({"conv": tmp_path})
    assert str(tmp_path) in str(error.value) and ("image processor" in str(error.value)) == name.startswith("pre")


def test_a_teacher_that_cannot_be_found_is_named():
    with pytest.raises(OSError, match='teacher "conv" cannot be loaded from nobody/nothing'):
        load_teachers({"conv": "nobody/nothing"})


def test_weights_on_the_meta_device_are_named():
    with torch.device("meta"):
        model = small_model("convolution")
    with pytest.raises(ValueError, match='teacher "conv" .*with its weights loaded'):
        Teacher("conv", model, PROCESSOR).weights_sha256()


def test_a_model_goes_back_to_its_device_even_after_an_error():
    class Model:
        device = "here"

        def to(self, device):
            self.device = device
            return self

    model = Model()
    with on_device(model, "there") as moved:
        assert moved is model and model.device == "there"
    assert model.device == "here"
    with pytest.raises(KeyError), on_device(model, "there"):
        raise KeyError
    assert model.device == "here"
