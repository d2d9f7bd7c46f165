"""`python -m metaaug_fast`: the console program."""

import sys

from .cli.main import main

sys.exit(main())
