"""The models that `from_pretrained` loads, registered with the Auto classes of transformers.

These files import only torch, transformers and each other, so that a Hub repository can carry them as remote code. On a
GPU, they use Triton if it is there.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from .configuration_ibresnet import IBResNetConfig
from .configuration_ibvit import IBViTConfig
from .modeling_ibresnet import IBResNetForImageClassification
from .modeling_ibvit import IBViTForImageClassification, IBViTModel


# Both backends must be registered: transformers looks for a processor's name among the registered classes first.
_PROCESSORS = {"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}

for config in (IBResNetConfig, IBViTConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoImageProcessor.register(config, image_processor_classes=dict(_PROCESSORS), exist_ok=True)
    # Saved models carry their code, so that they load without this package.
    config.register_for_auto_class()

for model in (IBResNetForImageClassification, IBViTForImageClassification):
    AutoModelForImageClassification.register(model.config_class, model, exist_ok=True)
    model.register_for_auto_class("AutoModelForImageClassification")

AutoModel.register(IBViTConfig, IBViTModel, exist_ok=True)
IBViTModel.register_for_auto_class("AutoModel")
