"""Involution on a GPU, in Triton. `involution.py` defines the operator, checks its operands and imports this file at the first
call that needs it.

Every kernel gathers: a program writes what nothing else writes, so there are no atomic operations and a repeated run gives the
same bits. A program computes `BLOCK_POSITIONS` neighbors in memory, one for each thread, so that the loads of a warp are
contiguous. It computes `BLOCK_CHANNELS` channels of a group for them, so that a weight is read once for all of these.

The channels of a group lie one after the other in memory. So the images of all samples and groups are numbered through.

Positions come first in a block. Triton gives neighboring threads to the dimension that is contiguous in memory, and to the
first one where it cannot tell, as for shifted positions.
"""

import torch


try:  # transformers does not require what remote code imports in a `try`.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The GPU kernels of involution need Triton: pip install triton") from error


# The channels are in the registers of a thread, and 16 make as many loads independent, which hides their latency. More would
# leave registers for few threads.
_MAX_BLOCK_CHANNELS = 16
# `_grad_kernel` holds a block of gradients beside that, which leaves registers for few channels if it loops over blocks.
_BLOCK_CHANNELS_OF_WIDE_GROUPS = 4
# Threads of a program, whole warps. Large programs share more of what they read, small ones fit small images.
_BLOCKS_OF_POSITIONS = (128, 64, 32)
_WARP = 32
_WASTE = 1 / 8
# Compiled once for all sizes, because no load is wider for a known divisor: the shifts end that.
_SIZES = ["group_channels", "height", "width", "out_height", "out_width", "num_position_blocks"]


def forward(input, kernel, stride):
    """The output of involution."""
    groups, taps, out_height, out_width = kernel.shape[1:]
    dtype = torch.promote_types(input.dtype, kernel.dtype)
    output = input.new_empty((*input.shape[:2], out_height, out_width), dtype=dtype)
    if output.numel() == 0:
        return output
    plan = _Plan(input, kernel, stride, dtype, out_height * out_width)
    plan.launch(_forward, plan.num_channel_blocks, input.contiguous(), kernel.contiguous(), output)
    return output


def backward(grad_output, input, kernel, stride):
    """The gradients of input and kernel."""
    grad_output, input, kernel = grad_output.contiguous(), input.contiguous(), kernel.contiguous()
    if grad_output.numel() == 0:
        return torch.zeros_like(input), torch.zeros_like(kernel)
    grad_input, grad_kernel = torch.empty_like(input), torch.empty_like(kernel)
    plan = _Plan(input, kernel, stride, grad_output.dtype, input.shape[2] * input.shape[3])
    plan.launch(_grad_input, plan.num_channel_blocks, grad_output, kernel, grad_input)
    is_wide = input.shape[1] // kernel.shape[1] > _MAX_BLOCK_CHANNELS
    max_block = _BLOCK_CHANNELS_OF_WIDE_GROUPS if is_wide else _MAX_BLOCK_CHANNELS
    plan = _Plan(input, kernel, stride, grad_output.dtype, kernel.shape[3] * kernel.shape[4], max_block)
    plan.launch(_grad_kernel, 1, grad_output, input, grad_kernel)
    return grad_input, grad_kernel


