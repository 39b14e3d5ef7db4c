"""Serve a page that shows what a model predicts for an image, and where the tokens of a student look.

hf-ibdistill demo --model outputs/student
hf-ibdistill demo --model user/student --teachers conv=user/conv --examples photos/

It needs pip install "hf_ibdistill[demo]". Only this machine can open the page, unless --host opens
it to others.
"""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..demo import build_demo, start_demo
from .arguments import name_folders, parse, run


@dataclass
class DemoArguments:
    _argument_group_name = "demo"

    model: str = HfArg(help="Folder or Hub id of the model.")
    teachers: list[str] = HfArg(
        default_factory=list, help="Teachers to show beside it, as NAME=FOLDER or NAME=HUB_ID."
    )
    examples: str | None = HfArg(default=None, help="Folder of images to choose from.")
    host: str = HfArg(default="127.0.0.1", help="Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = HfArg(default=7860, help="Port to listen on.")
    max_file_size: float = HfArg(default=10, help="Largest upload in MB.")
    trust_remote_code: bool = HfArg(default=False, help="Run the code of the model repositories.")


def main(arguments):
    (demo,) = parse("demo", __doc__, arguments, DemoArguments)
    page = build_demo(
        demo.model,
        teachers=name_folders(demo.teachers),
        examples=demo.examples,
        trust_remote_code=demo.trust_remote_code,
    )
    url = start_demo(page, host=demo.host, port=demo.port, max_file_size=demo.max_file_size)
    print(f"The page is at {url} until Ctrl+C.", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run("demo", main)
