"""Fine-tuning without teachers: freezing, layer-wise learning rates, and the loss of all heads."""

import re

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ibdistill import (
    IBViTConfig,
    IBViTForImageClassification,
    freeze_layers,
    layer_decay_groups,
)
from hf_ibdistill.students import build_student, head_parameters
from hf_ibdistill.training.finetuning import freeze_backbone


NUM_LAYERS = 3
SHAPE = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SHAPE["num_hidden_layers"] = NUM_LAYERS
ANIMALS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}


def build(kind):
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(**SHAPE, **ANIMALS))
    if kind == "deit":
        return DeiTForImageClassification(DeiTConfig(**SHAPE, **ANIMALS))
    names = () if kind == "no teachers" else ("conv", "inv")
    stem = "convolution" if kind == "no teachers" else kind
    config = IBViTConfig(teacher_names=names, patch_embedding=stem, stem_channels=16, **SHAPE, **ANIMALS)
    return IBViTForImageClassification(config)


KINDS = ["linear", "convolution", "bias_stems", "no teachers", "vit", "deit"]


def depth_by_name(name):
    """The depth of a parameter, from its name alone."""
    if ".embeddings." in name:
        return 0
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return NUM_LAYERS + 1 if layer is None else int(layer[1]) + 1


def settings_of(groups):
    """Parameter → (learning rate, weight decay); fails if a parameter is in two groups."""
    settings = {}
    for group in groups:
        for parameter in group["params"]:
            assert parameter not in settings
            settings[parameter] = group["lr"], group["weight_decay"]
    return settings


def examples(num_rows=8, size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_rows, 3, size, size, generator=generator)
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def train(model, folder, **settings):
    optimizers = settings.pop("optimizers", (None, None))
    defaults = {"max_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    defaults |= {"per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(str(folder), use_cpu=True, **{**defaults, **settings})
    trainer = Trainer(model, args, train_dataset=examples(), optimizers=optimizers)
    trainer.train()
    return trainer


def copy_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Layer-wise learning rates


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rates_fall_from_the_heads_to_the_embeddings(kind):
    model = build(kind)
    settings = settings_of(layer_decay_groups(model, 0.8, 0.5, weight_decay=0.1))
    assert settings.keys() == set(model.parameters())
    expected = [0.05, 0.1, 0.2, 0.4, 0.8]
    for name, parameter in model.named_parameters():
        rate, decay = settings[parameter]
        assert rate == pytest.approx(expected[depth_by_name(name)]), name
        if name.endswith("bias") or "layernorm" in name:
            assert decay == 0, name
        elif parameter.dim() > 1:
            assert decay == 0.1, name


@pytest.mark.parametrize("kind", KINDS)
def test_without_decay_they_are_the_trainers_own(kind, tmp_path):
    model = build(kind)
    args = TrainingArguments(str(tmp_path), learning_rate=3e-4, weight_decay=0.1, use_cpu=True, report_to="none")
    expected = settings_of(Trainer(model, args).create_optimizer().param_groups)
    assert settings_of(layer_decay_groups(model, 3e-4, 1.0, weight_decay=0.1)) == expected


def test_the_model_without_heads_has_them():
    model = build("bias_stems").ibvit
    settings = settings_of(layer_decay_groups(model, 1.0, 0.5))
    assert settings[model.embeddings.class_token] == (0.0625, 0.0)
    assert settings[model.layernorm.weight] == (1.0, 0.0)


def test_frozen_parameters_are_in_no_group():
    model = build("bias_stems")
    freeze_layers(model, 2)
    model.class_head.bias.requires_grad_(False)
    groups = layer_decay_groups(model, 1.0, 0.5)
    assert settings_of(groups).keys() == {p for p in model.parameters() if p.requires_grad}
    assert all(group["params"] for group in groups)


def test_the_trainer_takes_steps_of_these_sizes_and_logs_the_heads_rate(tmp_path):
    model = build("bias_stems")
    before = copy_of(model)
    optimizer = torch.optim.AdamW(layer_decay_groups(model, 1e-2, 0.5), eps=1e-12)
    options = {"optimizers": (optimizer, None), "logging_steps": 1}
    trainer = train(model, tmp_path, **options)
    assert trainer.state.log_history[0]["learning_rate"] == 1e-2
    for name, parameter in model.named_parameters():
        if "k_proj.bias" in name:
            continue  # It shifts every score by the same number, so its gradient is rounding error.
        # Adam's first step is the learning rate, whatever the gradient.
        step = (parameter - before[name]).abs().max().item()
        assert step == pytest.approx(1e-2 * 0.5 ** (NUM_LAYERS + 1 - depth_by_name(name)), rel=0.02), name


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.5, float("nan")])
def test_a_decay_out_of_range(layer_decay):
    with pytest.raises(ValueError, match=f"layer_decay={layer_decay}"):
        layer_decay_groups(build("linear"), 1e-3, layer_decay)


def test_models_of_another_kind():
    model = build_student("timm/resnet18", num_labels=3)
    message = "ResNet has no list of layers, stages or blocks"
    with pytest.raises(ValueError, match=message):
        layer_decay_groups(model, 1e-3, 0.5)
    with pytest.raises(ValueError, match=message):
        freeze_layers(model, 1)


