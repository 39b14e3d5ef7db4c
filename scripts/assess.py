"""Launch `hf-ibdistill assess` from a clone, for example by torchrun or accelerate."""

import sys


# Python looks for modules in this folder first. Its evaluate.py would hide the library of that name.
sys.path.pop(0)

from hf_ibdistill.commands import main  # noqa: E402


main(["assess", *sys.argv[1:]])
