"""Forward passes in parts."""

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_ibdistill import passes
from hf_ibdistill.passes import run_in_parts
from hf_ibdistill.teachers import load_teachers


class Widening(nn.Module):
    """Its largest output has 8 channels, in a tuple: 8 × 6 × 6 numbers an image."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 2, 3, padding=1), nn.Identity()

    def forward(self, pixel_values):
        return self.wide((self.narrow(pixel_values).repeat(1, 4, 1, 1),))


def run(model, pixels, sizes):
    seen = []

    def count(part):
        seen.append(len(part))
        return model(part)[0]

    is_known = tuple(pixels.shape[1:]) in sizes
    outputs = torch.cat(run_in_parts(count, model, pixels, sizes))
    torch.testing.assert_close(outputs, model(pixels)[0])
    # One image is measured first, and nothing depends on that.
    assert is_known or len(pixels) == 1 or seen[0] == 1
    assert torch.equal(outputs, torch.cat(run_in_parts(lambda part: model(part)[0], model, pixels, sizes)))
    # Nothing is left that would measure every later pass.
    assert not any(module._forward_hooks for module in model.modules())
    return seen


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_largest_output_decides(monkeypatch, dtype, size):
    model, pixels, sizes = Widening().to(dtype), torch.randn(16, 3, 6, 6, dtype=dtype), {}
    monkeypatch.setattr(passes, "_LARGEST_OUTPUT", 8 * 6 * 6 * size * 7 + 1)
    assert run(model, pixels, sizes) == [1, 7, 7, 2]
    assert run(model, pixels, sizes) == [7, 7, 2]
    # Images of another size: 8 × 3 × 6 numbers.
    assert run(model, pixels[:, :, :3], sizes) == [1, 14, 2]


def test_every_thread_has_an_image(monkeypatch):
    monkeypatch.setattr(passes, "_LARGEST_OUTPUT", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert run(Widening(), torch.randn(8, 3, 6, 6), {}) == [1, 3, 3, 2]
    assert run(Widening(), torch.randn(1, 3, 6, 6), {}) == [1]


def test_a_failing_model_loses_the_hooks_too():
    model = Widening()
    with pytest.raises(RuntimeError):
        run_in_parts(model, model, torch.randn(2, 5, 6, 6), {})
    assert not any(module._forward_hooks for module in model.modules())


def test_a_teacher_in_parts_predicts_what_it_does_at_once(monkeypatch):
    config = ResNetConfig(
        layer_type="basic", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3,
        downsample_in_first_stage=True,
    )  # fmt: skip
    model, pixels, sizes = ResNetForImageClassification(config).eval(), torch.randn(11, 3, 8, 8), []
    with torch.no_grad():
        expected = model(pixels).logits
    model.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs.logits)))
    (teacher,) = load_teachers({"conv": (model, ViTImageProcessor())})
    # The first convolution's output is the largest: 8 × 4 × 4 numbers an image.
    monkeypatch.setattr(passes, "_LARGEST_OUTPUT", 4 * 8 * 4 * 4 * 4)
    for _ in range(2):
        torch.testing.assert_close(teacher.logits(pixels), expected)
    assert sizes == [1, 4, 4, 3, 4, 4, 3]
