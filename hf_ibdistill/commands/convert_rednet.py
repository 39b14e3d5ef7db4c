"""Turn a published RedNet checkpoint (github.com/d-li14/involution) into a teacher.

hf-ibdistill convert-rednet --checkpoint rednet50.pth --output_dir outputs/rednet50
"""

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..rednet import REDNETS, convert_rednet_checkpoint
from .arguments import parse, run


@dataclass
class ConversionArguments:
    _argument_group_name = "conversion"

    checkpoint: str = HfArg(help="The published checkpoint: .pth, or the same tensors in .safetensors.")
    output_dir: str = HfArg(help="Folder of the converted model and its image processor.")
    class_names: str | None = HfArg(
        default=None,
        help="Text file with the name of a class on each line; by default the names in the checkpoint, or those of "
        "ImageNet for 1,000 classes.",
    )


def main(arguments):
    (conversion,) = parse("convert-rednet", __doc__, arguments, ConversionArguments)
    names = conversion.class_names
    if names is not None:
        names = Path(names).read_text(encoding="utf-8").splitlines()
    model = convert_rednet_checkpoint(conversion.checkpoint, conversion.output_dir, names)
    millions = model.num_parameters() / 1e6
    name = REDNETS[tuple(model.config.depths)]
    print(f"{name}, {model.config.num_labels:,} classes, {millions:.2f} M parameters: {conversion.output_dir}")


if __name__ == "__main__":
    run("convert-rednet", main)
