"""The GPU kernels against plain loops: in Triton's interpreter, and on a GPU where there is one.

python tests/models/test_involution_triton.py    # what the interpreter computes, alone
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from plain_involution import loops, random_inputs

from hf_ibdistill import involution2d
from hf_ibdistill.models import involution
from hf_ibdistill.models.involution import Involution2d, _involution


pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Of the norm of a result: a rounding, and for the wide types the sum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FLOAT, DOUBLE, HALF, BFLOAT = torch.float32, torch.float64, torch.float16, torch.bfloat16
# channels, groups, kernel size, stride, height, width, types of input and kernel
CASES = [
    (6, 2, 3, 1, 5, 7, FLOAT, FLOAT),
    (6, 2, 3, 2, 5, 7, FLOAT, FLOAT),
    (4, 2, 5, 1, 7, 6, DOUBLE, DOUBLE),
    (3, 1, 5, 2, 7, 5, BFLOAT, BFLOAT),
    (3, 1, 7, 1, 5, 6, BFLOAT, BFLOAT),
    (2, 1, 7, 2, 6, 5, FLOAT, FLOAT),
    (3, 1, 7, 2, 9, 5, DOUBLE, DOUBLE),
    (4, 2, 3, 3, 8, 7, FLOAT, BFLOAT),
    (4, 2, 3, 1, 3, 4, BFLOAT, FLOAT),
    (2, 1, 5, 3, 4, 7, FLOAT, DOUBLE),
    (2, 1, 9, 2, 3, 2, HALF, HALF),  # the image is smaller than the kernel
    (2, 2, 1, 2, 5, 5, FLOAT, FLOAT),
    (4, 2, 3, 1, 1, 1, FLOAT, FLOAT),
    (16, 1, 3, 1, 4, 3, FLOAT, FLOAT),
    (19, 1, 3, 2, 4, 3, FLOAT, FLOAT),  # more channels than a block, which they do not fill
    (3, 1, 3, 1, 7, 11, FLOAT, FLOAT),  # more positions than a block
]
GPU_CASES = [
    *CASES,
    *((c, g, k, s, 29, 31, d, d) for c, g in ((32, 2), (24, 1)) for k in (3, 5, 7) for s in (1, 2) for d in (FLOAT, BFLOAT)),
    (80, 2, 7, 1, 12, 12, FLOAT, FLOAT),
    (48, 1, 3, 3, 20, 20, DOUBLE, FLOAT),
]  # fmt: skip


def check(results, input, kernel, grad_output, stride, dtypes):
    for value, reference, dtype in zip(results, loops(input, kernel, grad_output, stride), dtypes):
        assert value.dtype == dtype and value.shape == reference.shape and value.is_contiguous()
        error, tolerance = (value.double() - reference).norm(), TOLERANCE[dtype]
        assert error <= tolerance * reference.norm(), (dtype, float(error / reference.norm()))


def interpret():
    """Check the kernels on CPU tensors, which the environment variable TRITON_INTERPRET allows."""
    assert "cuda" in _involution._backend_fns and "hf_ibdistill.models.involution_triton" not in sys.modules
    from hf_ibdistill.models import involution_triton

    torch.manual_seed(0)
    for *shape, of_input, of_kernel in CASES:
        kernel_size, stride = shape[2:4]
        # The interpreter is slow.
        batch, types = 2 if kernel_size == 3 else 1, (of_input, of_kernel)
        input, kernel = (tensor.detach() for tensor in random_inputs(*shape, batch=batch, dtypes=types))
        # In another order in memory.
        input = input.transpose(2, 3).contiguous().transpose(2, 3)
        output = involution_triton.forward(input, kernel, stride)
        grad_output = torch.randn(output.shape).to(output.dtype).contiguous(memory_format=torch.channels_last)
        results = output, *involution_triton.backward(grad_output, input, kernel, stride)
        dtypes = torch.promote_types(of_input, of_kernel), of_input, of_kernel
        check(results, input, kernel, grad_output, stride, dtypes)

    for batch, channels in ((0, 4), (2, 0)):
        input, kernel = (tensor.detach() for tensor in random_inputs(channels, 2, 3, 2, 5, 6, batch=batch))
        output = involution_triton.forward(input, kernel, 2)
        assert output.shape == (batch, channels, 3, 3)
        gradients = involution_triton.backward(output, input, kernel, 2)
        assert gradients[0].shape == input.shape and torch.equal(gradients[1], torch.zeros_like(kernel))


def test_the_kernels_are_imported_at_the_first_call_and_equal_plain_loops():
    # In another process, because Triton reads the variable when it is imported.
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def on_gpu(channels, groups, kernel_size, stride, height, width, of_input=FLOAT, of_kernel=FLOAT):
    shape = channels, groups, kernel_size, stride, height, width
    operands = random_inputs(*shape, dtypes=(of_input, of_kernel))
    input, kernel = (tensor.detach().cuda().requires_grad_() for tensor in operands)
    size = -(-height // stride), -(-width // stride)
    grad_output = torch.randn(len(input), channels, *size).to(torch.promote_types(of_input, of_kernel))
    return input, kernel, grad_output.cuda()


def compute(input, kernel, grad_output, stride):
    output = involution2d(input, kernel, stride)
    return output.detach(), *torch.autograd.grad(output, (input, kernel), grad_output)


def to_cpu(*tensors):
    return [tensor.detach().cpu() for tensor in tensors]


@needs_gpu
def test_triton_runs_on_this_gpu():
    assert involution._has_triton(torch.device("cuda", torch.cuda.current_device()))


@needs_gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_value_and_gradients_on_a_gpu_equal_plain_loops(case):
    *shape, of_input, of_kernel = case
    input, kernel, grad_output = on_gpu(*case)
    results = to_cpu(*compute(input, kernel, grad_output, shape[3]))
    dtypes = torch.promote_types(of_input, of_kernel), of_input, of_kernel
    check(results, *to_cpu(input, kernel, grad_output), shape[3], dtypes)


@needs_gpu
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_repeated_run_on_a_gpu_gives_the_same_bits(stride, dtype):
    operands = on_gpu(64, 4, 7, stride, 28, 28, dtype, dtype)
    first = compute(*operands, stride)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, compute(*operands, stride)))


@needs_gpu
@pytest.mark.parametrize("stride", [1, 2])
def test_the_generic_way_on_a_gpu_gives_the_same(stride):
    input, kernel, grad_output = on_gpu(64, 4, 7, stride, 28, 28)
    results = compute(input, kernel, grad_output, stride)
    operands = input.detach(), kernel.detach()
    generic = involution._generic_forward(*operands, stride)
    expected = generic, *involution._generic_backward(grad_output, *operands, stride)
    for value, reference in zip(results, expected):
        assert (value - reference).norm() < TOLERANCE[FLOAT] * reference.norm()


@needs_gpu
def test_layers_on_a_gpu_under_autocast():
    layer, features = Involution2d(32, 7, 2).cuda(), torch.randn(2, 32, 13, 14, device="cuda", requires_grad=True)
    kept = []
    layer.expand.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.autocast("cuda", dtype=BFLOAT):
        output = layer(features)
    kernel = kept[0].unflatten(1, (2, -1))
    assert output.dtype == FLOAT and kernel.dtype == BFLOAT
    expected, _, _ = loops(*to_cpu(features, kernel, output), 2)
    assert (output.cpu() - expected).norm() < TOLERANCE[FLOAT] * expected.norm()
    gradients = torch.autograd.grad(output.square().sum(), (features, *layer.parameters()))
    assert all(gradient.isfinite().all() and gradient.dtype == FLOAT for gradient in gradients)


@needs_gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_on_a_gpu(memory_format):
    input, kernel, grad_output = on_gpu(6, 2, 3, 1, 9, 7)
    expected = compute(input, kernel, grad_output, 1)
    input = input.detach().contiguous(memory_format=memory_format).requires_grad_()
    results = compute(input, kernel, grad_output.contiguous(memory_format=memory_format), 1)
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


@needs_gpu
def test_an_empty_batch_on_a_gpu_stays_empty():
    input, kernel = (t.detach().cuda().requires_grad_() for t in random_inputs(8, 2, 3, 2, 5, 6, batch=0))
    output = involution2d(input, kernel, 2)
    output.sum().backward()
    assert output.shape == (0, 8, 3, 3) and input.grad.shape == input.shape and kernel.grad.shape == kernel.shape


@needs_gpu
def test_more_samples_than_a_dimension_of_a_grid_may_have():
    input, kernel = torch.randn(70_000, 1, 1, 2, device="cuda"), torch.randn(70_000, 1, 9, 1, 2, device="cuda")
    expected = involution._generic_forward(input, kernel, 1)
    assert (involution2d(input, kernel) - expected).norm() < TOLERANCE[FLOAT] * expected.norm()


@needs_gpu
def test_operands_on_two_devices_are_named():
    with pytest.raises(ValueError, match="input is on cuda:0 and kernel on cpu"):
        involution2d(torch.zeros(1, 2, 3, 3, device="cuda:0"), torch.zeros(1, 1, 9, 3, 3))


@needs_gpu
@pytest.mark.parametrize("stride", [1, 2])
def test_the_operator_on_a_gpu_keeps_to_the_rules_of_custom_operators(stride):
    input, kernel, _ = on_gpu(4, 2, 3, stride, 9, 8)
    torch.library.opcheck(_involution, (input, kernel, stride))


if __name__ == "__main__":
    interpret()
