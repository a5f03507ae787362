"""`python -m carvana ...` is `carvana ...`."""

import sys

from carvana.cli import main

sys.exit(main())
