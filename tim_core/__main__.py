"""`python -m tim_core` is `tim`, for `torchrun -m tim_core ...`."""

import sys

from .cli import main

sys.exit(main())
