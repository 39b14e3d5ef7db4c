"""Teachers of every family that users have: each is opened from its folder, gets the images through its own image
processor, and predicts the same logits as the model called by hand."""

import copy
import json
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import Image, load_from_disk
from running import run
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitConfig,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextV2Config,
    EfficientNetConfig,
    EfficientNetImageProcessor,
    LevitConfig,
    LevitImageProcessor,
    MobileNetV1Config,
    MobileNetV1ImageProcessor,
    MobileNetV2Config,
    MobileNetV2ImageProcessor,
    MobileViTConfig,
    MobileViTImageProcessor,
    RegNetConfig,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.utils.import_utils import BACKENDS_MAPPING

from hf_ibdistill import IBResNetConfig, ViewRecipe, load_image_dataset, load_teachers, record_teacher_logits
from hf_ibdistill.images.preprocessing import pixel_values
from hf_ibdistill.images.views import make_view, row_key
from hf_ibdistill.logits.encoding import LogitsEncoding, describe_column
from hf_ibdistill.logits.provenance import read_records


NAMES = ["cat", "dog", "eel"]
OTHER_ORDER = ["eel", "cat", "dog"]
PIXELS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2]}
CROPPED = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
IBRESNET = {
    "stem": "plain",
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "downsample_strides": [1, 2],
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
TIMM_PIXELS = {"mean": PIXELS["image_mean"], "std": PIXELS["image_std"], "crop_pct": 0.9, "interpolation": "bicubic"}
SMALL_TIMM = {"pretrained_cfg": {"input_size": [3, 64, 64], **TIMM_PIXELS}}

# Configuration and image processor; timm's wrapper keeps its preprocessing in the configuration.
FAMILIES = {
    "resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        ConvNextImageProcessor(size={"shortest_edge": 96}, crop_pct=0.875, **PIXELS),
    ),
    "regnet": (
        RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8),
        ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.95, resample=2, **PIXELS),
    ),
    "convnext": (ConvNextConfig(**STAGES), ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.8)),
    # At 384 pixels and more, this processor squeezes images into a square instead of cropping them.
    "convnextv2": (ConvNextV2Config(**STAGES), ConvNextImageProcessor(size={"shortest_edge": 384}, **PIXELS)),
    "efficientnet": (
        EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320),
        EfficientNetImageProcessor(
            size={"height": 96, "width": 80}, do_center_crop=True, crop_size={"height": 64, "width": 64}, **PIXELS
        ),
    ),
    "mobilenet_v1": (MobileNetV1Config(depth_multiplier=0.25), MobileNetV1ImageProcessor(**CROPPED, **PIXELS)),
    "mobilenet_v2": (MobileNetV2Config(depth_multiplier=0.25), MobileNetV2ImageProcessor(**CROPPED, **PIXELS)),
    # Its image processor orders the channels as blue, green, red.
    "mobilevit": (
        MobileViTConfig(image_size=64, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[8] * 7, num_attention_heads=2),
        MobileViTImageProcessor(**CROPPED),
    ),
    "bit": (
        BitConfig(embedding_size=32, hidden_sizes=[32, 32], depths=[1, 1], num_groups=8),
        BitImageProcessor(**CROPPED, **PIXELS),
    ),
    "levit": (
        LevitConfig(
            architectures=["LevitForImageClassification"],
            image_size=64,
            hidden_sizes=[16] * 3,
            num_attention_heads=[2] * 3,
            depths=[1] * 3,
            key_dim=[8] * 3,
        ),
        LevitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    ),
    "swin": (
        SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
        ViTImageProcessor(size={"height": 32, "width": 32}, **PIXELS),
    ),
    "vit": (
        ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        ViTImageProcessor(size={"height": 32, "width": 32}, **PIXELS),
    ),
    "ibresnet, convolution": (
        IBResNetConfig(spatial_operator="convolution", **IBRESNET),
        ViTImageProcessor(size={"height": 40, "width": 40}),
    ),
    "ibresnet, involution": (
        IBResNetConfig(spatial_operator="involution", **IBRESNET),
        ViTImageProcessor(size={"height": 48, "width": 48}, do_convert_rgb=True),
    ),
    "timm resnet": (TimmWrapperConfig(architecture="test_resnet", **SMALL_TIMM), None),
    "timm efficientnet": (TimmWrapperConfig(architecture="test_efficientnet", **SMALL_TIMM), None),
    "timm vit": (
        TimmWrapperConfig(architecture="test_vit", pretrained_cfg={"input_size": [3, 160, 160], **TIMM_PIXELS}),
        None,
    ),
}


