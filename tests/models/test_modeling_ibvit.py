"""The student and its configuration."""

import json
import unittest.mock

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.utils.generic import find_labels

from hf_ibdistill import IBViTConfig, IBViTForImageClassification, IBViTModel, load_student
from hf_ibdistill.models.modeling_ibvit import IBViTPatchProjection, fastest_attention_forward


PATCH_EMBEDDINGS = ["linear", "convolution", "bias_stems"]
NUM_LABELS = 5


def small_config(**overrides):
    """16 patches of 4×4 pixels, 2 layers."""
    arguments = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_attention_heads": 3, "stem_channels": 16}
    arguments |= {"num_hidden_layers": 2, "intermediate_size": 48, "num_labels": NUM_LABELS, **overrides}
    return IBViTConfig(**arguments)


def small_model(**overrides):
    model = IBViTForImageClassification(small_config(**overrides)).eval()
    # A fresh model has zeros for biases, ones for norms and small numbers for the rest: a swapped or forgotten
    # parameter would hardly show, nor would the image.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    return model


# Configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher_names": ("a", "b", "a")}, r"teacher_names=\['a', 'b', 'a'\]"),
        ({"teacher_names": "conv"}, r"teacher_names.*'conv'"),
        ({"fusion": "vote"}, r'fusion="vote".*"mean_probabilities", "mean_logits" or "class_token"'),
        ({"patch_embedding": "stem"}, r'patch_embedding="stem".*"linear", "convolution" or "bias_stems"'),
        ({"patch_embedding": "bias_stems", "num_stem_layers": 1}, "num_stem_layers=1"),
        ({"patch_embedding": "bias_stems", "stem_channels": 24}, "stem_channels=24"),
        (
            {"teacher_spatial_operators": ("convolution",)},
            r"teacher_spatial_operators=\['convolution'\].*teacher_names=\['conv', 'inv'\]",
        ),
        (
            {"teacher_spatial_operators": ("convolution", "attention")},
            r"teacher_spatial_operators=\['convolution', 'attention'\]",
        ),
        ({"num_attention_heads": 5}, "num_attention_heads=5 .*hidden_size=24"),
        ({"image_size": 18}, "patch_size=4 .*image_size=18"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1"),
    ],
)
def test_configuration_errors_name_field_and_value(overrides, message):
    with pytest.raises(StrictDataclassError, match=message):
        small_config(**overrides)


def test_stems_alternate_over_the_teachers_unless_given():
    config = small_config(teacher_names=("a", "b", "c"))
    assert config.teacher_token_stems == ["convolution", "involution", "convolution"]
    given = ["involution", "involution"]
    assert small_config(teacher_spatial_operators=given).teacher_token_stems == given
    assert small_config(teacher_names=()).teacher_token_stems == []


def test_fields_shared_with_vit_have_vits_names_and_defaults():
    config, vit = IBViTConfig(), ViTConfig()
    own = {"teacher_names", "fusion", "patch_embedding", "stem_channels", "num_stem_layers"}
    own |= {"teacher_spatial_operators", "model_type", "drop_path_rate"}
    own |= {"initializer_range"}  # tokens and positions only; see its documentation
    shared = config.to_dict().keys() - own
    assert {name: getattr(config, name) for name in shared} == {name: getattr(vit, name) for name in shared}


def test_configuration_survives_saving(tmp_path):
    config = small_config(
        teacher_names=("a", "b", "c"),
        fusion="mean_logits",
        patch_embedding="bias_stems",
        teacher_spatial_operators=("involution", "convolution", "involution"),
        num_channels=1,
        drop_path_rate=0.25,
    )
    config.save_pretrained(tmp_path)
    assert IBViTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


