"""Forward passes without gradients, in parts that a processor is fast at."""

from collections.abc import Callable
from typing import TypeVar

import torch


T = TypeVar("T")

# Bytes. For larger tensors the C library takes new memory from the system in every pass, which costs more than many a layer.
_LARGEST_OUTPUT = 1 << 24


@torch.no_grad()
def run_in_parts(
    run: Callable[[torch.Tensor], T],
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    sizes: dict[tuple[int, ...], int],
) -> list[T]:
    """What `run` returns for the parts of a batch, in their order.

    On a CPU, a part has as many images as keep the largest output of a module within 16 MiB, and at least one for each
    thread. On another device it is the batch.

    Args:
        run: a forward pass of the model.
        model: in evaluation mode. On a CPU, one image runs before the first batch, so that its outputs can be measured.
        pixel_values: (N, channels, H, W), on the device of the model.
        sizes: images of a part, by the shape of an image; filled here, for the next batches.
    """
    if pixel_values.device.type != "cpu":
        return [run(pixel_values)]
    shape = tuple(pixel_values.shape[1:])
    if shape not in sizes:
        result = _measure(run, model, pixel_values[:1], sizes)
        if len(pixel_values) == 1:
            return [result]
    # Always the same parts: an image on its own may be rounded differently, and a resumed training must see the same logits.
    return [run(part) for part in pixel_values.split(sizes[shape])]


def _measure(run, model, image, sizes):
    """Run one image, and note how many of its shape fit into a part."""
    largest = 1

    def look(module, inputs, outputs):
        nonlocal largest
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        result = run(image)
    finally:
        for hook in hooks:
            hook.remove()
    sizes[tuple(image.shape[1:])] = max(_LARGEST_OUTPUT // largest, torch.get_num_threads())
    return result
