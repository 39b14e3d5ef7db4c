"""Students that start as a trained ViT or DeiT, and the configurations of DeiT's sizes."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTModel,
)

from hf_ibdistill import IBViTConfig, IBViTForImageClassification


CLASSIFIERS = [ViTForImageClassification, DeiTForImageClassification, DeiTForImageClassificationWithTeacher]
NUM_LABELS = 5
# The original's fusion, for a student with one teacher name.
FUSION = {DeiTForImageClassification: "class_token", DeiTForImageClassificationWithTeacher: "mean_logits"}


def save_vit(model_class, folder, **overrides):
    """A saved model of 16 patches of 4×4 pixels and 2 layers, in which no parameter is zero or small."""
    arguments = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_attention_heads": 3}
    arguments |= {"num_hidden_layers": 2, "intermediate_size": 48, "num_labels": NUM_LABELS, "encoder_stride": 4}
    arguments |= {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}
    model = model_class(model_class.config_class(**{**arguments, **overrides})).eval()
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean, std=0.3)
    model.save_pretrained(folder)
    return model


def from_vit(*args, **kwargs):
    return IBViTForImageClassification.from_vit(*args, **kwargs)


# Parity


@pytest.mark.parametrize("size", [16, 24, 8])
@pytest.mark.parametrize("model_class", CLASSIFIERS)
@torch.no_grad()
def test_without_teacher_names_it_predicts_what_the_original_predicts(model_class, size, tmp_path):
    original, pixel_values = save_vit(model_class, tmp_path), torch.randn(3, 3, size, size)
    expected = original(pixel_values, interpolate_pos_encoding=size != 16).logits
    # Other sizes both when the student is made and in its forward pass.
    resized = from_vit(tmp_path, teacher_names=(), image_size=size)
    assert not resized.training and resized.config.image_size == size
    torch.testing.assert_close(resized(pixel_values).logits, expected)
    student = from_vit(tmp_path, teacher_names=())
    torch.testing.assert_close(student(pixel_values, interpolate_pos_encoding=True).logits, expected)


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("model_class", list(FUSION))
@torch.no_grad()
def test_one_teacher_name_and_its_fusion_predict_what_a_distilled_deit_predicts(model_class, size, tmp_path):
    original, pixel_values = save_vit(model_class, tmp_path), torch.randn(3, 3, size, size)
    student = from_vit(tmp_path, teacher_names=("convnet",), image_size=size, fusion=FUSION[model_class])
    assert student.config.teacher_names == ["convnet"]
    outputs, expected = student(pixel_values), original(pixel_values, interpolate_pos_encoding=True)
    torch.testing.assert_close(outputs.logits, expected.logits)
    if model_class is DeiTForImageClassificationWithTeacher:
        torch.testing.assert_close(outputs.class_logits, expected.cls_logits)
        torch.testing.assert_close(outputs.teacher_token_logits[:, 0], expected.distillation_logits)


@pytest.mark.parametrize("model_class", list(FUSION))
def test_a_distillation_token_stays_without_teacher_names(model_class, tmp_path, caplog):
    save_vit(model_class, tmp_path)
    student = from_vit(tmp_path, teacher_names=())
    assert student.config.teacher_names == ["distillation"] and student.config.fusion == FUSION[model_class]
    assert '"distillation"' in caplog.text and f'fusion="{FUSION[model_class]}"' in caplog.text
    assert from_vit(tmp_path, teacher_names=(), fusion="mean_probabilities").config.fusion == "mean_probabilities"
    # A mean with the head of a token that only a teacher trains would spoil plain fine-tuning.
    assert from_vit(tmp_path, teacher_names=(), num_labels=3).config.fusion == "class_token"


@torch.no_grad()
def test_the_configuration_follows_the_checkpoint(tmp_path):
    overrides = {"num_channels": 1, "qkv_bias": False, "hidden_dropout_prob": 0.25, "problem_type": "regression"}
    overrides |= {"image_size": [16, 16], "patch_size": (4, 4)}
    labels = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    original = save_vit(ViTForImageClassification, tmp_path, **{**overrides, **labels, "num_labels": 3})
    student = from_vit(tmp_path, teacher_names=())
    assert (student.config.image_size, student.config.patch_size) == (16, 4)
    for name in {*overrides, *labels, "hidden_act", "layer_norm_eps"} - {"image_size", "patch_size"}:
        assert getattr(student.config, name) == getattr(original.config, name), name
    assert student.config.name_or_path == str(tmp_path) and student.config.model_type == "ibvit"
    pixel_values = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(student(pixel_values).logits, original(pixel_values).logits)


# Weights


@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_every_tensor_of_the_original_lands_in_its_place(model_class, tmp_path):
    # Beyond what outputs show: a bias on the keys changes none.
    original = save_vit(model_class, tmp_path)
    is_deit = model_class is not ViTForImageClassification
    student = from_vit(tmp_path, teacher_names=("a",) if is_deit else ())
    left, base = student.state_dict(), original.base_model_prefix
    for name, tensor in original.state_dict().items():
        name = name.replace(f"{base}.", "ibvit.").replace("patch_embeddings.projection", "stems.convolution.0")
        name = name.replace("cls_token", "class_token").replace("distillation_token", "teacher_tokens")
        name = name.replace("distillation_classifier", "teacher_heads.0").replace("cls_classifier", "class_head")
        assert torch.equal(left.pop(name.replace("classifier", "class_head")), tensor), name
    if model_class is DeiTForImageClassification:
        assert torch.equal(left.pop("teacher_heads.0.weight"), student.class_head.weight)
        assert torch.equal(left.pop("teacher_heads.0.bias"), student.class_head.bias)
    assert not left


@pytest.mark.parametrize("model_class", CLASSIFIERS)
@torch.no_grad()
def test_further_teacher_tokens_start_as_copies_of_the_last(model_class, tmp_path):
    save_vit(model_class, tmp_path)
    student = from_vit(tmp_path, teacher_names=("a", "b", "c"))
    embeddings = student.ibvit.embeddings
    tokens = torch.cat((embeddings.class_token, embeddings.teacher_tokens), dim=1)[0]
    own = 1 if model_class is ViTForImageClassification else 2
    heads = [student.class_head, *student.teacher_heads]
    for i in range(own, 4):
        assert torch.equal(tokens[i], tokens[own - 1])
        assert torch.equal(embeddings.position_embeddings[0, i], embeddings.position_embeddings[0, own - 1])
        assert torch.equal(heads[i].weight, heads[own - 1].weight)
    if own == 2:
        assert not torch.equal(tokens[0], tokens[1])
    # Copies, not the same memory.
    student.teacher_heads[2].weight.zero_()
    assert all(head.weight.abs().sum() > 0 for head in heads[:3])


def test_copies_part_when_their_targets_differ(tmp_path):
    save_vit(ViTForImageClassification, tmp_path)
    student = from_vit(tmp_path).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    heads = student(torch.randn(4, 3, 16, 16)).teacher_token_logits
    assert torch.equal(heads[:, 0], heads[:, 1])
    sum(nn.functional.cross_entropy(heads[:, i], torch.full((4,), i)) for i in range(2)).backward()
    optimizer.step()
    tokens = student.ibvit.embeddings.teacher_tokens[0]
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(student.teacher_heads[0].weight, student.teacher_heads[1].weight)


@pytest.mark.parametrize("model_class", [ViTModel, DeiTModel, ViTForMaskedImageModeling])
def test_a_checkpoint_without_a_classifier_gets_new_heads(model_class, tmp_path, caplog):
    original = save_vit(model_class, tmp_path)
    student = from_vit(tmp_path, num_labels=3)
    assert all(f"{name}.weight" in caplog.text for name in ("class_head", "teacher_heads.{0, 1}"))
    heads = [student.class_head, *student.teacher_heads]
    assert [head.weight.shape for head in heads] == [(3, 24)] * 3
    for head in heads:
        assert head.weight.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.3) and (head.bias == 0).all()
    assert not torch.equal(heads[1].weight, heads[2].weight)
    layers = original.base_model.layers.state_dict()
    for name, tensor in student.ibvit.layers.state_dict().items():
        assert torch.equal(tensor, layers[name])


@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_other_labels_get_new_heads(model_class, tmp_path):
    save_vit(model_class, tmp_path)
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    for arguments in (labels, {"num_labels": 2}):
        student = from_vit(tmp_path, teacher_names=("a", "b"), **arguments)
        assert student.config.num_labels == 2
        outputs = student(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1]))
        assert outputs.logits.shape == (2, 2) and outputs.teacher_token_logits.shape == (2, 2, 2)
        assert outputs.loss.isfinite()
        assert (student.class_head.bias == 0).all()
    assert from_vit(tmp_path, **labels).config.id2label == labels["id2label"]


@pytest.mark.parametrize("teacher_names", [(), ("conv", "inv")])
@pytest.mark.parametrize("model_class", CLASSIFIERS)
@torch.no_grad()
def test_saving_and_loading_is_bit_exact(model_class, teacher_names, tmp_path):
    save_vit(model_class, tmp_path / "original")
    student = from_vit(tmp_path / "original", teacher_names=teacher_names, image_size=24)
    student.save_pretrained(tmp_path / "student")
    loaded, pixel_values = IBViTForImageClassification.from_pretrained(tmp_path / "student"), torch.randn(2, 3, 24, 24)
    assert loaded.config.teacher_names == student.config.teacher_names
    assert torch.equal(loaded(pixel_values).logits, student(pixel_values).logits)


def test_arguments_of_from_pretrained_are_honored(tmp_path):
    save_vit(ViTForImageClassification, tmp_path / "in" / "folder")
    arguments = {"subfolder": "folder", "dtype": torch.bfloat16, "attn_implementation": "eager"}
    arguments |= {"hidden_dropout_prob": 0.5, "fusion": "mean_logits"}
    student = from_vit(tmp_path / "in", ["a"], **arguments)
    assert student.dtype == torch.bfloat16 and student.config._attn_implementation == "eager"
    assert student.config.hidden_dropout_prob == 0.5 and student.config.fusion == "mean_logits"
    with pytest.raises(TypeError, match="num_label"):
        from_vit(tmp_path / "in", subfolder="folder", num_label=3)


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patch_size": 8}, ValueError, "patch_size=8 .*patch_size=4"),
        ({"num_channels": 1}, ValueError, "num_channels=1 .*num_channels=3"),
        ({"num_attention_heads": 4}, ValueError, "num_attention_heads=4 .*num_attention_heads=3"),
        (
            {"patch_embedding": "convolution"},
            ValueError,
            "patch_embedding='convolution' .*patch_embedding='linear'",
        ),
        ({"image_size": 18}, StrictDataclassError, "patch_size=4 .*image_size=18"),
        ({"fusion": "vote"}, StrictDataclassError, 'fusion="vote"'),
        ({"teacher_names": ("a", "a")}, StrictDataclassError, r"teacher_names=\['a', 'a'\]"),
        ({"teacher_names": "conv"}, StrictDataclassError, "teacher_names.*'conv'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, error, message, tmp_path):
    save_vit(ViTForImageClassification, tmp_path)
    (tmp_path / "model.safetensors").unlink()  # they are found before the weights are looked at
    with pytest.raises(error, match=message):
        from_vit(tmp_path, **arguments)


def test_other_model_types_are_refused(tmp_path):
    ViTMAEConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='is of type "vit_mae".*"vit" or "deit"'):
        from_vit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ValueError, match='is of type "unheard_of"'):
        from_vit(tmp_path)


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
def test_rectangles_are_refused(name, tmp_path):
    ViTConfig(**{name: (16, 8)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}=.16, 8."):
        from_vit(tmp_path)


def test_tensors_too_many_or_too_few_are_named(tmp_path):
    save_vit(ViTForImageClassification, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["vit.adapter.weight"] = weights.pop("vit.layernorm.weight")
    save_file(weights, file, {"format": "pt"})
    message = r"no ViTForImageClassification: .*\['vit.adapter.weight'\] .*\['vit.layernorm.weight'\] are missing"
    with pytest.raises(ValueError, match=message):
        from_vit(tmp_path)


def test_a_distilled_deit_that_is_declared_another_is_refused(tmp_path):
    # Otherwise its trained heads would be lost.
    save_vit(DeiTForImageClassificationWithTeacher, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(ValueError, match=r"\['cls_classifier.bias', "):
        from_vit(tmp_path)


def test_pickles_are_not_read(tmp_path):
    model = save_vit(ViTForImageClassification, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        from_vit(tmp_path)


# Presets


@pytest.mark.parametrize(
    ("preset", "parameters"), [("deit-tiny", 5_717_416), ("deit-small", 22_050_664), ("deit-base", 86_567_656)]
)
def test_presets_have_deits_number_of_parameters(preset, parameters):
    with torch.device("meta"):  # counting needs no numbers
        model = IBViTForImageClassification(IBViTConfig.from_preset(preset, teacher_names=(), num_labels=1000))
        distilled = IBViTForImageClassification(IBViTConfig.from_preset(preset, num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    width = model.config.hidden_size
    # A token, its position and a head for each of two teachers.
    assert sum(p.numel() for p in distilled.parameters()) - parameters == 2 * (2 * width + 1000 * width + 1000)


def test_presets_are_for_224_pixels_and_can_be_overridden():
    config = IBViTConfig.from_preset("deit-tiny", num_labels=10, image_size=96)
    assert (config.image_size, config.num_labels, config.layer_norm_eps) == (96, 10, 1e-6)
    config = IBViTConfig.from_preset("deit-small")
    assert (config.image_size, config.patch_size, config.num_hidden_layers) == (224, 16, 12)
    assert (config.num_attention_heads, config.intermediate_size) == (6, 1536)
    with pytest.raises(ValueError, match='preset="deit-huge".* deit-tiny, deit-small, deit-base'):
        IBViTConfig.from_preset("deit-huge")