# Output


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
@pytest.mark.parametrize("teacher_names", [(), ("a",), ("a", "b", "c")])
def test_output_shapes(patch_embedding, teacher_names):
    model = small_model(teacher_names=teacher_names, patch_embedding=patch_embedding)
    pixel_values = torch.randn(2, 3, 16, 16)
    outputs = model(pixel_values)
    assert outputs.loss is None and outputs.hidden_states is None and outputs.attentions is None
    assert outputs.logits.shape == outputs.class_logits.shape == (2, NUM_LABELS)
    if teacher_names:
        assert outputs.teacher_token_logits.shape == (2, len(teacher_names), NUM_LABELS)
    else:
        assert outputs.teacher_token_logits is None
    assert model.ibvit(pixel_values).last_hidden_state.shape == (2, 1 + len(teacher_names) + 16, 24)


def test_each_head_reads_its_own_token():
    model = small_model(teacher_names=("a", "b"))
    pixel_values = torch.randn(2, 3, 16, 16)
    outputs, tokens = model(pixel_values), model.ibvit(pixel_values).last_hidden_state
    assert torch.equal(outputs.class_logits, model.class_head(tokens[:, 0]))
    assert torch.equal(outputs.teacher_token_logits[:, 0], model.teacher_heads[0](tokens[:, 1]))
    assert torch.equal(outputs.teacher_token_logits[:, 1], model.teacher_heads[1](tokens[:, 2]))


def test_hidden_states_and_attentions():
    model = small_model(attn_implementation="eager")
    outputs = model(torch.randn(2, 3, 16, 16), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 19, 24)] * 3
    assert [tuple(attention.shape) for attention in outputs.attentions] == [(2, 3, 19, 19)] * 2
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 19))
    tokens = model.ibvit.layernorm(outputs.hidden_states[-1])
    assert torch.equal(model.class_head(tokens[:, 0]), outputs.class_logits)


@pytest.mark.parametrize("by_config", [False, True])
def test_return_dict_false_gives_a_tuple(by_config):
    model, inputs = small_model(), {"pixel_values": torch.randn(2, 3, 16, 16), "output_hidden_states": True}
    for part, options in ((model, {"labels": torch.tensor([0, 3])}), (model.ibvit, {})):
        expected = part(**inputs, **options)
        model.config.return_dict = not by_config
        outputs = part(**inputs, **options, **({} if by_config else {"return_dict": False}))
        model.config.return_dict = True
        torch.testing.assert_close(outputs, expected.to_tuple(), rtol=0, atol=0)


NAMES = [(), ("a",), ("a", "b")]
FUSIONS = ["mean_probabilities", "mean_logits", "class_token"]


@pytest.mark.parametrize("num_items", [None, 12, torch.tensor(12)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("names", NAMES)
def test_loss_is_the_mean_cross_entropy_of_all_heads(names, label_smoothing, num_items):
    model = small_model(teacher_names=names)
    # One row has no label.
    pixel_values, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 4, -100, 2])
    options = {"label_smoothing": label_smoothing} if label_smoothing else {}
    outputs = model(pixel_values, labels=labels, num_items_in_batch=num_items, **options)
    heads = [outputs.class_logits, *(outputs.teacher_token_logits.unbind(1) if names else ())]
    losses = []
    for head in heads:
        log_probabilities = head.log_softmax(-1)[[0, 1, 3]]
        targets = nn.functional.one_hot(labels[[0, 1, 3]], NUM_LABELS) * (1 - label_smoothing)
        losses.append(-((targets + label_smoothing / NUM_LABELS) * log_probabilities).sum())
    # `Trainer` divides the sum over the batches of a step by the number of their rows.
    torch.testing.assert_close(outputs.loss, sum(losses) / len(heads) / (3 if num_items is None else num_items))


def test_loss_is_computed_in_float32():
    outputs = small_model().to(torch.bfloat16)(torch.randn(3, 3, 16, 16), labels=torch.tensor([0, 4, 2]))
    heads = [outputs.class_logits, *outputs.teacher_token_logits.unbind(1)]
    expected = sum(nn.functional.cross_entropy(head.float(), torch.tensor([0, 4, 2])) for head in heads) / 3
    assert outputs.loss.dtype == torch.float32
    torch.testing.assert_close(outputs.loss, expected)


