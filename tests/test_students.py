"""Students that start from any checkpoint, for other teachers, images and classes; their image processors and patches."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_ibdistill import (
    IBResNetConfig,
    IBViTConfig,
    IBViTForImageClassification,
    load_image_processor,
    load_student,
)
from hf_ibdistill.students import build_student, check_fit, default_patch_size


SHAPE = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SHAPE["num_hidden_layers"] = 2
ANIMALS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
PLANTS = {"id2label": {0: "oak", 1: "elm", 2: "fir"}, "label2id": {"oak": 0, "elm": 1, "fir": 2}}


def build(kind):
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(**SHAPE, **ANIMALS))
    if kind.startswith("deit"):
        model = DeiTForImageClassification if kind == "deit" else DeiTForImageClassificationWithTeacher
        return model(DeiTConfig(**SHAPE, **ANIMALS))
    names = () if kind == "no teachers" else ("conv", "inv")
    stem = "convolution" if kind == "no teachers" else kind
    config = IBViTConfig(teacher_names=names, patch_embedding=stem, stem_channels=16, **SHAPE, **ANIMALS)
    return IBViTForImageClassification(config)


STUDENTS = ["linear", "convolution", "bias_stems", "no teachers"]


@pytest.mark.parametrize("kind", ["linear", "vit"])
def test_none_keeps_what_the_checkpoint_has(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    fields = dict.fromkeys(("image_size", "fusion", "id2label", "teacher_spatial_operators"))
    model, expected = load_student(tmp_path, None, **fields), load_student(tmp_path)
    assert model.config.to_dict() == expected.config.to_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("size", [8, 12, 4])
@pytest.mark.parametrize("kind", STUDENTS)
@torch.no_grad()
def test_another_image_size_predicts_what_interpolation_predicts(kind, size, tmp_path):
    original, images = build(kind).eval(), torch.randn(2, 3, size, size)
    original.save_pretrained(tmp_path / "original")
    model = load_student(tmp_path / "original", image_size=size)
    assert not model.training and model.config.image_size == size
    assert model.config.teacher_names == original.config.teacher_names
    model.save_pretrained(tmp_path / "resized")
    for student in (model, IBViTForImageClassification.from_pretrained(tmp_path / "resized")):
        torch.testing.assert_close(student(images).logits, original(images, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("classes", [PLANTS, {"num_labels": 5}])
def test_other_classes_get_new_heads_and_the_same_classes_the_old_ones(classes, tmp_path):
    original = build("convolution")
    original.save_pretrained(tmp_path)
    weights = original.state_dict()
    for fields, is_new in ((classes, True), (ANIMALS, False)):
        model = load_student(tmp_path, fusion="class_token", **fields)
        assert model.config.fusion == "class_token" and model.config.num_labels == len(model.config.id2label)
        for name, tensor in model.state_dict().items():
            is_kept = tensor.shape == weights[name].shape and torch.equal(tensor, weights[name])
            # New biases are zero, as the old ones are.
            assert is_kept != (is_new and "head" in name) or (tensor == 0).all(), name
    assert load_student(tmp_path, **PLANTS).config.id2label == PLANTS["id2label"]


@pytest.mark.parametrize("kind", ["vit", "deit", "deit with teacher"])
@torch.no_grad()
def test_it_may_start_as_a_vit_or_deit(kind, tmp_path):
    original, images = build(kind).eval(), torch.randn(2, 3, 12, 12)
    original.save_pretrained(tmp_path)
    model = load_student(tmp_path, image_size=12)
    assert model.config.teacher_names == ([] if kind == "vit" else ["distillation"])
    torch.testing.assert_close(model(images).logits, original(images, interpolate_pos_encoding=True).logits)
    assert load_student(tmp_path, **PLANTS).config.id2label == PLANTS["id2label"]


@pytest.mark.parametrize("size", [8, 12])
@pytest.mark.parametrize("kind", ["linear", "convolution", "bias_stems"])
@pytest.mark.parametrize("names", [("inv", "conv"), ("inv", "new", "conv"), ("inv",), ("new",), (), ("a", "b")])
@torch.no_grad()
def test_tokens_and_heads_go_with_their_teachers_names(names, kind, size, tmp_path):
    original = build(kind)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    original.save_pretrained(tmp_path)
    model = load_student(tmp_path, names, image_size=size)
    assert model.config.teacher_names == list(names) and not model.training

    def parts(student):
        """Name → token, position and head."""
        embeddings, heads = student.ibvit.embeddings, [student.class_head, *student.teacher_heads]
        tokens = [embeddings.class_token, *([embeddings.teacher_tokens] if student.teacher_heads else [])]
        tokens = torch.cat(tokens, dim=1)[0]
        positions = embeddings.position_embeddings[0]
        found = [(*of_token, head.weight, head.bias) for *of_token, head in zip(tokens, positions, heads)]
        return dict(zip(["class", *student.config.teacher_names], found, strict=True)), positions[len(heads) :]

    (before, patches), (after, new_patches) = parts(original.eval()), parts(model)
    for name, tensors in after.items():
        for found, expected in zip(tensors, before.get(name, before["class"])):
            assert torch.equal(found, expected), name
    if size == 8:
        assert torch.equal(new_patches, patches)
    shared = {name: tensor for name, tensor in original.state_dict().items() if "embeddings." not in name}
    for name, tensor in model.state_dict().items():
        if name in shared and not name.startswith("teacher_heads"):
            assert torch.equal(tensor, shared[name]), name
    if len(names) == 2 and "new" not in names and "a" not in names:
        # The same tokens in another order.
        images = torch.randn(2, 3, size, size)
        outputs, expected = model(images), original(images, interpolate_pos_encoding=True)
        torch.testing.assert_close(outputs.logits, expected.logits)
        torch.testing.assert_close(outputs.teacher_token_logits.flip(1), expected.teacher_token_logits)
    # Copies, not the same memory.
    if "new" in names:
        model.teacher_heads[names.index("new")].weight.zero_()
        assert model.class_head.weight.abs().sum() > 0


@pytest.mark.parametrize("operators", [None, ["involution", "involution"]])
def test_a_teachers_token_keeps_its_stem(operators, tmp_path):
    shape = {"patch_embedding": "bias_stems", "stem_channels": 16, **SHAPE}
    IBViTForImageClassification(IBViTConfig(teacher_spatial_operators=operators, **shape)).save_pretrained(tmp_path)
    conv = "convolution" if operators is None else "involution"
    for names, expected in {
        ("inv",): ["involution"],
        ("inv", "conv"): ["involution", conv],
        ("a", "b"): ["convolution", "involution"],
        ("conv", "inv", "a"): [conv, "involution", "convolution"],
        (): [],
    }.items():
        assert load_student(tmp_path, names).config.teacher_token_stems == expected
    given = load_student(tmp_path, ("inv",), teacher_spatial_operators=["convolution"])
    assert given.config.teacher_token_stems == ["convolution"]
    assert load_student(tmp_path).config.teacher_spatial_operators == operators
    with pytest.raises(StrictDataclassError, match=r"teacher_spatial_operators.*\['convolution', 'involution'\]"):
        load_student(tmp_path, ("inv",), teacher_spatial_operators=["convolution", "involution"])


def test_stems_that_a_student_does_not_have_are_no_obstacle(tmp_path):
    config = IBViTConfig(teacher_spatial_operators=["involution", "convolution"], **SHAPE)
    IBViTForImageClassification(config).save_pretrained(tmp_path)
    assert load_student(tmp_path, ("a",)).config.teacher_spatial_operators is None


@pytest.mark.parametrize("kind", ["vit", "deit", "deit with teacher"])
@torch.no_grad()
def test_a_vit_or_deit_for_teachers(kind, tmp_path, caplog):
    build(kind).save_pretrained(tmp_path)
    expected = IBViTForImageClassification.from_vit(tmp_path, teacher_names=("a", "b"), image_size=12)
    model = load_student(tmp_path, ("a", "b"), image_size=12)
    assert model.config.to_dict() == expected.config.to_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # No names are no teachers, even if there was a distillation token.
    caplog.clear()
    alone = load_student(tmp_path, ())
    assert alone.config.teacher_names == [] and alone(torch.randn(2, 3, 8, 8)).teacher_token_logits is None
    assert "distillation token" not in caplog.text


def test_names_that_are_no_list_of_different_names(tmp_path):
    for kind in ("bias_stems", "vit"):
        build(kind).save_pretrained(tmp_path / kind)
        with pytest.raises(StrictDataclassError, match=r"teacher_names=\['a', 'a'\]"):
            load_student(tmp_path / kind, ("a", "a"))
        with pytest.raises(StrictDataclassError, match="teacher_names.*'conv'"):
            load_student(tmp_path / kind, "conv")


def test_a_model_saved_in_half_precision_is_trained_in_float32(tmp_path):
    build("linear").to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_student(tmp_path, ("inv", "new"), image_size=12)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_checkpoints_and_sizes_that_do_not_fit(tmp_path):
    build("linear").save_pretrained(tmp_path / "student")
    with pytest.raises(StrictDataclassError, match="patch_size=2.*image_size=9"):
        load_student(tmp_path / "student", image_size=9)
    BertModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "text"
    )
    with pytest.raises(ValueError, match=f"The student cannot be loaded from {tmp_path}.*BertConfig"):
        load_student(tmp_path / "text")


# Other families


FAMILIES = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4},
    "levit": {},
    "ibresnet": {"hidden_sizes": [8] * 4, "embedding_size": 8, "depths": [1] * 4},
    "timm/mobilenetv3_small_050": {},
}


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_any_classifier_keeps_its_backbone_and_gets_a_head_for_other_classes(architecture, tmp_path, caplog):
    model = build_student(architecture, image_size=32, **FAMILIES[architecture], **ANIMALS)
    model.save_pretrained(tmp_path)
    same = load_student(tmp_path, ("conv", "inv"), image_size=64, **ANIMALS)
    assert type(same) is type(model) and not same.training and "new head" not in caplog.text
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())
    more = {"id2label": {i: f"class {i}" for i in range(7)}, "label2id": {f"class {i}": i for i in range(7)}}
    # The same number of classes, and another one.
    for classes in (PLANTS, more):
        other = load_student(tmp_path, **classes)
        assert "new head" in caplog.text
        assert [other.config.id2label[i] for i in range(len(classes["id2label"]))] == [*classes["label2id"]]
        names = {name for name, tensor in other.state_dict().items() if not same_tensor(tensor, model, name)}
        weights = [name for name in names if name.endswith("weight")]
        assert weights and {name.rpartition(".")[0] for name in names} == {w.rpartition(".")[0] for w in weights}
        assert all("classifier" in name or "head" in name for name in names)
        with torch.no_grad():
            assert other(pixel_values=torch.rand(1, 3, 32, 32)).logits.shape == (1, len(classes["id2label"]))


def same_tensor(tensor, model, name):
    expected = model.state_dict()[name]
    return tensor.shape == expected.shape and torch.equal(tensor, expected)


def test_a_backbone_without_a_head_gets_one(tmp_path):
    model = build_student("dinov2", image_size=32, **FAMILIES["dinov2"])
    model.base_model.save_pretrained(tmp_path)
    student = load_student(tmp_path, **ANIMALS)
    assert student.config.num_labels == 3
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, student.base_model.state_dict()[name])
    # Other weights must not be missing.
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"The student in {tmp_path} has no weights for dinov2.layernorm.weight"):
        load_student(tmp_path, **ANIMALS)


def test_statistics_of_batch_norms_must_be_there(tmp_path):
    build_student("resnet", **FAMILIES["resnet"], **ANIMALS).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "running_mean" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for .*running_mean"):
        load_student(tmp_path, **ANIMALS)


def test_a_head_for_several_labels_becomes_one_for_one(tmp_path):
    build_student("resnet", **FAMILIES["resnet"], problem_type="multi_label_classification", **PLANTS).save_pretrained(
        tmp_path
    )
    assert load_student(tmp_path, **ANIMALS).config.problem_type is None


def test_a_field_of_the_configuration_may_change(tmp_path):
    build_student("dinov2", image_size=32, **FAMILIES["dinov2"], **ANIMALS).save_pretrained(tmp_path)
    student = load_student(tmp_path, drop_path_rate=0.5, **ANIMALS)
    assert student.config.drop_path_rate == 0.5
    with pytest.raises(TypeError, match="drop_rate=0.5 is no field of Dinov2Config"):
        load_student(tmp_path, drop_rate=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "dinov2.encoder.layer.1.*num_hidden_layers"),
        ({"hidden_size": 32}, "hidden_size.*32"),
    ],
)
def test_a_field_that_the_weights_do_not_fit(fields, message, tmp_path):
    build_student("dinov2", image_size=32, **FAMILIES["dinov2"], **ANIMALS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)The student in {tmp_path}.*{message}"):
        load_student(tmp_path, **fields, **ANIMALS)


TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}


def test_a_size_that_the_model_does_not_take_is_found_before_training():
    model = build_student("siglip", image_size=48, vision_config=TOWER, **ANIMALS)
    assert model.config.vision_config.image_size == 48
    model.train()
    check_fit(model, ViTImageProcessor(size={"height": 48, "width": 48}))
    assert model.training
    with pytest.raises(ValueError, match=r"SiglipForImageClassification .*\(3, 64, 64\).*image_size"):
        check_fit(model, ViTImageProcessor(size={"height": 64, "width": 64}))


@pytest.mark.parametrize(
    ("architecture", "fields", "error", "message"),
    [
        ("bert", {}, ValueError, 'architecture="bert" has no image classifier'),
        ("mobilenet_v9", {}, ValueError, 'architecture="mobilenet_v9" cannot be built'),
        ("microsoft/resnet-18", {}, ValueError, 'architecture="microsoft/resnet-18" is neither'),
        ("resnet", {"depth": [1]}, TypeError, r"depth=\[1\] is no field of ResNetConfig"),
        ("resnet", {"layer_type": "nope"}, StrictDataclassError, "layer_type=nope"),
    ],
)
def test_architectures_that_cannot_be_built(architecture, fields, error, message):
    with pytest.raises(error, match=message):
        build_student(architecture, **fields)


def test_the_image_size_is_that_of_architectures_that_have_one():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    assert build_student("vit", image_size=48, **shape).config.image_size == 48
    assert not hasattr(build_student("resnet", image_size=48, **FAMILIES["resnet"]).config, "image_size")


@pytest.mark.parametrize("processor_class", [ViTImageProcessor, DeiTImageProcessor])
def test_the_image_processor_follows_the_image_size(processor_class, tmp_path):
    processor_class(image_mean=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    images = [torch.randint(256, (3, side, 40), dtype=torch.uint8) for side in (20, 60)]
    for size, expected in ((None, 224), (12, 12)):
        processor = load_image_processor(tmp_path, size)
        assert list(processor.image_mean) == [0.2, 0.3, 0.4]
        assert processor(images, return_tensors="pt")["pixel_values"].shape == (2, 3, expected, expected)
    # The whole image, not the middle of a larger one: the corners reach the edges.
    corners = torch.zeros(3, 24, 24, dtype=torch.uint8)
    corners[:, :2, :2] = corners[:, -2:, -2:] = 255
    values = load_image_processor(tmp_path, 12)(corners, return_tensors="pt")["pixel_values"][0]
    assert (values[:, 0, 0] > values[:, 6, 6]).all() and (values[:, -1, -1] > values[:, 6, 6]).all()
    with pytest.raises(OSError):
        load_image_processor(tmp_path / "none")


def test_the_image_processor_of_a_convnext_follows_the_image_size(tmp_path):
    ConvNextImageProcessor(image_mean=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    processor = load_image_processor(tmp_path, 12)
    assert list(processor.image_mean) == [0.2, 0.3, 0.4]
    image = torch.randint(256, (3, 20, 40), dtype=torch.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 12, 12)


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 96, 224])
def test_patches_are_many_enough_and_few_enough(size):
    patch = default_patch_size(size)
    assert size % patch == 0 and 16 <= (size // patch) ** 2 <= 256


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [(9, 3), (30, 5), (50, 5), (225, 15), (8, 2), (28, 4), (224, 16)]
)
def test_patches_divide_every_image(image_size, patch_size):
    assert default_patch_size(image_size) == patch_size
    assert all(size % default_patch_size(size) == 0 for size in range(1, 300))


def test_what_load_student_cannot_use_is_named(tmp_path):
    build("linear").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="imagesize=16"):
        load_student(tmp_path, imagesize=16)
    with pytest.raises(TypeError, match="name_or_path is a dict"):
        load_student({})
    with pytest.raises(StrictDataclassError, match="num_hidden_layers=0"):
        load_student(tmp_path, num_hidden_layers=0)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"cannot be loaded from {tmp_path}"):
        load_student(tmp_path)


@pytest.mark.parametrize("kind", [IBViTConfig, IBResNetConfig])
def test_class_names_may_be_a_list(kind):
    assert kind(id2label=["cat", "dog"]).id2label == {0: "cat", 1: "dog"}
