"""`python -m normkit.cli`, where the script `normkit` is not on the path."""

import sys

from normkit.cli import main

sys.exit(main())
