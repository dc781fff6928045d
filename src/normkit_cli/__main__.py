"""`python -m normkit_cli`, where the script `normkit` is not on the path."""

import sys

from normkit_cli import main

sys.exit(main())
