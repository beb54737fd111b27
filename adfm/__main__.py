"""`python -m adfm` is `adfm`."""

import sys

from adfm.cli import main

sys.exit(main())
