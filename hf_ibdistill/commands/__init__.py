"""The command `hf-ibdistill`. Each command is a file, which `python -m hf_ibdistill.commands.<name>` runs as well."""

import importlib
import sys

from .arguments import run


COMMANDS = {
    "quickstart": "run the whole method on bundled images: teachers, logits, students, card and pictures",
    "train-teacher": "train a light convolution or involution teacher",
    "record": "run the teachers once and store their logits in a table",
    "assess": "show what is known about a recorded table before a student is trained",
    "distill": "train a student from stored logits, or from teachers that run in every step",
    "evaluate": "measure a model on a split",
    "report": "make a page of tables and pictures of a run, or compare several runs",
    "predict": "print the classes that a model predicts for images",
    "verify": "compare a sample of a recorded table with its teachers",
    "finetune": "fine-tune a student, ViT or DeiT on other images, without teachers",
    "export": "write a model as an ONNX file, also in 8 bits",
    "demo": "show predictions and attention for an image on a page in the browser",
    "push": "publish a model or a recorded table on the Hub",
    "convert-rednet": "turn a published RedNet checkpoint into a teacher",
}


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-ibdistill <command> …`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:<16}{text}" for command, text in COMMANDS.items()]
        print("usage: hf-ibdistill COMMAND [--help] …\n\ncommands:\n" + "\n".join(lines))
    elif name not in COMMANDS:
        sys.exit(f'hf-ibdistill: the command "{name}" does not exist. Choose one of {", ".join(COMMANDS)}.')
    else:
        module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        run(name, module.main, arguments[1:])