def test_smoothing_of_labels_that_are_no_class_ids():
    with pytest.raises(ValueError, match="label_smoothing=0.1.*torch.float32"):
        small_model()(torch.randn(2, 3, 16, 16), labels=torch.rand(2, NUM_LABELS), label_smoothing=0.1)


def test_labels_are_the_only_labels_that_a_trainer_looks_for():
    # `Trainer` measures nothing if a row lacks one of them.
    assert find_labels(IBViTForImageClassification) == ["labels"]


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_loss_reaches_every_parameter(fusion, names, patch_embedding):
    # `DistributedDataParallel` waits for the gradient of every parameter.
    model = small_model(fusion=fusion, teacher_names=names, patch_embedding=patch_embedding).train()
    model(torch.randn(3, 3, 16, 16), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None and parameter.numel() for parameter in model.parameters())
    zero = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    # A bias on the keys adds the same number to all of a query's scores, so its gradient is zero but for rounding.
    assert [name for name in zero if not name.endswith("k_proj.bias")] == []


def warnings_of(model, **inputs):
    with unittest.mock.patch("hf_ibdistill.models.modeling_ibvit.logger.warning_once") as warning_once:
        model(torch.randn(2, 3, 16, 16), **inputs)
    return [call.args[0] for call in warning_once.call_args_list]


def test_heads_that_may_stay_untrained_are_not_silent():
    model = small_model(fusion="class_token").train()
    (warning,) = warnings_of(model)
    assert 'fusion="class_token"' in warning and "labels=" in warning and "label_smoothing=" in warning
    assert warnings_of(torch.compile(model, fullgraph=True, backend="eager")) == [warning]
    assert warnings_of(model, labels=torch.tensor([0, 1])) == []
    with torch.no_grad():
        assert warnings_of(model) == []
    assert warnings_of(model.eval()) == [] and warnings_of(small_model(teacher_names=()).train()) == []


def test_trainer_sees_the_fused_prediction_alone(tmp_path):
    # compute_metrics functions written for any image classifier take the arg max of the predictions.
    model = small_model()
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % NUM_LABELS} for i in range(6)]
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    predictions = Trainer(model, arguments).predict(rows).predictions
    expected = model(torch.stack([row["pixel_values"] for row in rows])).logits
    assert not isinstance(predictions, tuple), f"arrays of shape {[array.shape for array in predictions]}"
    torch.testing.assert_close(torch.as_tensor(predictions), expected)


# Fusion


def fused(fusion, num_teachers):
    model = small_model(teacher_names=[f"teacher{i}" for i in range(num_teachers)], fusion=fusion)
    outputs = model(torch.randn(4, 3, 16, 16))
    return outputs.logits, [outputs.class_logits, *outputs.teacher_token_logits.unbind(1)]


@pytest.mark.parametrize("num_teachers", [1, 2, 3])
def test_mean_probabilities(num_teachers):
    logits, heads = fused("mean_probabilities", num_teachers)
    expected = sum(head.softmax(-1) for head in heads) / (1 + num_teachers)
    torch.testing.assert_close(logits.softmax(-1), expected)
    # They are log-probabilities, not just proportional to them.
    torch.testing.assert_close(logits.exp(), expected)


@pytest.mark.parametrize("num_teachers", [1, 2, 3])
def test_mean_logits(num_teachers):
    logits, heads = fused("mean_logits", num_teachers)
    torch.testing.assert_close(logits, sum(heads) / (1 + num_teachers))


@pytest.mark.parametrize("num_teachers", [1, 2, 3])
def test_class_token(num_teachers):
    logits, heads = fused("class_token", num_teachers)
    assert torch.equal(logits, heads[0])


@pytest.mark.parametrize("fusion", ["mean_probabilities", "mean_logits", "class_token"])
def test_without_teachers_every_fusion_is_the_class_head(fusion):
    outputs = small_model(teacher_names=(), fusion=fusion)(torch.randn(2, 3, 16, 16))
    assert torch.equal(outputs.logits, outputs.class_logits)


