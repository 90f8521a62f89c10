"""`python -m mogeo`: the same as the command `mogeo`."""

import sys

from mogeo.cli import main

sys.exit(main())