OTHERS = {
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, "embedder", "encoder.stages"),
    "mobilenet_v2": ({"depth_multiplier": 0.25}, "conv_stem", "layer"),
    "swin": ({"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2}, "embeddings", "encoder.layers"),
    "dinov2": ({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}, "embeddings", "encoder.layer"),
    "timm/vit_tiny_patch16_224": ({"depth": 2, "img_size": 32}, "", "timm_model.blocks"),
}


@pytest.mark.parametrize("architecture", sorted(OTHERS))
def test_layers_of_other_families(architecture):
    fields, stem, path = OTHERS[architecture]
    model = build_student(architecture, num_labels=3, **fields)
    backbone = model.base_model if not path.startswith("timm") else model
    layers = backbone.get_submodule(path)
    of_layers = [{id(p) for p in layer.parameters()} for layer in layers]
    groups = layer_decay_groups(model, 1.0, 0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for depth, ids in enumerate(of_layers, 1):
        assert {rates[i] for i in ids} == {0.5 ** (len(layers) + 1 - depth)}
    if stem:
        # Whatever comes before the layers changes least.
        first = {rates[id(p)] for p in backbone.get_submodule(stem).parameters()}
        assert first == {0.5 ** (len(layers) + 1)}
    assert all(rates[id(p)] == 1.0 for name, p in model.named_parameters() if "classifier" in name or ".head" in name)
    freeze_layers(model, 1)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert of_layers[0] <= frozen and not (of_layers[1] & frozen)


@pytest.mark.parametrize("architecture", [*sorted(OTHERS), "timm/resnet18", "vit"])
def test_a_linear_probe_leaves_the_backbone_as_it_is(architecture):
    fields = OTHERS.get(architecture, ({},))[0]
    if architecture == "vit":
        fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = build_student(architecture, image_size=32, num_labels=3, **fields)
    images = torch.rand(4, 3, 32, 32)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze_backbone(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()
        logits = model(pixel_values=images).logits
        assert model.training
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])}
    heads = {name for name, p in model.named_parameters() if p.shape[0] == 3 and p.requires_grad}
    # An untrained network may have features of 0, which give the weights of the head no gradient.
    assert changed and changed <= heads and len(heads) == 2
    assert not [name for name, p in model.named_parameters() if p.requires_grad and name not in heads]


@pytest.mark.parametrize("architecture", ["timm/pit_ti_224", "swiftformer"])
def test_layers_in_lists_of_lists_are_not_taken_for_all_layers(architecture):
    model = build_student(architecture, num_labels=3)
    with pytest.raises(ValueError, match="has no list of layers"):
        freeze_layers(model, 1)


def test_frozen_layers_keep_their_batch_norms_and_the_others_learn():
    model = build_student("resnet", num_labels=3, **OTHERS["resnet"][0])
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze_layers(model, 1)
    model.train()(pixel_values=torch.rand(4, 3, 32, 32))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])}
    assert changed and all(name.startswith("resnet.encoder.stages.1.") for name in changed)


def test_a_linear_probe_finds_the_head_among_adapters_and_when_compiled():
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_student("dinov2", image_size=32, num_labels=3, **fields)
    mlp = model.get_submodule("dinov2.encoder.layer.0.mlp")
    mlp.fc1.base_layer = torch.nn.Linear(16, 64)  # adapters rename weights like this
    heads = {"classifier.weight", "classifier.bias"}
    assert head_parameters(model) == head_parameters(torch.compile(model)) == heads


def test_a_model_without_a_head_is_named():
    with pytest.raises(ValueError, match="Dinov2Model has no head"):
        freeze_backbone(build_student("dinov2", image_size=32, hidden_size=16, num_attention_heads=2).base_model)


# Freezing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", range(NUM_LAYERS + 1))
def test_which_parameters_are_frozen(num_layers, kind):
    model = build(kind)
    freeze_layers(model, num_layers)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    names = [name for name, _ in model.named_parameters()]
    assert frozen == {name for name in names if num_layers and depth_by_name(name) <= num_layers}


@pytest.mark.parametrize("num_layers", [-1, NUM_LAYERS + 1])
def test_more_layers_than_there_are(num_layers):
    with pytest.raises(ValueError, match=f"num_layers={num_layers}.* 3 layers"):
        freeze_layers(build("linear"), num_layers)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_what_is_frozen_stays_and_all_else_moves(layer_decay, checkpointing, tmp_path):
    model = build("bias_stems")
    freeze_layers(model, 2)
    before, options = copy_of(model), {}
    if layer_decay is not None:
        groups = layer_decay_groups(model, 1e-3, layer_decay, weight_decay=0.1)
        options["optimizers"] = (torch.optim.AdamW(groups), None)
    train(
        model,
        tmp_path,
        max_steps=3,
        activation_checkpointing=checkpointing,
        **options,
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (depth_by_name(name) <= 2), name


# The loss that the student returns


def test_accumulated_batches_take_the_steps_of_whole_ones(tmp_path):
    weights = []
    for batch_size in (8, 2):
        torch.manual_seed(0)
        model = build("linear")
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
        options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0}
        train(model, tmp_path, max_steps=2, **settings, **options)
        weights.append(copy_of(model))
    for name, parameter in weights[0].items():
        torch.testing.assert_close(weights[1][name], parameter, msg=name)