def test_mean_probabilities_of_extreme_logits_are_finite():
    model = small_model(teacher_names=("a",))
    class_logits = torch.tensor([[200.0, 0.0, 0.0, 0.0, -200.0]], requires_grad=True)
    logits = model.fuse(class_logits, -class_logits[:, None])
    expected = torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.5]])
    torch.testing.assert_close(logits.softmax(-1), expected)
    logits.sum().backward()
    assert logits.isfinite().all() and class_logits.grad.isfinite().all()


# The transformer


def as_vit(model):
    """transformers' own ViT with the weights of a student without teachers."""
    config = model.config
    shared = {name: value for name, value in config.to_dict().items() if hasattr(ViTConfig(), name)}
    shared.pop("model_type")
    vit = ViTForImageClassification(ViTConfig(**{**shared, "num_labels": config.num_labels})).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("ibvit.", "vit.").replace("class_head", "classifier").replace("class_token", "cls_token")
        weights[name.replace("stems.convolution.0", "patch_embeddings.projection")] = tensor
    vit.load_state_dict(weights)
    return vit


@pytest.mark.parametrize(("size", "interpolate"), [((16, 16), False), ((16, 16), True), ((24, 12), True)])
def test_without_teachers_it_is_transformers_vit(size, interpolate):
    model = small_model(teacher_names=())
    vit, pixel_values, labels = as_vit(model), torch.randn(3, 3, *size), torch.tensor([0, 1, 2])
    arguments = {"labels": labels, "interpolate_pos_encoding": interpolate, "output_hidden_states": True}
    outputs, expected = model(pixel_values, **arguments), vit(pixel_values, **arguments)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states)


def test_sdpa_and_eager_attention_are_equal():
    model, pixel_values = small_model(), torch.randn(2, 3, 16, 16)
    results = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.ibvit.layers[0].attention.config._attn_implementation == implementation
        results.append(model(pixel_values))
    torch.testing.assert_close(results[0].logits, results[1].logits)
    torch.testing.assert_close(results[0].teacher_token_logits, results[1].teacher_token_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_attention_is_one_of_the_two(dtype):
    # Below float32 on a CPU the plain one, because PyTorch's fused one is slow there; both round alike in float32 only.
    model, pixel_values = small_model(), torch.randn(2, 3, 16, 16)
    results = {}
    for implementation in (None, "eager", "sdpa"):
        if implementation is not None:
            model.set_attn_implementation(implementation)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            results[implementation] = model(pixel_values).logits
    expected = results["sdpa" if dtype == torch.float32 else "eager"]
    assert torch.equal(results[None], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_the_default_attention_of_many_tokens_is_exact_to_its_rounding(masked):
    # 67 tokens: in bf16 on a CPU, the attention that keeps no float32 copy.
    module, shape = nn.Module().train(), (2, 3, 67, 8)
    mask = torch.zeros(1, 1, 67, 67).masked_fill(torch.rand(67) < 0.3, float("-inf")) if masked else None
    exact = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    expected = nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3).transpose(1, 2)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    output, _ = fastest_attention_forward(module, *rounded, mask if mask is None else mask.bfloat16(), scaling=0.3)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.02, rtol=0.02)
    direction = torch.randn(expected.shape)
    gradients = torch.autograd.grad(output, rounded, direction.bfloat16())
    for gradient, correct in zip(gradients, torch.autograd.grad(expected, exact, direction)):
        assert (gradient.float() - correct).norm() < 0.02 * correct.norm()


