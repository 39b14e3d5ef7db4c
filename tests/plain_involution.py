"""Involution as plain loops, and random operands for it."""

import torch


# Half a unit in the last place, relative: what one rounding to this type may change.
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def loops(input, kernel, grad_output, stride):
    """Equation 4 of arXiv 2103.06255 and its two derivatives by the product rule, one position and one kernel weight
    at a time, in float64 and without autograd: (output, grad_input, grad_kernel)."""
    input, kernel, grad_output = input.double(), kernel.double(), grad_output.double()
    _, channels, height, width = input.shape
    groups, taps, out_height, out_width = kernel.shape[1:]
    kernel_size = int(taps**0.5)
    channels_of_group = channels // groups
    output, grad_input, grad_kernel = torch.zeros_like(grad_output), torch.zeros_like(input), torch.zeros_like(kernel)
    for i in range(out_height):
        for j in range(out_width):
            for u in range(kernel_size):
                for v in range(kernel_size):
                    y, x = i * stride + u - kernel_size // 2, j * stride + v - kernel_size // 2
                    if not (0 <= y < height and 0 <= x < width):
                        continue  # zero padding adds nothing, and no gradient flows to it
                    tap = u * kernel_size + v
                    weight = kernel[:, :, tap, i, j].repeat_interleave(channels_of_group, dim=1)
                    output[:, :, i, j] += weight * input[:, :, y, x]
                    grad_input[:, :, y, x] += weight * grad_output[:, :, i, j]
                    product = grad_output[:, :, i, j] * input[:, :, y, x]
                    grad_kernel[:, :, tap, i, j] = product.unflatten(1, (groups, channels_of_group)).sum(2)
    return output, grad_input, grad_kernel


def random_inputs(channels, groups, kernel_size, stride, height, width, batch=2, dtypes=(torch.float32,) * 2):
    out_height, out_width = (height + stride - 1) // stride, (width + stride - 1) // stride
    input = torch.randn(batch, channels, height, width).to(dtypes[0])
    kernel = torch.randn(batch, groups, kernel_size**2, out_height, out_width).to(dtypes[1])
    return input.requires_grad_(), kernel.requires_grad_()
