"""The arguments that the scripts share, and how they are read."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor, HfArgumentParser

from hf_ibdistill import ViewRecipe, load_student
from hf_ibdistill.data import find_columns, load_image_dataset, select_per_class


@dataclass
class DataArguments:
    dataset: str = field(
        default="digits",
        metadata={
            "help": 'The images: "digits" (8×8 handwritten digits, bundled), a folder of class folders, a save_to_disk '
            "folder, a Parquet file or folder, a folder of MNIST's IDX files, or the id of a data set on the Hub."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found when not given."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels; found when not given."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of the training images held out where there is no validation split."}
    )
    images_per_class: int | None = field(
        default=None, metadata={"help": "Train on a random subset with this many images of each class."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the validation split and of the subset."})

    def load(self) -> DatasetDict:
        splits = load_image_dataset(
            self.dataset,
            image_column=self.image_column,
            label_column=self.label_column,
            validation_fraction=self.validation_fraction,
            seed=self.split_seed,
        )
        self.image_column, self.label_column = find_columns(splits["train"], self.image_column, self.label_column)
        if self.images_per_class is not None:
            splits["train"] = select_per_class(
                splits["train"], self.images_per_class, self.label_column, seed=self.split_seed
            )
        return splits


@dataclass
class ViewArguments:
    num_views: int = field(
        default=0,
        metadata={
            "help": "Augmented views of each image; 0 takes the images as they are. Training walks through them."
        },
    )
    crop: str = field(
        default="pad", metadata={"help": "pad (shift by some pixels), resized (cut out a part and resize it) or none."}
    )
    padding: float = field(default=0.125, metadata={"help": "For pad, the largest shift, as a share of the side."})
    min_scale: float = field(default=0.5, metadata={"help": "For resized, the smallest share of the area."})
    horizontal_flip: float = field(default=0.0, metadata={"help": "Probability of a mirrored view."})
    photometric_ops: int = field(default=0, metadata={"help": "Colour operations on each view."})
    magnitude: float = field(default=5.0, metadata={"help": "Strength of the colour operations, 0 to 10."})
    erasing: float = field(default=0.0, metadata={"help": "Probability that a rectangle of a view is made grey."})
    view_size: int | None = field(default=None, metadata={"help": "Side of a view; by default the image's own."})
    view_seed: int = field(default=0, metadata={"help": "Another seed makes other views."})

    def recipe(self) -> ViewRecipe | None:
        if self.num_views == 0:
            return None
        return ViewRecipe(
            num_views=self.num_views,
            image_size=self.view_size,
            crop=self.crop,
            padding=self.padding,
            scale=(self.min_scale, 1.0),
            horizontal_flip=self.horizontal_flip,
            photometric_ops=self.photometric_ops,
            magnitude=self.magnitude,
            erasing=self.erasing,
            seed=self.view_seed,
        )


def parse_arguments(*types: type) -> tuple:
    """Flags, or one YAML or JSON file in place of all of them."""
    parser = HfArgumentParser(types)
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def name_folders(pairs: list[str]) -> dict[str, str]:
    """`["conv=outputs/conv", …]` → name → folder or Hub id."""
    named = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(named.values()):
        raise ValueError(
            f"Teachers are given as NAME=FOLDER or NAME=HUB_ID, for example conv=outputs/conv; got {pairs}."
        )
    return named


def default_patch_size(image_size: int) -> int:
    """Pixels a side: 16 patches and more, at a length that a small transformer bears."""
    return 2 if image_size < 16 else 4 if image_size <= 64 else 16


def load_start(model: str, image_size: int | None = None, fusion: str | None = None, **fields) -> tuple:
    """A student to start from, by [`load_student`], and its own image processor; what is `None` is the model's own."""
    sizes = {}
    if image_size is not None:
        # A DeiT's processor cuts the middle out of a larger image.
        side = {"height": image_size, "width": image_size}
        fields, sizes = {**fields, "image_size": image_size}, {"size": side, "crop_size": side}
    if fusion is not None:
        fields["fusion"] = fusion
    return load_student(model, **fields), AutoImageProcessor.from_pretrained(model, **sizes)


def result_split(splits: DatasetDict) -> str:
    """The split that final results are measured on."""
    return "test" if "test" in splits else "validation"


def run(main: Callable[[], None]) -> None:
    """Run a script; a mistake in its input ends in one sentence instead of a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        main()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