def randomize(model):
    """Weights and batch-norm statistics with which the logits depend on the image, and on the mode of the model."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("weight", "running_var", "layer_scale_parameter")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.1)
    return model


def save_teacher(folder, family, names=NAMES):
    config, processor = FAMILIES[family]
    config = copy.deepcopy(config)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    torch.manual_seed(0)
    randomize(AutoModelForImageClassification.from_config(config)).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def logits_by_hand(folder, images):
    """(images, classes), one image at a time, by nothing but transformers."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return np.stack([model(**processor(image, return_tensors="pt")).logits[0].numpy() for image in images])


def assert_same(found, expected, tolerance=1e-4):
    """Batches may round differently from single images."""
    spread = np.ptp(expected.reshape(-1, len(NAMES)), axis=0).min()
    assert spread > 0.05, "the logits hardly depend on the image, so the comparison would show nothing"
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def column(table, name):
    return np.asarray(table.with_format("numpy")[f"{name}_logits"])


def in_order(logits, names):
    """The logits of these classes, in the order of the dataset."""
    return logits[..., [names.index(name) for name in NAMES]]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A folder of class folders with JPEGs of 224 pixels and more, opened: 9 images to train on, 3 to validate."""
    folder, random = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for i in range(12):
        coarse = PIL.Image.fromarray(random.integers(0, 256, (2, 3, 3), dtype=np.uint8))
        size = [(224, 224), (260, 224), (224, 260)][i // 3 % 3]
        path = folder / NAMES[i % 3] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse.resize(size, PIL.Image.Resampling.BICUBIC).save(path, quality=90)
    return load_image_dataset(folder, validation_fraction=0.25)


def open_images(dataset):
    """The rows' files, opened by PIL."""
    cells = dataset.cast_column("image", Image(decode=False))["image"]
    return [PIL.Image.open(cell["path"]).convert("RGB") for cell in cells]


# Three teachers of three families, three input sizes and two orders of the classes


THREE = {"res": "resnet", "efficient": "efficientnet", "inv": "ibresnet, involution"}


@pytest.fixture(scope="module")
def three_teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {
        name: save_teacher(folder / name, family, OTHER_ORDER if name == "efficient" else NAMES)
        for name, family in THREE.items()
    }


# Of the other two pairs, the families below are recorded in float32 without views, and views in float16 by test_recorder.
@pytest.mark.parametrize(("num_views", "dtype", "tolerance"), [(None, "float16", 1e-3), (3, "float32", 1e-4)])
def test_three_families_over_one_folder_of_jpegs(
    num_views, dtype, tolerance, three_teachers, splits, tmp_path, caplog
):
    recipe = None
    if num_views is not None:
        recipe = ViewRecipe(num_views, crop="resized", horizontal_flip=0.5, photometric_ops=1)
    # Images of several shapes share a batch, and the last one is smaller.
    tables = record_teacher_logits(
        splits, three_teachers, output_dir=tmp_path / "t", views=recipe, dtype=dtype, batch_size=5
    )
    warnings = [record.getMessage() for record in caplog.records if "another order" in record.getMessage()]
    assert len(warnings) == len(splits) and all('"efficient"' in message for message in warnings)

    for split, table in tables.items():
        images = open_images(splits[split])
        assert len({image.size for image in images}) > 1
        views = [images]
        if recipe is not None and split == "train":
            made = [[make_view(image, recipe, row_key(image), view) for image in images] for view in range(num_views)]
            views = [[PIL.Image.fromarray(view.permute(1, 2, 0).numpy()) for view in row] for row in made]
        for name, folder in three_teachers.items():
            expected = np.stack([logits_by_hand(folder, pictures) for pictures in views], axis=1)
            expected = in_order(expected, OTHER_ORDER) if name == "efficient" else expected
            assert describe_column(table.features[f"{name}_logits"])[0] == LogitsEncoding(dtype)
            assert_same(column(table, name).reshape(expected.shape), expected, tolerance)
        described = {teacher["name"]: teacher for teacher in read_records(table)[0]["teachers"]}
        assert {name: tuple(teacher["image_processor"]["size"].values()) for name, teacher in described.items()} == {
            "res": (96,),
            "efficient": (96, 80),
            "inv": (48, 48),
        }
        assert all(teacher["label_names"] == NAMES for teacher in described.values())


