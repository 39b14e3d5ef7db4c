"""The teachers and their configuration."""

import pytest
import torch
import torchvision
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification


SMALL = ["convolution-small", "involution-small"]


def small_model(operator="convolution", **overrides):
    """A model of about 20,000 parameters that has every part: a shortcut with and without stride, and identities."""
    arguments = {"embedding_size": 16, "hidden_sizes": (32, 48), "depths": (1, 2), "downsample_strides": (1, 2)}
    arguments |= {"stem": "plain", "reduction": 2, "num_labels": 5, "spatial_operator": operator, **overrides}
    return IBResNetForImageClassification(IBResNetConfig(**arguments))


def on_meta_device(model_class, *args, **kwargs):
    # Counting parameters needs no numbers, and initializing ResNet-152 takes seconds.
    with torch.device("meta"):
        return model_class(*args, **kwargs)


def number_of_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# Configuration


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("rednet26", 9.23),
        ("rednet38", 12.39),
        ("rednet50", 15.54),
        ("rednet101", 25.65),
        ("rednet152", 33.99),
        ("resnet26", 13.70),
        ("resnet38", 19.63),
    ],
)
def test_parameters_of_the_presets_in_millions(preset, millions):
    config = IBResNetConfig.from_preset(preset, num_labels=1000)
    model = on_meta_device(IBResNetForImageClassification, config)
    # Half a unit of the last published digit; a little more because RedNet-152's 33,984,582 were published as 33.99.
    assert number_of_parameters(model) / 1e6 == pytest.approx(millions, abs=0.0055)


@pytest.mark.parametrize("depth", ["50", "101", "152"])
def test_resnet_presets_have_torchvisions_number_of_parameters(depth):
    config = IBResNetConfig.from_preset(f"resnet{depth}", num_labels=1000)
    model = on_meta_device(IBResNetForImageClassification, config)
    reference = on_meta_device(getattr(torchvision.models, f"resnet{depth}"))
    assert number_of_parameters(model) == number_of_parameters(reference)


@pytest.mark.parametrize("num_labels", [10, 100])
@pytest.mark.parametrize("preset", SMALL)
def test_small_presets_are_small(preset, num_labels):
    model = on_meta_device(IBResNetForImageClassification, IBResNetConfig.from_preset(preset, num_labels=num_labels))
    assert number_of_parameters(model) <= 500_000


@pytest.mark.parametrize(
    ("convolution", "involution"), [SMALL, *((f"resnet{depth}", f"rednet{depth}") for depth in (26, 38, 50, 101, 152))]
)
def test_the_two_operators_presets_differ_in_the_operator_only(convolution, involution):
    first = IBResNetConfig.from_preset(convolution).to_dict()
    second = IBResNetConfig.from_preset(involution).to_dict()
    assert {key for key in first if first[key] != second[key]} == {"spatial_operator", "kernel_size"}
    assert first.keys() == second.keys()


def test_kernel_size_follows_the_operator_unless_given():
    assert IBResNetConfig(spatial_operator="convolution").kernel_size == 3
    assert IBResNetConfig(spatial_operator="involution").kernel_size == 7
    assert IBResNetConfig(spatial_operator="involution", kernel_size=5).kernel_size == 5


def test_preset_fields_can_be_overridden():
    config = IBResNetConfig.from_preset("involution-small", depths=(1, 1, 1), kernel_size=3, num_labels=7)
    assert (config.depths, config.kernel_size, config.num_labels) == ([1, 1, 1], 3, 7)
    assert config.hidden_sizes == IBResNetConfig.from_preset("involution-small").hidden_sizes


def test_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match='preset="resnet18"') as error:
        IBResNetConfig.from_preset("resnet18")
    for name in ("rednet26", "resnet152", *SMALL):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_operator": "attention"}, r'spatial_operator="attention".*"convolution" or "involution"'),
        ({"stem": "deep"}, r'stem="deep".*"imagenet" or "plain"'),
        (
            {"depths": (1, 1), "hidden_sizes": (32, 64, 128), "downsample_strides": (1, 2)},
            r"hidden_sizes=\[32, 64, 128\].*depths=\[1, 1\].*downsample_strides=\[1, 2\]",
        ),
        ({"downsample_strides": (1, 2)}, r"downsample_strides=\[1, 2\]"),
    ],
)
def test_configuration_errors_name_field_and_value(arguments, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        IBResNetConfig(**arguments)


@pytest.mark.parametrize("operator", ["convolution", "involution"])
def test_even_kernel_is_refused_before_the_first_image(operator):
    # An even kernel with padding K/2 gives one position too many, which the residual connection cannot add.
    with pytest.raises(StrictDataclassClassValidationError, match="kernel_size=4"):
        small_model(operator, kernel_size=4)


def test_configuration_survives_saving(tmp_path):
    config = IBResNetConfig.from_preset("involution-small", num_labels=3, num_channels=1)
    config.save_pretrained(tmp_path)
    assert IBResNetConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


# Model


def test_a_resnet_equals_torchvisions():
    reference = ResNet(Bottleneck, IBResNetConfig.from_preset("resnet26").depths, num_classes=10).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Fresh statistics and scales are 0 and 1, and would hide a missing or misplaced norm.
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)

    model = IBResNetForImageClassification(IBResNetConfig.from_preset("resnet26", num_labels=10)).eval()
    # torchvision registers a block's shortcut after its branch, this model before; all else has the same order.
    in_order = [reference.conv1, reference.bn1]
    for block in [*reference.layer1, *reference.layer2, *reference.layer3, *reference.layer4]:
        in_order += [*(block.downsample or ()), block.conv1, block.bn1, block.conv2, block.bn2, block.conv3, block.bn3]
    in_order.append(reference.fc)
    source = [tensor for module in in_order for tensor in module.state_dict().values()]
    target = list(model.state_dict().values())
    assert [tensor.shape for tensor in source] == [tensor.shape for tensor in target]
    for source_tensor, target_tensor in zip(source, target):
        target_tensor.copy_(source_tensor)

    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(pixel_values)
        logits = model(pixel_values).logits
    assert expected.std() > 0.1  # the comparison is of something
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("preset", ["resnet26", "rednet26"])
def test_hidden_states_of_the_imagenet_stem(preset):
    config = IBResNetConfig.from_preset(preset, num_labels=4, hidden_sizes=(64, 128, 256, 512))
    outputs = IBResNetForImageClassification(config)(torch.randn(2, 3, 64, 64), output_hidden_states=True)
    shapes = [tuple(hidden_state.shape) for hidden_state in outputs.hidden_states]
    assert shapes == [(2, 64, 16, 16), (2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2)]
    assert outputs.logits.shape == (2, 4)


