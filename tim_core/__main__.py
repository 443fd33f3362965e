"""`python -m tim_core` is `tim`, for `accelerate launch -m tim_core ...`."""

import sys

from .cli import main

sys.exit(main())