# Every family


def record_column(splits, teacher, folder, **options):
    table = record_teacher_logits(
        splits["train"].select(range(4)), {"a": teacher}, output_dir=folder, dtype="float32", **options
    )
    return column(table, "a")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_of_each_family(family, splits, tmp_path):
    folder = save_teacher(tmp_path / "teacher", family, OTHER_ORDER)
    images = open_images(splits["train"].select(range(4)))
    expected = logits_by_hand(folder, images)

    (teacher,) = load_teachers({"a": folder})
    assert type(teacher.model).__module__.startswith(("transformers.models.", "hf_ibdistill.models."))
    assert teacher.class_names == OTHER_ORDER
    # Beside another teacher's, as in a recording.
    processors = {"a": teacher.image_processor, "b": ViTImageProcessor(size={"height": 8, "width": 8})}
    assert_same(teacher.logits(pixel_values(images, processors)["a"]).numpy(), expected)
    # Views are tensors.
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    assert_same(teacher.logits(pixel_values(tensors, processors)["a"]).numpy(), expected)

    assert_same(record_column(splits, folder, tmp_path / "t"), in_order(expected, OTHER_ORDER))


def test_other_classes_are_refused_with_the_difference_by_whatever_name_a_configuration_calls_them(splits, tmp_path):
    # timm's configurations have "label_names", transformers' "id2label".
    for family in ("timm resnet", "mobilenet_v2"):
        folder = save_teacher(tmp_path / family, family, ["dog", "cat", "fox"])
        with pytest.raises(ValueError, match=r'"a".*\[\'eel\'\] only in the first, \[\'fox\'\] only in the second'):
            record_column(splits, folder, tmp_path / "t")


def test_a_folder_saved_by_timm(splits, tmp_path):
    # What timm pushes to the Hub: its own names of weights, and a configuration without a model type. timm 1.0.31 and later
    # repeats the number of classes in it.
    model = randomize(timm.create_model("test_resnet", num_classes=3)).eval()
    names = {"label_names": OTHER_ORDER}
    save_for_hf(model, tmp_path / "teacher", names, model_args={"num_classes": 3}, safe_serialization=True)
    assert "model_type" not in json.loads((tmp_path / "teacher" / "config.json").read_text())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        images = open_images(splits["train"].select(range(4)))
        expected = np.stack([model(transform(image)[None])[0].numpy() for image in images])
    assert_same(record_column(splits, tmp_path / "teacher", tmp_path / "t"), in_order(expected, OTHER_ORDER))


def test_the_image_processor_of_an_older_hub_repository(splits, tmp_path):
    # As in microsoft/resnet-18: another name of the class, and a number as the size.
    folder = save_teacher(tmp_path / "teacher", "resnet")
    settings = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 96, "crop_pct": 0.875, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **PIXELS}))
    images = open_images(splits["train"].select(range(4)))
    found = record_column(splits, folder, tmp_path / "t")
    assert_same(found, logits_by_hand(folder, images))
    FAMILIES["resnet"][1].save_pretrained(folder)
    assert_same(found, logits_by_hand(folder, images))


def test_without_timm_the_error_names_what_to_install(tmp_path, monkeypatch):
    folder = save_teacher(tmp_path / "teacher", "timm resnet")
    monkeypatch.setitem(BACKENDS_MAPPING, "timm", (lambda: False, BACKENDS_MAPPING["timm"][1]))
    with pytest.raises(ImportError, match="requires the timm library .*\n.*`pip install timm`"):
        load_teachers({"a": folder})


# Remote code


REMOTE_CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_of_somebody"
    returns_tuple: bool = False


class TinyForImageClassification(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Linear(32, config.num_labels))
        self.post_init()

    def forward(self, pixel_values):
        logits = self.layers(pixel_values)
        return (logits,) if self.config.returns_tuple else ImageClassifierOutput(logits=logits)