def test_attention_of_many_tokens_is_dropped_out_in_training_alone():
    query, module = torch.randn(2, 3, 67, 8, dtype=torch.bfloat16), nn.Module()
    outputs = [
        fastest_attention_forward(module.train(is_training), query, query, query, None, scaling=0.3, dropout=rate)[0]
        for is_training, rate in ((True, 0.5), (False, 0.5), (True, 0.0))
    ]
    assert not torch.allclose(outputs[0], outputs[1], atol=0.1) and torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attentions_come_without_choosing_an_implementation(dtype):
    model, pixel_values = small_model(), torch.randn(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        attentions = model(pixel_values, output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(2, 3, 19, 19)] * 2
    torch.testing.assert_close(attentions[0].sum(-1).float(), torch.ones(2, 3, 19), rtol=1e-2, atol=1e-2)


def test_a_chosen_attention_is_kept_and_none_is_saved(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text()
    loaded = IBViTForImageClassification.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
def test_gradient_checkpointing_gives_the_same_gradients(patch_embedding):
    model = small_model(patch_embedding=patch_embedding).train()
    pixel_values, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2])
    calls = []
    for layer in model.ibvit.layers:
        layer.layernorm_before.register_forward_hook(lambda *_: calls.append(1))

    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        calls.clear()
        outputs = model(pixel_values, labels=labels)
        (outputs.loss + outputs.logits.square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert len(calls) == (4 if checkpointing else 2)  # a checkpointed layer runs again in the backward pass
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dropout_acts_in_training_only():
    model = small_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    pixel_values = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(pixel_values).logits, model(pixel_values).logits)
    model.train()
    assert not torch.equal(model(pixel_values).logits, model(pixel_values).logits)


def test_drop_path_drops_both_branches_of_a_row_and_keeps_their_expectation(tmp_path):
    small_model(drop_path_rate=0.4, num_hidden_layers=5).save_pretrained(tmp_path)
    model = IBViTForImageClassification.from_pretrained(tmp_path)
    layers, hidden_states = model.ibvit.layers, torch.randn(2000, 1, 24)
    for layer, rate in zip(layers, (0, 0.1, 0.2, 0.3, 0.4), strict=True):
        # Every row is the same, so that rows differ by what was dropped alone.
        rows = hidden_states[:1].expand(2000, -1, -1)
        branch = layer.attention(layer.layernorm_before(rows), None)[0]
        layer.mlp = nn.Identity()
        layer.layernorm_after = nn.Identity()
        torch.testing.assert_close(layer(rows), 2 * (rows + branch))
        layer.train()
        keep = 1 - rate
        # (rows + a · branch) · (1 + b) with a and b of 0 or 1 / keep.
        kinds = {(a, b): (rows[0] + a * branch[0]) * (1 + b) for a in (0, 1 / keep) for b in (0, 1 / keep)}
        output = layer(rows)
        counts = {
            kind: int(torch.isclose(output, wanted, rtol=1e-4, atol=1e-5).all((1, 2)).sum())
            for kind, wanted in kinds.items()
        }
        assert sum(counts.values()) == 2000
        for (a, b), count in counts.items():
            probability = (keep if a else rate) * (keep if b else rate)
            assert count / 2000 == pytest.approx(probability, abs=0.045)  # four deviations
        layer.eval()


def test_without_drop_path_training_draws_no_random_numbers():
    torch.manual_seed(0)
    model = small_model().train()
    state = torch.get_rng_state()
    model(torch.randn(2, 3, 16, 16, generator=torch.Generator()), labels=torch.tensor([0, 1])).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    dropping = small_model(drop_path_rate=0.5)
    assert dropping.state_dict().keys() == model.state_dict().keys()
    dropping.load_state_dict(model.state_dict())
    pixel_values = torch.randn(2, 3, 16, 16)
    assert torch.equal(dropping(pixel_values).logits, model.eval()(pixel_values).logits)


