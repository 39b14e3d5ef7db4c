"""Registers both model families with transformers' Auto classes, without importing them before they are needed.

The Auto classes' own modules load torch, which takes seconds; `import transformers` does not load them, so neither may
`import hf_ibdistill`. Each registration therefore waits until the module it writes to has been imported.
"""

import importlib
import importlib.abc
import sys
import threading
from functools import partial


_FAMILIES = ("ibresnet", "ibvit")


def _import_families(kind):
    for family in _FAMILIES:
        importlib.import_module(f"hf_ibdistill.models.{kind}_{family}")


def _register_configuration(module):
    from transformers import AutoConfig

    config = _config_class(module)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    # What is saved carries its own code, so that a published model loads where this package is not installed.
    config.register_for_auto_class()


def _register_image_processor(_):
    from transformers import AutoImageProcessor, ViTImageProcessor

    for family in _FAMILIES:
        module = importlib.import_module(f"hf_ibdistill.models.configuration_{family}")
        AutoImageProcessor.register(
            _config_class(module), image_processor_classes={"torchvision": ViTImageProcessor}, exist_ok=True
        )


def _register_model(module):
    from transformers import AutoModel, AutoModelForImageClassification

    for name in module.__all__:
        model = getattr(module, name)
        if name.endswith("ForImageClassification"):
            AutoModelForImageClassification.register(model.config_class, model, exist_ok=True)
            model.register_for_auto_class("AutoModelForImageClassification")
        elif name.endswith("Model") and not name.endswith("PreTrainedModel"):
            AutoModel.register(model.config_class, model, exist_ok=True)
            model.register_for_auto_class("AutoModel")


def _config_class(configuration_module):
    (name,) = configuration_module.__all__
    return getattr(configuration_module, name)


# Ours register themselves after they are imported, whoever asks first; transformers' own only make sure that they are.
_AFTER_IMPORT = {
    "transformers.models.auto.configuration_auto": lambda _: _import_families("configuration"),
    "transformers.models.auto.modeling_auto": lambda _: _import_families("modeling"),
    "transformers.models.auto.image_processing_auto": _register_image_processor,
    **{f"hf_ibdistill.models.configuration_{family}": _register_configuration for family in _FAMILIES},
    **{f"hf_ibdistill.models.modeling_{family}": _register_model for family in _FAMILIES},
}


class _Imports(threading.local):
    """The imports under way in a thread: how many are nested in each other, and what to do after the outermost."""

    def __init__(self):
        self.depth, self.due = 0, []


class _AfterImport(importlib.abc.MetaPathFinder):
    """Acts after the imports of `_AFTER_IMPORT`, once nothing of transformers is half loaded any more: every model of
    transformers imports the Auto classes on its way, and our models import some of those."""

    def __init__(self):
        self._imports = _Imports()

    def find_spec(self, fullname, path, target=None):
        if fullname not in _AFTER_IMPORT and not fullname.startswith("transformers."):
            return None
        # Those before it have been asked; it may be there twice, if the package was reloaded.
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in later)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_act(module):
                imports = self._imports
                imports.depth += 1
                try:
                    execute(module)
                    if fullname in _AFTER_IMPORT:
                        imports.due.append(partial(_AFTER_IMPORT.pop(fullname), module))
                finally:
                    imports.depth -= 1
                    while imports.due and imports.depth == 0:
                        imports.due.pop(0)()

            spec.loader.exec_module = execute_then_act
        return spec


def register_auto_classes() -> None:
    """Let `AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and `AutoImageProcessor` know both families, now
    or as soon as the Auto classes are imported."""
    sys.meta_path.insert(0, _AfterImport())
    for name in [name for name in _AFTER_IMPORT if name in sys.modules]:
        _AFTER_IMPORT.pop(name)(sys.modules[name])
