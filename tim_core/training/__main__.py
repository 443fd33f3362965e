"""`torchrun -m tim_core.training CONFIG.yaml ...`: `tim train` in several processes."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
