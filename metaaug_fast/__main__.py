"""`python -m metaaug_fast`: the console program."""

import sys

from .cli import main

sys.exit(main())