# Embeddings


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
def test_bf16_autocast_forward_and_backward(patch_embedding):
    model = IBViTForImageClassification(small_config(patch_embedding=patch_embedding))
    pixel_values, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2])
    expected = model(pixel_values, labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(pixel_values, labels=labels)
    (outputs.loss + outputs.logits.square().mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(outputs.loss.float(), expected.loss, rtol=0.05, atol=0)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("patch_size", "size"), [(4, (16, 24)), (8, (19, 30))])
@pytest.mark.parametrize("channels", [3, 16, 24, 32])
def test_the_patch_projection_is_a_strided_convolution(channels, patch_size, size, memory_format, bf16):
    projection = IBViTPatchProjection(channels, 24, patch_size, patch_size)
    pixel_values = torch.randn(5, channels, *size).to(memory_format=memory_format).requires_grad_()
    inputs = (pixel_values, projection.weight, projection.bias)
    expected = nn.functional.conv2d(*inputs, stride=patch_size)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output = projection(pixel_values)
    assert output.shape == expected.shape
    directions = torch.randn_like(expected)
    gradients, expected_gradients = (torch.autograd.grad((of * directions).sum(), inputs) for of in (output, expected))
    half = projection.to(torch.bfloat16)(pixel_values.to(torch.bfloat16))
    assert (half - expected).norm() < 0.01 * expected.norm()
    for seen, wanted in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert (seen - wanted).norm() < (0.01 if bf16 else 1e-5) * wanted.norm()


@pytest.mark.parametrize("side", [16, 19])
def test_the_gradient_of_the_patch_projection_has_the_memory_order_of_the_pixels(side):
    projection = IBViTPatchProjection(8, 24, 4, 4)
    pixel_values = torch.randn(2, 8, side, side).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = projection(pixel_values)
    (gradient,) = torch.autograd.grad(output.sum(), pixel_values)
    assert gradient.stride() == pixel_values.stride()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
def test_a_row_does_not_depend_on_the_other_rows(patch_embedding, training):
    model = small_model(patch_embedding=patch_embedding).train(training)
    pixel_values = torch.randn(4, 3, 16, 16)
    other = torch.cat((pixel_values[:1], 10 * torch.randn(2, 3, 16, 16) + 5))
    first, alone, again = (model(images) for images in (pixel_values, pixel_values[:1], other))
    for name in ("logits", "class_logits", "teacher_token_logits"):
        # Matrices of another height may be multiplied in another order.
        torch.testing.assert_close(alone[name][0], first[name][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again[name][0], first[name][0], rtol=1e-4, atol=1e-5)


def test_linear_patch_embedding_is_vits_projection():
    embeddings = small_model().ibvit.embeddings
    pixel_values = torch.randn(2, 3, 16, 16)
    tokens = embeddings(pixel_values) - embeddings.position_embeddings
    ((projection,),) = embeddings.stems.values()
    patches = pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 48)
    expected = patches @ projection.weight.flatten(1).T + projection.bias
    torch.testing.assert_close(tokens[:, 3:], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, :1], embeddings.class_token.expand(2, -1, -1))
    torch.testing.assert_close(tokens[:, 1:3], embeddings.teacher_tokens.expand(2, -1, -1))


@pytest.mark.parametrize("operators", [None, ("involution", "convolution"), ("involution", "involution")])
def test_bias_stems_initialize_each_teacher_token_by_the_mean_of_its_stem(operators):
    model = small_model(patch_embedding="bias_stems", teacher_spatial_operators=operators)
    embeddings, pixel_values = model.ibvit.embeddings, torch.randn(2, 3, 16, 16)
    tokens = embeddings(pixel_values) - embeddings.position_embeddings
    patches = {name: stem(pixel_values).flatten(2).transpose(1, 2) for name, stem in embeddings.stems.items()}
    assert patches.keys() == {"convolution", "involution"}
    torch.testing.assert_close(tokens[:, 3:], patches["convolution"] + patches["involution"])
    torch.testing.assert_close(tokens[:, 0], embeddings.class_token[0].expand(2, -1))
    for i, name in enumerate(operators or ("convolution", "involution")):
        expected = embeddings.teacher_tokens[:, i] + patches[name].mean(1)
        torch.testing.assert_close(tokens[:, 1 + i], expected)


def test_stems_differ_in_the_operator_after_the_first_layer():
    stems = small_model(patch_embedding="bias_stems", num_stem_layers=3).ibvit.embeddings.stems
    layers = {name: [type(layer).__name__ for layer in stem][::3] for name, stem in stems.items()}
    assert layers["convolution"] == ["Conv2d"] * 3 + ["IBViTPatchProjection"]
    assert layers["involution"] == ["Conv2d", "Involution2d", "Involution2d", "IBViTPatchProjection"]