class UpsideDownImageProcessor(ViTImageProcessor):
    def _preprocess(self, images, **options):
        return super()._preprocess([image.flip(1) for image in images], **options)
"""


@pytest.fixture
def remote(request, tmp_path, monkeypatch):
    """A folder with the code of its model and image processor, and a terminal that would answer yes.

    The model returns a `ModelOutput`, or what the parameter names: a "tuple".
    """
    # The folder from which transformers imports its copy of the code.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    folder = tmp_path / "remote_teacher"
    folder.mkdir()
    (folder / "code_of_somebody.py").write_text(REMOTE_CODE)
    config = {
        "model_type": "tiny_of_somebody",
        "architectures": ["TinyForImageClassification"],
        "auto_map": {
            "AutoConfig": "code_of_somebody.TinyConfig",
            "AutoModelForImageClassification": "code_of_somebody.TinyForImageClassification",
        },
        "id2label": dict(enumerate(OTHER_ORDER)),
        "returns_tuple": getattr(request, "param", "output") == "tuple",
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "image_processor_type": "UpsideDownImageProcessor",
        "auto_map": {"AutoImageProcessor": "code_of_somebody.UpsideDownImageProcessor"},
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    namespace = {}
    exec(REMOTE_CODE, namespace)
    model = randomize(namespace["TinyForImageClassification"](namespace["TinyConfig"](id2label=config["id2label"])))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def remote_logits_by_hand(folder, images, turn=PIL.Image.Transpose.FLIP_TOP_BOTTOM):
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    inputs = [processor(image.transpose(turn), return_tensors="pt").pixel_values for image in images]
    with torch.no_grad():
        return in_order(np.stack([model(pixel_values)[0][0].numpy() for pixel_values in inputs]), OTHER_ORDER)


def somebodys_code_was_run():
    return any("code_of_somebody" in name for name in sys.modules)


@pytest.mark.parametrize("remote", ["output", "tuple"], indirect=True)
def test_code_of_a_repository_is_only_run_for_those_who_allow_it(remote, splits, tmp_path):
    with pytest.raises(
        ValueError, match="(?s)remote_teacher contains custom code .*pass the argument `trust_remote_code=True`"
    ):
        record_column(splits, remote, tmp_path / "t")
    assert not somebodys_code_was_run() and not (tmp_path / "t").exists()

    found = record_column(splits, remote, tmp_path / "t", trust_remote_code=True)
    assert somebodys_code_was_run()
    assert_same(found, remote_logits_by_hand(remote, open_images(splits["train"].select(range(4)))))


def test_equal_settings_of_image_processors_with_different_code(remote, splits, tmp_path):
    mirrored = shutil.copytree(remote, tmp_path / "mirrored")
    (mirrored / "code_of_somebody.py").write_text(REMOTE_CODE.replace("image.flip(1)", "image.flip(2)"))
    rows, teachers = splits["train"].select(range(4)), {"a": remote, "b": mirrored}
    table = record_teacher_logits(rows, teachers, output_dir=tmp_path / "t", dtype="float32", trust_remote_code=True)
    assert_same(column(table, "a"), remote_logits_by_hand(remote, open_images(rows)))
    left_right = PIL.Image.Transpose.FLIP_LEFT_RIGHT
    assert_same(column(table, "b"), remote_logits_by_hand(mirrored, open_images(rows), left_right))


def test_the_command_runs_the_code_of_a_teacher_only_with_the_flag(remote, splits, tmp_path):
    splits.save_to_disk(tmp_path / "images")
    flags = ["--teachers", f"a={remote}", "--dataset", tmp_path / "images", "--output_dir", tmp_path / "t"]
    with pytest.raises(SystemExit, match="(?s)remote_teacher contains custom code .*`trust_remote_code=True`"):
        run("record", *flags)
    assert not somebodys_code_was_run() and not (tmp_path / "t").exists()
    run("record", *flags, "--trust_remote_code", "--dtype", "float32")
    found = column(load_from_disk(tmp_path / "t")["validation"], "a")
    assert_same(found, remote_logits_by_hand(remote, open_images(splits["validation"])))
