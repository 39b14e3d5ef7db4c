"""Involution, the operator of "Involution: Inverting the Inherence of Convolution for Visual Recognition"
(arXiv 2103.06255): a K×K kernel of its own at every position, shared by the channels of a group.

`involution2d` is the operator alone. `Involution2d` is the layer, which generates the kernels and applies them.

The published formulation unfolds the input into K² copies before it multiplies. Here nothing is unfolded, and only the
operands are kept for the backward pass. The work is cut into chunks of samples and groups. Their scratch memory has a
constant size (or that of one group of one sample), and stays in the caches of a processor. A chunk is computed in one of
two ways:

- by taps: for each of the K² positions in the kernel, multiply and add a shifted view of the input. Rows are laid out one
  after the other with a margin of zeros between them. So a shift is a change of offset, and each step runs over contiguous
  memory, however small the image is. A stride s splits the input into s² such layouts, one per phase.
- by matrices: an image of few positions is a vector, and the kernels of all its positions are one matrix. Most of the
  matrix lies inside the image, so a batched matrix product wastes little.

On a CUDA device, one kernel for each result does the same without scratch memory (`involution_triton.py`), if Triton is there.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec

import torch
from torch import nn
from torch.compiler import is_exporting


# Floats of scratch memory in a chunk. On a CPU, they are enough to hide the cost of starting an operation, and few enough to
# stay in the caches. An accelerator is fastest with few large operations.
_CHUNK_FLOATS = {"cpu": 2**20}
_CHUNK_FLOATS_ELSEWHERE = 2**28


def involution2d(input: torch.Tensor, kernel: torch.Tensor, stride: int = 1) -> torch.Tensor:
    r"""Apply a kernel of its own at each position (arXiv 2103.06255, equation 4).

        output[n, c, i, j] = Σ_{u,v} kernel[n, g(c), u·K + v, i, j] · input[n, c, i·stride + u − ⌊K/2⌋, j·stride + v − ⌊K/2⌋]

    with zeros outside the input. The sum runs in float32, or in float64 if an input has this type. So the result under bf16 or
    fp16 autocast differs from that in float32 by the rounding of inputs and output only. There are first derivatives only.

    `torch.compile` takes it as one opaque operator, which breaks no graph and needs no compilation. `torch.export`, and so
    ONNX, gets operators of PyTorch instead, so that an exported model runs without this package.

    Args:
        input: (N, C, H, W).
        kernel: (N, G, K·K, ⌈H/stride⌉, ⌈W/stride⌉), K odd, G groups dividing C. Channel c belongs to group ⌊c·G/C⌋.
        stride: distance between the positions at which the kernel is applied.

    Returns:
        (N, C, ⌈H/stride⌉, ⌈W/stride⌉), in the wider of the two input types.

    Raises:
        ValueError: the shapes do not fit together.
    """
    return _exported_involution(input, kernel, stride) if is_exporting() else _involution(input, kernel, stride)


def _check_shapes(input, kernel, stride):
    if input.dim() != 4 or kernel.dim() != 5:
        raise ValueError(
            f"input has the shape {tuple(input.shape)} and kernel {tuple(kernel.shape)}. Give (N, C, H, W) and "
            "(N, G, K·K, H/stride, W/stride)."
        )
    batch, channels, height, width = input.shape
    groups, taps = kernel.shape[1], kernel.shape[2]
    if math.isqrt(taps) ** 2 != taps or taps % 2 == 0:
        raise ValueError(f"The third dimension of the kernel is {taps}. It must be K·K with an odd K.")
    if channels % groups != 0:
        raise ValueError(f"The kernel has {groups} groups, which do not divide the {channels} channels of the input.")
    expected = (batch, groups, taps, -(-height // stride), -(-width // stride))
    if tuple(kernel.shape) != expected:
        raise ValueError(
            f"kernel has the shape {tuple(kernel.shape)}. For an input {tuple(input.shape)} and stride={stride} it must be "
            f"{expected}."
        )


@torch.library.custom_op("hf_ibdistill::involution2d", mutates_args=())
def _involution(input: torch.Tensor, kernel: torch.Tensor, stride: int) -> torch.Tensor:
    # Checked here, because torch.compile does not look inside an operator: every check outside would be a guard.
    _check_shapes(input, kernel, stride)
    return _generic_forward(input, kernel, stride)


@torch.library.custom_op("hf_ibdistill::involution2d_backward", mutates_args=())
def _involution_backward(
    grad_output: torch.Tensor, input: torch.Tensor, kernel: torch.Tensor, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _generic_backward(grad_output, input, kernel, stride)


def _generic_forward(input, kernel, stride):
    batch, groups, taps, *size = kernel.shape
    dtype = torch.promote_types(input.dtype, kernel.dtype)
    way = _way(*input.shape[2:], math.isqrt(taps), stride, input.device, dtype)
    output = input.new_empty((batch * groups, input.shape[1] // groups, *size), dtype=dtype)
    inputs, kernels = _group(input, groups), kernel.flatten(0, 1)
    with torch.autocast(input.device.type, enabled=False):
        for chunk in _chunks(inputs, taps, way):
            output[chunk] = way.forward(inputs[chunk], kernels[chunk])
    return output.view(input.shape[:2] + output.shape[2:])


def _generic_backward(grad_output, input, kernel, stride):
    groups, taps = kernel.shape[1:3]
    way = _way(*input.shape[2:], math.isqrt(taps), stride, input.device, grad_output.dtype)
    inputs, kernels, grads = _group(input, groups), kernel.flatten(0, 1), _group(grad_output, groups)
    grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    grad_kernels = torch.empty_like(kernels, memory_format=torch.contiguous_format)
    with torch.autocast(input.device.type, enabled=False):
        for chunk in _chunks(inputs, taps, way):
            grad_inputs[chunk], grad_kernels[chunk] = way.backward(grads[chunk], inputs[chunk], kernels[chunk])
    return grad_inputs.view(input.shape), grad_kernels.view(kernel.shape)


if find_spec("triton"):

    @_involution.register_kernel("cuda")
    def _(input, kernel, stride):
        _check_shapes(input, kernel, stride)
        if not _runs_triton(input, kernel):
            return _generic_forward(input, kernel, stride)
        from .involution_triton import forward

        with torch.cuda.device(input.device):
            return forward(input, kernel, stride)

    @_involution_backward.register_kernel("cuda")
    def _(grad_output, input, kernel, stride):
        if not _runs_triton(input, kernel):
            return _generic_backward(grad_output, input, kernel, stride)
        from .involution_triton import backward

        with torch.cuda.device(input.device):
            return backward(grad_output, input, kernel, stride)


def _runs_triton(input, kernel):
    if input.device != kernel.device:
        raise ValueError(f"input is on {input.device} and kernel on {kernel.device}. Move them to one device.")
    # Within a plane of an image, the kernels count in 32 bits.
    return math.prod(input.shape[2:]) < 2**30 and _has_triton(input.device)


@lru_cache
def _has_triton(device):
    """Whether Triton can start kernels on a device. If not, the reason is a warning, since the generic way is slow."""
    # Imported at the first call, because most machines that import this package have no GPU. transformers does not require
    # what remote code imports in a `try`.
    try:
        import triton

        with torch.cuda.device(device):
            # Builds a library, for which some machines lack a compiler or the headers of Python.
            triton.runtime.driver.active.get_current_device()
    except Exception as error:
        warnings.warn(f"involution2d on {device} runs without Triton, so it is slow: {error!r}", stacklevel=2)
        return False
    # Triton does not support older GPUs.
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@_involution.register_fake
def _(input, kernel, stride):
    dtype = torch.promote_types(input.dtype, kernel.dtype)
    return input.new_empty((*input.shape[:2], *kernel.shape[3:]), dtype=dtype)


@_involution_backward.register_fake
def _(grad_output, input, kernel, stride):
    return input.new_empty(input.shape), kernel.new_empty(kernel.shape)


def _keep_operands(ctx, inputs, output):
    input, kernel, ctx.stride = inputs
    ctx.save_for_backward(input, kernel)


def _backward(ctx, grad_output):
    return *_involution_backward(grad_output, *ctx.saved_tensors, ctx.stride), None


_involution.register_autograd(_backward, setup_context=_keep_operands)


def _group(tensor, groups):
    """(N, C, H, W) → (N·G, C/G, H, W)."""
    return tensor.unflatten(1, (groups, tensor.shape[1] // groups)).flatten(0, 1)


def _chunks(inputs, taps, way):
    """Slices of the samples and groups that are computed together."""
    floats = way.positions * ((1 + way.stride**2) * inputs.shape[1] + taps)
    budget = _CHUNK_FLOATS.get(inputs.device.type, _CHUNK_FLOATS_ELSEWHERE)
    size = max(1, budget // floats)
    return [slice(start, start + size) for start in range(0, len(inputs), size)]


@lru_cache(maxsize=256)
def _way(height, width, kernel_size, stride, device, dtype):
    # The measured size from which the taps are faster. A stride costs them more than it costs the matrices.
    is_small = height * width <= (5 * stride - 2) * kernel_size**2
    dtype = torch.promote_types(dtype, torch.float32)
    return (_Matrices if is_small else _Taps)(height, width, kernel_size, stride, device, dtype)


@dataclass(frozen=True)
class _Geometry:
    height: int
    width: int
    kernel_size: int
    stride: int
    device: torch.device
    dtype: torch.dtype  # of the sums

    @property
    def out_height(self):
        return -(-self.height // self.stride)

    @property
    def out_width(self):
        return -(-self.width // self.stride)


class _Matrices(_Geometry):
    """out (B, C, P_out) = input (B, C, P_in) · matrix (B, P_in, P_out), whose elements are those of the kernels."""

    @property
    def positions(self):
        return self.height * self.width

    @cached_property
    def _tap_and_position(self):
        """For each element of the matrix, its index in a kernel (K·K, P_out); K·K·P_out means none. And for each element of
        a kernel, its index in the matrix; P_in·P_out means none."""
        margin, size = self.kernel_size // 2, self.kernel_size
        sizes = (self.height, self.width, self.out_height, self.out_width)
        rows, columns, out_rows, out_columns = (torch.arange(n, device=self.device) for n in sizes)
        u = (rows[:, None, None, None] + margin) - self.stride * out_rows[:, None]
        v = (columns[:, None, None] + margin) - self.stride * out_columns
        is_inside = (u >= 0) & (u < size) & (v >= 0) & (v < size)
        positions = out_rows[:, None] * self.out_width + out_columns
        num_positions = positions.numel()
        num_elements = size**2 * num_positions
        of_kernel = torch.where(is_inside, (u * size + v) * num_positions + positions, num_elements).flatten()
        of_matrix = torch.full((num_elements + 1,), len(of_kernel), device=self.device)
        of_matrix[of_kernel] = torch.arange(len(of_kernel), device=self.device)
        return of_kernel, of_matrix[:-1]

    def _pick(self, elements, indices):
        return nn.functional.pad(elements.flatten(1).to(self.dtype), (0, 1)).index_select(1, indices)

    def _matrix(self, kernel):
        return self._pick(kernel, self._tap_and_position[0]).unflatten(1, (self.height * self.width, -1))

    def forward(self, input, kernel):
        return (input.flatten(2).to(self.dtype) @ self._matrix(kernel)).unflatten(2, (self.out_height, -1))

    def backward(self, grad_output, input, kernel):
        grad_output = grad_output.flatten(2).to(self.dtype)
        grad_input = grad_output @ self._matrix(kernel).transpose(1, 2)
        grad_matrix = input.flatten(2).to(self.dtype).transpose(1, 2) @ grad_output
        return grad_input.view(input.shape), self._pick(grad_matrix, self._tap_and_position[1]).view(kernel.shape)


class _Taps(_Geometry):
    """Rows one after the other, with margins of zeros. Position (i, j) of the output is at i · `row` + j. The input that tap
    (u, v) multiplies for it is further on by an offset that depends on (u, v) alone."""

    @cached_property
    def row(self):
        # At stride 1, the margin at the end of a row is the one at the beginning of the next as well.
        return self.out_width + (self.kernel_size - 1) // self.stride - self._shared

    @cached_property
    def _shared(self):
        return self.kernel_size // 2 if self.stride == 1 else 0

    @property
    def _rows(self):
        return self.out_height + (self.kernel_size - 1) // self.stride

    @cached_property
    def positions(self):
        return (self.out_height - 1) * self.row + self.out_width

    @cached_property
    def _offsets(self):
        """The phase of the input and the offset in it that each tap reads."""
        s = self.stride
        taps = [(u, v) for u in range(self.kernel_size) for v in range(self.kernel_size)]
        return [(u % s * s + v % s, u // s * self.row + v // s) for u, v in taps]

    def _phases(self, image, layout):
        """For each phase, the part of an image and its place in the layout."""
        margin, s = self.kernel_size // 2, self.stride
        grid = layout[..., : self._rows * self.row].unflatten(-1, (self._rows, self.row))
        for phase in range(s * s):
            # The first row and column of the image that belong to this phase.
            top, left = (phase // s - margin) % s, (phase % s - margin) % s
            row, column = (top + margin) // s, (left + margin) // s
            # A large stride does not reach the last rows and columns of the image.
            part = image[..., top::s, left::s][..., : self._rows - row, : self.row - column]
            yield part, grid[:, :, phase, row : row + part.shape[-2], column : column + part.shape[-1]]

    def _lay_out(self, image):
        layout = image.new_zeros(
            (*image.shape[:2], self.stride**2, self._rows * self.row + self._shared), dtype=self.dtype
        )
        for part, place in self._phases(image, layout):
            place.copy_(part)
        return layout

    def _spread(self, values):
        """(B, ·, out_height, out_width) → (B, ·, positions), zero where no output is."""
        spread = values.new_zeros((*values.shape[:3], self.row), dtype=self.dtype)
        spread[..., : self.out_width] = values
        return spread.flatten(2)[..., : self.positions]

    def _gather(self, values):
        """The inverse of `_spread`, of (B, ·, out_height · row)."""
        return values.unflatten(-1, (self.out_height, self.row))[..., : self.out_width]

    def forward(self, input, kernel):
        layout, kernel = self._lay_out(input), self._spread(kernel)
        output = layout.new_zeros((*input.shape[:2], self.out_height * self.row))
        total = output[..., : self.positions]
        for tap, (phase, offset) in enumerate(self._offsets):
            total.addcmul_(layout[:, :, phase, offset : offset + self.positions], kernel[:, tap, None])
        return self._gather(output)

    def backward(self, grad_output, input, kernel):
        layout, spread_kernel, grad_output = self._lay_out(input), self._spread(kernel), self._spread(grad_output)
        grad_layout = torch.zeros_like(layout)
        for tap, (phase, offset) in enumerate(self._offsets):
            grad_layout[:, :, phase, offset : offset + self.positions].addcmul_(
                grad_output, spread_kernel[:, tap, None]
            )
        grad_input = torch.zeros_like(input)
        for part, place in self._phases(grad_input, grad_layout):
            part.copy_(place)

        grad_kernel = layout.new_zeros((*kernel.shape[:2], self.out_height * self.row))
        totals = grad_kernel[..., : self.positions].unflatten(1, (self.kernel_size, self.kernel_size))
        for phase in range(self.stride**2):
            of_phase = totals[:, phase // self.stride :: self.stride, phase % self.stride :: self.stride]
            for channel in range(input.shape[1]):
                # All taps of the phase at once, as overlapping views of the layout.
                shifted = layout[:, channel, phase].as_strided(of_phase.shape, (layout.stride(0), self.row, 1, 1))
                of_phase.addcmul_(shifted, grad_output[:, channel, None, None])
        return grad_input, self._gather(grad_kernel)


def _exported_involution(input, kernel, stride):
    _check_shapes(input, kernel, stride)
    groups, taps, out_height, out_width = kernel.shape[1:]
    size = math.isqrt(taps)
    dtype = torch.promote_types(input.dtype, kernel.dtype)
    of_sum = torch.promote_types(dtype, torch.float32)
    padded = nn.functional.pad(input.to(of_sum), [size // 2] * 4)
    # All vertical shifts at once, the horizontal ones in turn. Every shift in turn would make a graph that takes minutes to
    # export. All shifts at once would unfold the input.
    tap, position = (torch.arange(n, device=input.device) for n in (size, out_height))
    rows = (tap[:, None] + stride * position).flatten()
    shifted = padded.index_select(2, rows).unflatten(2, (size, out_height))
    shifted, kernels = shifted.unflatten(1, (groups, -1)), kernel.to(of_sum).unflatten(2, (size, size)).unsqueeze(2)
    columns = [shifted[..., v : v + (out_width - 1) * stride + 1 : stride] for v in range(size)]
    output = sum((column * kernels[..., v, :, :]).sum(3) for v, column in enumerate(columns))
    return output.flatten(1, 2).to(dtype)


class Involution2d(nn.Module):
    """Involution whose kernel is generated from the features at its position (arXiv 2103.06255, section 3.1).

    1×1 reduction, norm, ReLU, 1×1 expansion to K·K weights per group. With a stride above 1, the features are average-pooled
    first. (N, C, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉).

    Args:
        channels: C; a multiple of `group_channels`.
        kernel_size: K, odd.
        stride: downsampling factor.
        group_channels: channels that share one kernel.
        reduction: the 1×1 reduction leaves C / reduction channels.
        norm: builds the normalization of the reduced features from their number of channels.

    Raises:
        ValueError: `kernel_size` is even, or `channels` does not fit `group_channels` or `reduction`.
    """

    def __init__(self, channels, kernel_size, stride=1, group_channels=16, reduction=4, norm=nn.BatchNorm2d):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even. Choose an odd size, so that a kernel has a middle.")
        if channels % group_channels != 0 or channels < reduction:
            raise ValueError(
                f"channels={channels} must be a multiple of group_channels={group_channels}, and at least "
                f"reduction={reduction}."
            )
        self.stride = stride
        self.groups = channels // group_channels
        # For odd sizes, ceil_mode gives as many positions as a padded convolution of the same stride.
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.reduce = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.norm = norm(channels // reduction)
        self.activation = nn.ReLU()
        self.expand = nn.Conv2d(channels // reduction, kernel_size**2 * self.groups, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kernel = self.expand(self.activation(self.norm(self.reduce(self.pool(hidden_states)))))
        return involution2d(hidden_states, kernel.unflatten(1, (self.groups, -1)), self.stride)