def test_teacher_tokens_and_positions_start_random():
    # Equal tokens would get equal gradients wherever their heads agree.
    embeddings = IBViTForImageClassification(small_config(hidden_size=96)).ibvit.embeddings
    for parameter in (embeddings.class_token, embeddings.teacher_tokens, embeddings.position_embeddings):
        assert 0.3 < parameter.std() < 0.7


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
def test_interpolating_to_the_same_size_changes_nothing(patch_embedding):
    model, pixel_values = small_model(patch_embedding=patch_embedding), torch.randn(2, 3, 16, 16)
    assert torch.equal(model(pixel_values, interpolate_pos_encoding=True).logits, model(pixel_values).logits)


@pytest.mark.parametrize("size", [(24, 24), (8, 20)])
@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
def test_images_of_another_size_are_interpolated_on_request(patch_embedding, size):
    model, pixel_values = small_model(patch_embedding=patch_embedding), torch.randn(2, 3, *size)
    outputs = model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
    assert outputs.hidden_states[0].shape == (2, 3 + size[0] * size[1] // 16, 24)
    assert outputs.teacher_token_logits.shape == (2, 2, NUM_LABELS)
    with pytest.raises(ValueError, match=f"{size[0]}×{size[1]} pixels.*image_size=16.*interpolate_pos_encoding=True"):
        model(pixel_values)


def test_interpolation_keeps_the_tokens_own_positions():
    embeddings = small_model().ibvit.embeddings
    positions = embeddings.interpolate_pos_encoding(32, 16)
    assert positions.shape == (1, 3 + 8 * 4, 24)
    assert torch.equal(positions[:, :3], embeddings.position_embeddings[:, :3])


def test_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match="1 channels.*num_channels=3"):
        small_model()(torch.randn(2, 1, 16, 16))
    assert small_model(num_channels=1)(torch.randn(2, 1, 16, 16)).logits.shape == (2, NUM_LABELS)


# In the hands of other libraries


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_every_type_of_weights_takes_the_pixels_of_an_image_processor(dtype, patch_embedding):
    model, pixel_values = small_model(patch_embedding=patch_embedding), torch.randn(2, 3, 16, 16)
    expected = model(pixel_values)
    outputs = model.to(dtype)(pixel_values, labels=torch.tensor([0, 3]))
    assert outputs.loss.isfinite() and outputs.class_logits.dtype == dtype
    is_half = dtype.itemsize < 4
    assert outputs.logits.dtype == outputs.loss.dtype == (torch.float32 if is_half else dtype)
    torch.testing.assert_close(
        outputs.class_logits.float(), expected.class_logits, rtol=0, atol=0.15 if is_half else 1e-4
    )


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
def test_bytes_are_no_pixel_values(patch_embedding):
    # An image that no image processor has rescaled is refused, not converted.
    with pytest.raises(RuntimeError, match="Byte|unsigned char"):
        small_model(patch_embedding=patch_embedding)(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


def test_float64_is_exact():
    model = small_model(patch_embedding="bias_stems", hidden_act="gelu_new").double()
    pixel_values, labels = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3])
    assert torch.autograd.gradcheck(lambda pixels: model(pixels, labels=labels).loss, pixel_values, fast_mode=True)
    assert torch.autograd.gradcheck(lambda pixels: model(pixels).logits, pixel_values, fast_mode=True)


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_in_a_frozen_student_learn_under_checkpointing(use_reentrant, patch_embedding):
    model = small_model(patch_embedding=patch_embedding).train()
    model.requires_grad_(False)
    adapters = [nn.Linear(24, 24, bias=False) for _ in model.ibvit.layers]
    for layer, adapter in zip(model.ibvit.layers, adapters):
        layer.attention.register_forward_hook(lambda _, __, output, a=adapter: (output[0] + a(output[0]), *output[1:]))
    inputs, gradients = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}, []
    for checkpointing in (False, True):
        if checkpointing:
            # As PEFT does.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**inputs).loss.backward()
        gradients.append([adapter.weight.grad for adapter in adapters])
        for adapter in adapters:
            adapter.weight.grad = None
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_input_embeddings_are_those_of_the_transformer():
    model = small_model()
    assert model.get_input_embeddings() is model.ibvit.get_input_embeddings() is model.ibvit.embeddings
    model.set_input_embeddings(new := nn.Identity())
    assert model.ibvit.embeddings is new