@pytest.mark.parametrize("size", [(8, 8), (15, 22)])
@pytest.mark.parametrize("preset", SMALL)
def test_hidden_states_of_the_plain_stem(preset, size):
    outputs = IBResNetForImageClassification(IBResNetConfig.from_preset(preset, num_labels=4))(
        torch.randn(2, 3, *size), output_hidden_states=True
    )
    height, width = size
    half, quarter = (-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))
    shapes = [tuple(hidden_state.shape) for hidden_state in outputs.hidden_states]
    assert shapes == [(2, 32, *size), (2, 64, *size), (2, 128, *half), (2, 256, *quarter)]


@pytest.mark.parametrize("size", [(31, 45), (33, 64)])
def test_both_operators_keep_the_same_positions_at_odd_sizes(size):
    shapes = []
    for preset in ("resnet26", "rednet26"):
        config = IBResNetConfig.from_preset(preset, num_labels=4, hidden_sizes=(64, 64, 64, 64))
        outputs = IBResNetForImageClassification(config)(torch.randn(2, 3, *size), output_hidden_states=True)
        shapes.append([hidden_state.shape for hidden_state in outputs.hidden_states])
    assert shapes[0] == shapes[1]


def test_hidden_states_are_returned_on_request_only():
    model, pixel_values = small_model(), torch.randn(2, 3, 8, 8)
    assert model(pixel_values).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(pixel_values).hidden_states) == 3
    assert model(pixel_values, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("by_config", [False, True])
def test_return_dict_false_gives_a_tuple(by_config):
    model = small_model(return_dict=not by_config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 3]), "output_hidden_states": True}
    outputs, expected = model(**inputs, return_dict=None if by_config else False), model(**inputs, return_dict=True)
    torch.testing.assert_close(outputs, expected.to_tuple(), rtol=0, atol=0)


@pytest.mark.parametrize("operator", ["convolution", "involution"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_every_type_of_weights_takes_the_pixels_of_an_image_processor(dtype, operator):
    model, pixel_values = small_model(operator), torch.randn(8, 3, 8, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model(pixel_values)  # moves the statistics of the batch norms
    expected = model.eval()(pixel_values).logits
    logits = model.to(dtype)(pixel_values).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1 if dtype.itemsize < 4 else 1e-4)


def test_bytes_are_no_pixel_values():
    # An image that no image processor has rescaled is refused, not converted.
    with pytest.raises(RuntimeError, match="Byte|unsigned char"):
        small_model()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_input_embeddings_are_the_stem():
    model = small_model()
    assert model.get_input_embeddings() is model.stem


@pytest.mark.parametrize("operator", ["convolution", "involution"])
def test_labels_give_the_cross_entropy(operator):
    model, pixel_values, labels = small_model(operator).eval(), torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 2])
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))
    assert model(pixel_values).loss is None
    # The Trainer divides the sum over an accumulated step's batches by the number of rows in all of them.
    accumulated = model(pixel_values, labels=labels, num_items_in_batch=12).loss
    torch.testing.assert_close(accumulated, outputs.loss * 3 / 12)


@pytest.mark.parametrize("operator", ["convolution", "involution"])
def test_every_parameter_gets_a_gradient(operator):
    model = small_model(operator)
    model(torch.randn(4, 3, 8, 8), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("operator", ["convolution", "involution"])
def test_bf16_autocast_forward_and_backward(operator):
    model, pixel_values, labels = small_model(operator), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    expected = model(pixel_values, labels=labels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(pixel_values, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # Ten layers deep, each rounding to 8 bits: a few per cent, and no more.
    torch.testing.assert_close(outputs.loss.float(), expected, rtol=0.05, atol=0)


def test_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match="1 channels.*num_channels=3"):
        small_model()(torch.randn(2, 1, 8, 8))
    assert small_model(num_channels=1)(torch.randn(2, 1, 8, 8)).logits.shape == (2, 5)


@pytest.mark.parametrize("operator", ["convolution", "involution"])
def test_saving_and_loading_is_bit_exact(operator, tmp_path):
    model, pixel_values = small_model(operator), torch.randn(4, 3, 9, 8)
    for _ in range(3):  # moves the batch norms' statistics
        model(pixel_values)
    model.eval().save_pretrained(tmp_path)
    loaded = IBResNetForImageClassification.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_loading_with_another_number_of_labels(tmp_path):
    model = small_model("involution")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        IBResNetForImageClassification.from_pretrained(tmp_path, num_labels=3)
    loaded = IBResNetForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)
    assert loaded.config.num_labels == 3
    # The new head starts like a fresh one, and nothing else changed.
    bound = 48**-0.5
    assert 0 < loaded.classifier.weight.abs().max() <= bound and loaded.classifier.bias.abs().max() <= bound
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier.")}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in kept.items())
