"""`python -m kalle` is the `kalle` command."""

import sys

from kalle.cli.main import main

sys.exit(main())