# Saving and loading


def equal_state_dicts(model, other):
    other = other.state_dict()
    return model.state_dict().keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("patch_embedding", PATCH_EMBEDDINGS)
@pytest.mark.parametrize("teacher_names", [(), ("conv", "inv")])
def test_saving_and_loading_is_bit_exact(patch_embedding, teacher_names, tmp_path):
    model = small_model(patch_embedding=patch_embedding, teacher_names=teacher_names)
    pixel_values = torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = IBViTForImageClassification.from_pretrained(tmp_path)
    assert not loaded.training and equal_state_dicts(loaded, model)
    assert loaded.config.teacher_names == list(teacher_names)
    with torch.no_grad():
        for name, expected in model(pixel_values).items():
            assert torch.equal(loaded(pixel_values)[name], expected)


def test_the_transformer_loads_without_its_heads(tmp_path):
    model = small_model(patch_embedding="bias_stems")
    model.save_pretrained(tmp_path)
    assert equal_state_dicts(IBViTModel.from_pretrained(tmp_path), model.ibvit)


def test_a_student_without_teachers_of_version_0_1_0_loads_without_a_warning(tmp_path):
    model = small_model(teacher_names=())
    model.save_pretrained(tmp_path)
    weights = {**model.state_dict(), "ibvit.embeddings.teacher_tokens": torch.zeros(1, 0, 24)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for model_class in (IBViTForImageClassification, IBViTModel):
        with unittest.mock.patch("transformers.modeling_utils.logger.warning") as warning:
            loaded = model_class.from_pretrained(tmp_path)
        if model_class is IBViTForImageClassification:
            assert not warning.called and equal_state_dicts(loaded, model)
    assert equal_state_dicts(load_student(tmp_path, ("a",)).ibvit.layers, model.ibvit.layers)


@pytest.mark.parametrize("model_class", [IBViTForImageClassification, IBViTModel])
def test_the_auto_map_names_what_a_saved_folder_loads_as(model_class, tmp_path):
    model_class(small_config()).save_pretrained(tmp_path)
    classes = {"AutoConfig": "configuration_ibvit.IBViTConfig", "AutoModel": "modeling_ibvit.IBViTModel"}
    if model_class is IBViTForImageClassification:
        classes["AutoModelForImageClassification"] = "modeling_ibvit.IBViTForImageClassification"
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == classes


def test_loading_with_another_number_of_labels(tmp_path):
    model = small_model(teacher_names=("a", "b", "c"))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        IBViTForImageClassification.from_pretrained(tmp_path, num_labels=3)
    loaded = IBViTForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded.config.num_labels == 3 and loaded.config.teacher_names == ["a", "b", "c"]
    outputs = loaded(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 2]))
    assert outputs.logits.shape == (2, 3) and outputs.teacher_token_logits.shape == (2, 3, 3)
    assert outputs.loss.isfinite()
    assert equal_state_dicts(loaded.ibvit, model.ibvit)
    for head in (loaded.class_head, *loaded.teacher_heads):
        # Not what they were saved with.
        expected = (2 / sum(head.weight.shape)) ** 0.5
        assert head.weight.std().item() == pytest.approx(expected, rel=0.25) and (head.bias == 0).all()


def test_initial_weights_keep_the_scale_of_the_signal_at_any_width():
    for width in (32, 256):
        model = IBViTForImageClassification(small_config(hidden_size=width, num_attention_heads=4))
        layers = [module for module in model.ibvit.layers.modules() if isinstance(module, torch.nn.Linear)]
        assert layers
        for layer in layers:
            # Glorot and Bengio's variance: 2 / (inputs + outputs).
            expected = (2 / sum(layer.weight.shape)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.15)
        positions = model.ibvit.embeddings.position_embeddings
        assert positions.std().item() == pytest.approx(model.config.initializer_range, rel=0.15)
