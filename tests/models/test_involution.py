"""The operator against plain loops and the published formulation; the layer against its parts."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_involution import ROUNDING, loops, random_inputs
from torch import nn

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, involution2d
from hf_ibdistill.models.involution import Involution2d, _chunks, _involution, _Matrices, _Taps, _way


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def unfold_formulation(input, kernel, stride):
    """The published formulation: K·K copies of the input, multiplied and summed."""
    batch, groups, taps, height, width = kernel.shape
    kernel_size = int(taps**0.5)
    columns = nn.functional.unfold(input, kernel_size, padding=kernel_size // 2, stride=stride)
    columns = columns.view(batch, groups, -1, taps, height, width)
    return (kernel[:, :, None] * columns).sum(3).flatten(1, 2)


def check_against_loops(input, kernel, stride):
    output = involution2d(input, kernel, stride)
    grad_output = torch.randn(output.shape).to(output.dtype)
    actual = output, *torch.autograd.grad(output, (input, kernel), grad_output)
    expected = loops(input.detach(), kernel.detach(), grad_output, stride)
    assert output.dtype == torch.promote_types(input.dtype, kernel.dtype)
    assert actual[1].dtype == input.dtype and actual[2].dtype == kernel.dtype
    atol = 1e-13 if output.dtype == torch.float64 else 3e-5
    for value, reference in zip(actual, expected):
        assert value.shape == reference.shape
        # The loops start from the same (already rounded) numbers, so what may differ is one rounding of the result and
        # the float32 sum of at most 49·8 products of order 1, about 400 · 2^-24 < 3e-5.
        torch.testing.assert_close(value.double(), reference, rtol=ROUNDING[value.dtype], atol=atol)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("size", [(6, 6), (7, 7), (5, 8), (8, 5), (1, 3)])  # the last is smaller than every kernel
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_value_and_gradients_equal_plain_loops(stride, kernel_size, size, groups):
    check_against_loops(*random_inputs(8, groups, kernel_size, stride, *size), stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),  # what autocast gives: a float32 feature map, a kernel out of a convolution
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
    ],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_every_type_is_rounded_once(stride, kernel_size, dtypes):
    check_against_loops(*random_inputs(8, 2, kernel_size, stride, 5, 6, dtypes=dtypes), stride)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 4),
    channels_of_group=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    batch=st.integers(1, 3),
)
def test_equals_the_published_unfold_formulation(groups, channels_of_group, kernel_size, stride, height, width, batch):
    channels = groups * channels_of_group
    input, kernel = random_inputs(channels, groups, kernel_size, stride, height, width, batch)
    output, expected = involution2d(input, kernel, stride), unfold_formulation(input, kernel, stride)
    grad_output = torch.randn_like(output)
    # Both sum in float32, in another order.
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=3e-5)
    gradients = torch.autograd.grad(output, (input, kernel), grad_output)
    expected_gradients = torch.autograd.grad(expected, (input, kernel), grad_output)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(
    ("way", "kernel_size", "stride", "size", "batch"),
    [
        (_Taps, 3, 1, (20, 23), 210),
        (_Taps, 5, 2, (21, 22), 300),
        (_Matrices, 5, 1, (8, 7), 800),
        (_Matrices, 3, 2, (5, 5), 4000),
    ],
)
def test_chunks_fit_together_and_the_last_may_be_shorter(way, kernel_size, stride, size, batch):
    input, kernel = random_inputs(4, 2, kernel_size, stride, *size, batch)
    chosen = _way(*size, kernel_size, stride, torch.device("cpu"), torch.float32)
    chunks = _chunks(torch.empty(2 * batch, 2, *size), kernel_size**2, chosen)
    assert isinstance(chosen, way) and len(chunks) > 2 and chunks[-1].stop > 2 * batch
    output, expected = involution2d(input, kernel, stride), unfold_formulation(input, kernel, stride)
    grad_output = torch.randn_like(output)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=3e-5)
    gradients = torch.autograd.grad(output, (input, kernel), grad_output)
    expected_gradients = torch.autograd.grad(expected, (input, kernel), grad_output)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("size", "batch"), [((28, 28), 50), ((4, 4), 3000)], ids=["taps", "matrices"])
def test_scratch_memory_does_not_grow_with_the_kernel(size, batch, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from involution import both, extra_memory, forward

    def measure(mode, operator, kernel_size):
        input, kernel = random_inputs(8, 1, kernel_size, 1, *size, batch)
        operands = input, kernel, torch.randn(input.shape), 1
        mode(operator, *operands)  # what is kept from one call to the next is not scratch
        return extra_memory(lambda: mode(operator, *operands))

    # The measure itself: the copies and their products with the kernels, both there before they are summed.
    columns = 4 * 3**2 * 8 * batch * size[0] * size[1]
    assert measure(forward, unfold_formulation, 3) == 2 * columns
    assert measure(both, involution2d, 7) < 1.1 * measure(both, involution2d, 3)


def test_the_kernel_of_one_position_acts_on_that_position_only():
    input, kernel = random_inputs(4, 2, 3, 1, 6, 6)
    changed = kernel.detach().clone()
    changed[0, 1, :, 2, 3] += 1
    difference = (involution2d(input, changed) - involution2d(input, kernel)).abs() > 0
    expected = torch.zeros(2, 4, 6, 6, dtype=torch.bool)
    expected[0, 2:, 2, 3] = True  # the second group's channels
    assert torch.equal(difference, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("needs", ["input", "kernel"])
def test_only_one_of_the_two_needs_a_gradient(stride, needs):
    input, kernel = random_inputs(8, 2, 5, stride, 5, 6)
    both = torch.autograd.grad(involution2d(input, kernel, stride).square().sum(), (input, kernel))
    frozen, expected = (kernel, both[0]) if needs == "input" else (input, both[1])
    frozen.requires_grad_(False)
    involution2d(input, kernel, stride).square().sum().backward()
    assert frozen.grad is None
    assert torch.equal((input if needs == "input" else kernel).grad, expected)


def test_without_any_gradient_there_is_no_graph():
    input, kernel = random_inputs(8, 2, 3, 1, 5, 6)
    assert not involution2d(input.detach(), kernel.detach()).requires_grad
    with torch.no_grad():
        assert not involution2d(input, kernel).requires_grad


def channels_last(input, kernel):
    return input.contiguous(memory_format=torch.channels_last), kernel


def transposed(input, kernel):
    input = input.transpose(2, 3).contiguous().transpose(2, 3)
    return input, kernel.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)


def sliced(input, kernel):
    return torch.stack((input, input), dim=-1)[..., 0], torch.stack((kernel, kernel), dim=1)[:, 1]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [channels_last, transposed, sliced])
def test_memory_layout_does_not_matter(layout, stride):
    input, kernel = (tensor.detach() for tensor in random_inputs(8, 2, 3, stride, 5, 6))
    other_input, other_kernel = layout(input, kernel)
    assert not (other_input.is_contiguous() and other_kernel.is_contiguous())
    check_against_loops(other_input.detach().requires_grad_(), other_kernel.detach().requires_grad_(), stride)


def test_non_contiguous_output_gradient():
    input, kernel = random_inputs(8, 2, 3, 1, 5, 6)
    output = involution2d(input, kernel)
    grad_output = torch.randn(output.shape)
    expected = torch.autograd.grad(output, (input, kernel), grad_output, retain_graph=True)
    last = grad_output.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.autograd.grad(output, (input, kernel), last), expected)


def test_a_kernel_expanded_over_positions_is_a_depthwise_convolution():
    # An expanded kernel has stride 0 in memory: its gradient must still be one value a position before it is summed.
    input = torch.randn(2, 4, 6, 7, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, requires_grad=True)
    kernel = weight.view(1, 4, 9, 1, 1).expand(2, 4, 9, 6, 7)
    output, expected = involution2d(input, kernel), nn.functional.conv2d(input, weight, padding=1, groups=4)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    grad_output = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, (input, weight), grad_output),
        torch.autograd.grad(expected, (input, weight), grad_output),
        rtol=1e-5,
        atol=3e-5,
    )


def test_an_empty_batch_stays_empty():
    input, kernel = random_inputs(8, 2, 3, 2, 5, 6, batch=0)
    output = involution2d(input, kernel, 2)
    output.sum().backward()
    assert output.shape == (0, 8, 3, 3) and input.grad.shape == input.shape and kernel.grad.shape == kernel.shape


@pytest.mark.parametrize(
    ("input_shape", "kernel_shape", "stride", "message"),
    [
        ((4, 5, 5), (1, 2, 9, 5, 5), 1, r"\(4, 5, 5\) .*\(1, 2, 9, 5, 5\).* \(N, C, H, W\)"),
        ((1, 4, 5, 5), (1, 2, 9, 5), 1, r"\(1, 4, 5, 5\) .*\(1, 2, 9, 5\).* \(N, C, H, W\)"),
        ((1, 4, 5, 5), (1, 2, 8, 5, 5), 1, r"third dimension .* 8\. .*K·K"),
        ((1, 4, 5, 5), (1, 2, 16, 5, 5), 1, r"third dimension .* 16\. .*K·K"),
        ((1, 4, 5, 5), (1, 3, 9, 5, 5), 1, "3 groups.* 4 channels"),
        ((2, 4, 5, 5), (1, 2, 9, 5, 5), 1, r"\(1, 2, 9, 5, 5\)\..*must be \(2, 2, 9, 5, 5\)"),
        ((1, 4, 5, 5), (1, 2, 9, 5, 5), 2, r"\(1, 2, 9, 5, 5\)\..*stride=2 .*must be \(1, 2, 9, 3, 3\)"),
        ((1, 4, 5, 6), (1, 2, 9, 2, 3), 2, r"\(1, 2, 9, 2, 3\)\..*stride=2 .*must be \(1, 2, 9, 3, 3\)"),
        ((1, 4, 5, 6), (1, 2, 9, 6, 5), 1, r"\(1, 2, 9, 6, 5\)\..*stride=1 .*must be \(1, 2, 9, 5, 6\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(input_shape, kernel_shape, stride, message):
    with pytest.raises(ValueError, match=message):
        involution2d(torch.zeros(input_shape), torch.zeros(kernel_shape), stride)


def check_compiled(backend, stride, sizes):
    torch.compiler.reset()
    compiled = torch.compile(involution2d, fullgraph=True, backend=backend)
    for size in sizes:
        input, kernel = random_inputs(4, 2, 3, stride, *size)
        output, expected = compiled(input, kernel, stride), involution2d(input, kernel, stride)
        grad_output = torch.randn_like(output)
        # Compiled code may fuse a multiplication with an addition, which saves a rounding.
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(output, (input, kernel), grad_output)
        expected_gradients = torch.autograd.grad(expected, (input, kernel), grad_output)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_compiled_equals_eager():
    # One stride and one size, because compiling takes ten seconds.
    check_compiled("inductor", stride=2, sizes=[(5, 6)])


def test_traced_equals_eager_when_the_image_size_changes():
    # The second size makes the compiler trace again with symbolic sizes.
    check_compiled("aot_eager", stride=2, sizes=[(5, 6), (8, 7)])


def test_the_teacher_compiles_once_a_mode_and_type():
    # One block with a stride, because compiling a block takes seconds.
    shape = {"embedding_size": 16, "hidden_sizes": (32,), "depths": (1,), "downsample_strides": (2,), "num_labels": 10}
    config = IBResNetConfig(spatial_operator="involution", stem="plain", reduction=2, **shape)
    model = IBResNetForImageClassification(config)
    reference = copy.deepcopy(model)

    def step(model, images, labels, dtype):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(images, labels=labels).loss

    # With fullgraph a graph break is an error, and so is one compilation more than torch._dynamo.config.recompile_limit.
    # This is about the number of graphs, so nothing is generated from them.
    compiled = torch.compile(step, backend="eager", fullgraph=True)

    def run(dtype, is_training, batch):
        images, labels, losses = torch.randn(batch, 3, 8, 8), torch.arange(batch) % 10, []
        for network, function in ((model, compiled), (reference, step)):
            network.train(is_training)
            with torch.set_grad_enabled(is_training):
                losses.append(function(network, images, labels, dtype))
        torch.testing.assert_close(*losses)
        if is_training:
            weights = model.stem[0].convolution.weight, reference.stem[0].convolution.weight
            gradients = [torch.autograd.grad(loss, weight) for loss, weight in zip(losses, weights)]
            torch.testing.assert_close(*gradients)

    for dtype in (torch.float32, torch.bfloat16):
        for is_training, batch in ((True, 8), (True, 3), (False, 16)):
            run(dtype, is_training, batch)
    # Evaluation stays at 16 and more, because the convolution of torch compiles again for fewer.
    with torch.compiler.set_stance("fail_on_recompile"):
        for dtype in (torch.float32, torch.bfloat16):
            for is_training, batch in ((True, 8), (True, 5), (False, 18)):
                run(dtype, is_training, batch)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "size", "dtypes"),
    [
        (3, 1, (9, 8), (torch.float32, torch.float32)),
        (3, 2, (9, 8), (torch.float32, torch.bfloat16)),
        (5, 1, (4, 3), (torch.bfloat16, torch.float32)),
    ],
)
def test_the_operator_keeps_to_the_rules_of_custom_operators(kernel_size, stride, size, dtypes):
    input, kernel = random_inputs(4, 2, kernel_size, stride, *size, dtypes=dtypes)
    torch.library.opcheck(_involution, (input, kernel, stride))  # schema, shapes without data, autograd, compiling


# The layer


def generated_kernel(layer, features, kernel_size, stride, group_channels):
    """Section 3.1 of the paper with the layer's own weights: pool, 1×1 reduction, norm, ReLU, 1×1 expansion."""
    if stride > 1:
        features = nn.functional.avg_pool2d(features, stride, stride, ceil_mode=True)
    reduced = nn.functional.conv2d(features, layer.reduce.weight)
    if isinstance(layer.norm, nn.BatchNorm2d):
        reduced = nn.functional.batch_norm(reduced, None, None, layer.norm.weight, layer.norm.bias, training=True)
    else:
        reduced = nn.functional.group_norm(reduced, 1, layer.norm.weight, layer.norm.bias)
    kernel = nn.functional.conv2d(nn.functional.relu(reduced), layer.expand.weight, layer.expand.bias)
    groups = features.shape[1] // group_channels
    return kernel.view(features.shape[0], groups, kernel_size**2, *features.shape[2:])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(1, channels)], ids=["batch", "group"])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "group_channels", "reduction"), [(7, 1, 16, 4), (3, 2, 8, 2), (5, 2, 4, 3)]
)
def test_layer_generates_the_kernel_from_the_features(kernel_size, stride, group_channels, reduction, norm):
    layer = Involution2d(16, kernel_size, stride, group_channels, reduction, norm)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    features = torch.randn(3, 16, 9, 6)
    kernel = generated_kernel(layer, features, kernel_size, stride, group_channels)
    torch.testing.assert_close(layer(features), involution2d(features, kernel, stride), rtol=1e-5, atol=1e-5)


