"""Involution, the operator of "Involution: Inverting the Inherence of Convolution for Visual Recognition"
(arXiv 2103.06255): a K×K kernel of its own at every position, shared by the channels of a group.

`involution2d` is the operator alone, `Involution2d` the layer that also generates the kernels. The usual formulation
unfolds the input into K² copies before it multiplies; here the K² shifted views of the padded input are read one after
the other, forward and backward, so that memory does not grow with K².
"""

import torch
from torch import nn


def involution2d(input: torch.Tensor, kernel: torch.Tensor, stride: int = 1) -> torch.Tensor:
    r"""Apply a kernel of its own at each position (arXiv 2103.06255, equation 4).

        output[n, c, i, j] = Σ_{u,v} kernel[n, g(c), u·K + v, i, j] · input[n, c, i·stride + u − ⌊K/2⌋, j·stride + v − ⌊K/2⌋]

    with zeros outside the input. The sum runs in float32 whatever the inputs are, so the result under bf16 or fp16
    autocast differs from the float32 one by the rounding of inputs and output only. First derivatives only.

    Args:
        input: (N, C, H, W).
        kernel: (N, G, K·K, ⌈H/stride⌉, ⌈W/stride⌉), K odd, G groups dividing C. Channel c belongs to group ⌊c·G/C⌋.
        stride: distance between the positions at which the kernel is applied.

    Returns:
        (N, C, ⌈H/stride⌉, ⌈W/stride⌉), in the wider of the two input types.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if input.dim() != 4 or kernel.dim() != 5:
        raise ValueError(
            f"involution2d takes an input (N, C, H, W) and a kernel (N, G, K·K, H/stride, W/stride); "
            f"got {tuple(input.shape)} and {tuple(kernel.shape)}."
        )
    batch, channels, height, width = input.shape
    groups, taps = kernel.shape[1], kernel.shape[2]
    kernel_size = round(taps**0.5)
    if kernel_size**2 != taps or kernel_size % 2 == 0:
        raise ValueError(f"The kernel's third dimension is K·K with K odd; got {taps}.")
    if channels % groups != 0:
        raise ValueError(f"The number of groups must divide the number of channels; got {groups} and {channels}.")
    expected = (batch, groups, taps, -(-height // stride), -(-width // stride))
    if tuple(kernel.shape) != expected:
        raise ValueError(
            f"For an input {tuple(input.shape)} and stride {stride} the kernel must be {expected}; "
            f"got {tuple(kernel.shape)}."
        )
    return _Involution2d.apply(input, kernel, kernel_size, stride)


def _pad_and_group(input, groups, kernel_size):
    """(N, C, H, W) → zero-padded (N, G, C/G, H + K − 1, W + K − 1)."""
    return nn.functional.pad(input, [kernel_size // 2] * 4).unflatten(1, (groups, -1))


def _shift(padded, tap, kernel_size, stride, height, width):
    """The view of the padded input that tap number `tap` of the kernel meets: (N, G, C/G, height, width)."""
    top, left = divmod(tap, kernel_size)
    return padded[..., top : top + stride * height : stride, left : left + stride * width : stride]


class _Involution2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, kernel, kernel_size, stride):
        ctx.save_for_backward(input, kernel)
        ctx.kernel_size, ctx.stride = kernel_size, stride
        batch, groups, taps, height, width = kernel.shape
        padded = _pad_and_group(input, groups, kernel_size)
        output = padded.new_zeros((*padded.shape[:3], height, width), dtype=torch.float32)
        for tap in range(taps):
            output.addcmul_(_shift(padded, tap, kernel_size, stride, height, width), kernel[:, :, None, tap])
        return output.flatten(1, 2).to(torch.promote_types(input.dtype, kernel.dtype))

    @staticmethod
    def backward(ctx, grad_output):
        input, kernel = ctx.saved_tensors
        kernel_size, stride = ctx.kernel_size, ctx.stride
        batch, groups, taps, height, width = kernel.shape
        padded = _pad_and_group(input, groups, kernel_size)
        grad_output = grad_output.unflatten(1, (groups, -1))
        needs_input, needs_kernel = ctx.needs_input_grad[:2]
        grad_padded = torch.zeros_like(padded, dtype=torch.float32) if needs_input else None
        grad_kernel = torch.empty_like(kernel) if needs_kernel else None
        for tap in range(taps):
            if needs_input:
                _shift(grad_padded, tap, kernel_size, stride, height, width).addcmul_(
                    grad_output, kernel[:, :, None, tap]
                )
            if needs_kernel:
                shifted = _shift(padded, tap, kernel_size, stride, height, width)
                grad_kernel[:, :, tap] = (grad_output.float() * shifted).sum(2)
        grad_input = None
        if needs_input:
            margin = kernel_size // 2
            bottom, right = margin + input.shape[2], margin + input.shape[3]
            grad_input = grad_padded[..., margin:bottom, margin:right].flatten(1, 2).to(input.dtype)
        return grad_input, grad_kernel, None, None


class Involution2d(nn.Module):
    """Involution whose kernel is generated from the position's own features (arXiv 2103.06255, section 3.1).

    1×1 reduction, norm, ReLU, 1×1 expansion to K·K weights a group; where the stride is above 1 the features are
    average-pooled first. (N, C, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉).

    Args:
        channels: C; a multiple of `group_channels`.
        kernel_size: K, odd.
        stride: downsampling factor.
        group_channels: channels that share one kernel.
        reduction: the 1×1 reduction leaves C / reduction channels.
        norm: builds the normalisation of the reduced features from their number of channels.
    """

    def __init__(self, channels, kernel_size, stride=1, group_channels=16, reduction=4, norm=nn.BatchNorm2d):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"An involution kernel has an odd size; got {kernel_size}.")
        if channels % group_channels != 0 or channels < reduction:
            raise ValueError(
                f"Involution needs a number of channels that group_channels ({group_channels}) divides and that is at "
                f"least reduction ({reduction}); got {channels}."
            )
        self.stride = stride
        self.groups = channels // group_channels
        # Odd sizes: ceil_mode gives the positions that a padded convolution of the same stride gives.
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.reduce = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.norm = norm(channels // reduction)
        self.activation = nn.ReLU()
        self.expand = nn.Conv2d(channels // reduction, kernel_size**2 * self.groups, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kernel = self.expand(self.activation(self.norm(self.reduce(self.pool(hidden_states)))))
        return involution2d(hidden_states, kernel.unflatten(1, (self.groups, -1)), self.stride)