class _Plan:
    """How one kernel divides its work."""

    def __init__(self, input, kernel, stride, dtype, num_positions, max_block_channels=_MAX_BLOCK_CHANNELS):
        batch, groups, taps, out_height, out_width = kernel.shape
        height, width = input.shape[2:]
        group_channels = input.shape[1] // groups
        self.num_images = batch * groups
        self.sizes = (group_channels, height, width, out_height, out_width)
        self.block_channels = min(max_block_channels, triton.next_power_of_2(group_channels))
        self.num_channel_blocks = triton.cdiv(group_channels, self.block_channels)
        padded = {block: triton.cdiv(num_positions, block) * block for block in _BLOCKS_OF_POSITIONS}
        fitting = [block for block in padded if padded[block] <= (1 + _WASTE) * num_positions]
        self.block_positions = fitting[0] if fitting else min(padded, key=padded.get)
        self.num_position_blocks = padded[self.block_positions] // self.block_positions
        is_double = torch.promote_types(dtype, torch.float32) == torch.float64
        self.constants = {
            "KERNEL_SIZE": round(taps**0.5),
            "STRIDE": stride,
            "SUM": tl.float64 if is_double else tl.float32,
            "IS_WHOLE": group_channels % self.block_channels == 0,
            "NUM_CHANNEL_BLOCKS": self.num_channel_blocks,
            "BLOCK_CHANNELS": self.block_channels,
            "BLOCK_POSITIONS": self.block_positions,
        }

    def launch(self, function, programs_for_channels, *tensors):
        # All in the first dimension of the grid, because the others end at 65535.
        num_programs = self.num_images * programs_for_channels * self.num_position_blocks
        num_warps = self.block_positions // _WARP
        sizes = (*self.sizes, self.num_position_blocks)
        function[(num_programs,)](*tensors, *sizes, **self.constants, num_warps=num_warps)