def test_layer_defaults_are_the_published_ones():
    layer = Involution2d(64, 7)
    assert layer.groups == 4 and layer.stride == 1  # 16 channels a group
    assert layer.reduce.weight.shape == (16, 64, 1, 1) and layer.reduce.bias is None  # reduction 4
    assert layer.expand.weight.shape == (7 * 7 * 4, 16, 1, 1) and layer.expand.bias is not None
    assert isinstance(layer.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (7, 10), (1, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_layer_has_the_positions_of_a_padded_convolution(size, stride):
    features = torch.randn(2, 16, *size)
    convolution = nn.Conv2d(16, 16, 3, stride, padding=1)
    assert Involution2d(16, 3, stride)(features).shape == convolution(features).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("features_dtype", ["float32", "low"])
def test_layer_under_autocast(dtype, stride, features_dtype):
    layer = Involution2d(16, 7, stride, group_channels=8)
    features = torch.randn(2, 16, 7, 8).to(torch.float32 if features_dtype == "float32" else dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = layer(features)
        kernel = generated_kernel(layer, features, 7, stride, 8)
    assert kernel.dtype == dtype and output.dtype == features.dtype
    # Autocast rounds the kernel, in the convolutions that make it; the sum over it is as exact as without autocast.
    expected, _, _ = loops(features.detach(), kernel.detach(), output.detach(), stride)
    torch.testing.assert_close(output.double(), expected, rtol=ROUNDING[output.dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_are_close_to_float32(dtype):
    layer = Involution2d(16, 7, group_channels=8)
    features, grad_output = torch.randn(2, 16, 7, 8, requires_grad=True), torch.randn(2, 16, 7, 8)
    wanted = features, *layer.parameters()
    expected = torch.autograd.grad(layer(features), wanted, grad_output)
    with torch.autocast("cpu", dtype=dtype):
        output = layer(features)
    for gradient, reference in zip(torch.autograd.grad(output, wanted, grad_output), expected):
        assert gradient.dtype == torch.float32
        # About four roundings lie on the way to each gradient, and ReLU turns a few small activations on or off.
        assert (gradient - reference).norm() < 8 * ROUNDING[dtype] * reference.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 16, "kernel_size": 4}, "kernel_size=4"),
        ({"channels": 24, "kernel_size": 3}, "channels=24 .*group_channels=16"),
        ({"channels": 2, "kernel_size": 3, "group_channels": 2}, "channels=2 .*reduction=4"),
    ],
)
def test_layer_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution2d(**arguments)


@pytest.mark.parametrize("size", [(4, 4), (12, 12)])
def test_training_after_inference_mode(size):
    # What is computed once for a shape is kept, and may have been computed in inference mode first.
    _way.cache_clear()
    input, kernel = random_inputs(8, 2, 5, 1, *size)
    with torch.inference_mode():
        expected = involution2d(input, kernel)
    output = involution2d(input, kernel)
    output.sum().backward()
    assert torch.equal(output, expected) and input.grad.abs().sum() > 0 and kernel.grad.abs().sum() > 0