@triton.jit
def _place(
    num_position_blocks,
    NUM_CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """The image, the channels in it and the positions of this program."""
    # Neighbors share weights: they are read from memory once, and then from the cache.
    program = tl.program_id(0)
    channel = program % NUM_CHANNEL_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    program = program // NUM_CHANNEL_BLOCKS
    position = program % num_position_blocks * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    # All tensors may have more than 2³¹ elements, one plane of an image may not.
    image = (program // num_position_blocks).to(tl.int64)
    return image, channel, position


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    input,
    kernel,
    output,
    group_channels,
    height,
    width,
    out_height,
    out_width,
    num_position_blocks,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    SUM: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    NUM_CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    image, channel, position = _place(num_position_blocks, NUM_CHANNEL_BLOCKS, BLOCK_CHANNELS, BLOCK_POSITIONS)
    num_positions = out_height * out_width
    is_position = position < num_positions
    is_channel = ((channel < group_channels) | IS_WHOLE)[None, :]
    top = position // out_width * STRIDE - KERNEL_SIZE // 2
    left = position % out_width * STRIDE - KERNEL_SIZE // 2
    plane = image * group_channels + channel
    values = input + (plane * (height * width))[None, :]
    weights = kernel + (image * num_positions * (KERNEL_SIZE * KERNEL_SIZE) + position)
    total = tl.zeros((BLOCK_POSITIONS, BLOCK_CHANNELS), dtype=SUM)
    for u in range(KERNEL_SIZE):
        row = top + u
        is_row = is_position & (row >= 0) & (row < height)
        values_of_row = values + (row * width + left)[:, None]
        # Unrolled, so that all loads of a row have one address and constant offsets.
        for v in tl.static_range(KERNEL_SIZE):
            is_inside = is_row & (left + v >= 0) & (left + v < width)
            weight = tl.load(weights, mask=is_inside, other=0.0)
            value = tl.load(values_of_row + v, mask=is_channel & is_inside[:, None], other=0.0)
            total += weight.to(SUM)[:, None] * value.to(SUM)
            weights += num_positions
    outputs = output + ((plane * num_positions)[None, :] + position[:, None])
    tl.store(outputs, total.to(output.dtype.element_ty), mask=is_channel & is_position[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _grad_input(
    grad_output,
    kernel,
    grad_input,
    group_channels,
    height,
    width,
    out_height,
    out_width,
    num_position_blocks,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    SUM: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    NUM_CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    image, channel, position = _place(num_position_blocks, NUM_CHANNEL_BLOCKS, BLOCK_CHANNELS, BLOCK_POSITIONS)
    num_positions = out_height * out_width
    is_position = position < height * width
    is_channel = ((channel < group_channels) | IS_WHOLE)[None, :]
    # Output position i reads this row with tap u if i·stride + u is `row`, so u is known up to multiples of the stride.
    row = position // width + KERNEL_SIZE // 2
    column = position % width + KERNEL_SIZE // 2
    first_u, last_i = row % STRIDE, row // STRIDE
    first_v, last_j = column % STRIDE, column // STRIDE
    plane = image * group_channels + channel
    grads = grad_output + (plane * num_positions)[None, :]
    first_tap = image * (KERNEL_SIZE * KERNEL_SIZE) + (first_u * KERNEL_SIZE + first_v)
    total = tl.zeros((BLOCK_POSITIONS, BLOCK_CHANNELS), dtype=SUM)
    STEPS: tl.constexpr = (KERNEL_SIZE + STRIDE - 1) // STRIDE
    for step in range(STEPS):
        i = last_i - step
        is_row = is_position & (first_u + step * STRIDE < KERNEL_SIZE) & (i >= 0) & (i < out_height)
        place = i * out_width + last_j
        grads_of_row = grads + place[:, None]
        weights = kernel + ((first_tap + step * (STRIDE * KERNEL_SIZE)) * num_positions + place)
        for k in tl.static_range(STEPS):
            j = last_j - k
            is_inside = is_row & (first_v + k * STRIDE < KERNEL_SIZE) & (j >= 0) & (j < out_width)
            weight = tl.load(weights, mask=is_inside, other=0.0)
            grad = tl.load(grads_of_row - k, mask=is_channel & is_inside[:, None], other=0.0)
            total += weight.to(SUM)[:, None] * grad.to(SUM)
            weights += STRIDE * num_positions - 1
    outputs = grad_input + ((plane * (height * width))[None, :] + position[:, None])
    tl.store(outputs, total.to(grad_input.dtype.element_ty), mask=is_channel & is_position[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _grad_kernel(
    grad_output,
    input,
    grad_kernel,
    group_channels,
    height,
    width,
    out_height,
    out_width,
    num_position_blocks,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    SUM: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    NUM_CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    image, channel, position = _place(num_position_blocks, 1, BLOCK_CHANNELS, BLOCK_POSITIONS)
    num_positions = out_height * out_width
    is_position = position < num_positions
    is_channel = ((channel < group_channels) | IS_WHOLE)[None, :]
    top = position // out_width * STRIDE - KERNEL_SIZE // 2
    left = position % out_width * STRIDE - KERNEL_SIZE // 2
    plane = image * group_channels + channel
    values = input + (plane * (height * width))[None, :]
    grads = grad_output + ((plane * num_positions)[None, :] + position[:, None])
    # Most groups are one block of channels, whose gradients stay in registers for all taps.
    grad = tl.load(grads, mask=is_channel & is_position[:, None], other=0.0).to(SUM)
    grad_weights = grad_kernel + (image * num_positions * (KERNEL_SIZE * KERNEL_SIZE) + position)
    for u in range(KERNEL_SIZE):
        row = top + u
        is_row = is_position & (row >= 0) & (row < height)
        values_of_row = values + (row * width + left)[:, None]
        for v in tl.static_range(KERNEL_SIZE):
            is_inside = (is_row & (left + v >= 0) & (left + v < width))[:, None]
            product = grad * tl.load(values_of_row + v, mask=is_channel & is_inside, other=0.0).to(SUM)
            if NUM_CHANNEL_BLOCKS > 1:
                # No `range`, because Triton's interpreter takes only one whose ends are constants.
                further = tl.full((), BLOCK_CHANNELS, tl.int64)
                while further < group_channels:
                    is_further = (channel + further < group_channels)[None, :] & is_inside
                    further_grad = tl.load(grads + further * num_positions, mask=is_further, other=0.0)
                    further_values = values_of_row + further * (height * width)
                    value = tl.load(further_values + v, mask=is_further, other=0.0)
                    product += further_grad.to(SUM) * value.to(SUM)
                    further += BLOCK_CHANNELS
            tl.store(grad_weights, tl.sum(product, axis=1).to(grad_kernel.dtype.element_ty), mask=is_position)
            grad_weights += num_positions
