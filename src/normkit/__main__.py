"""`python -m normkit`, where the script `normkit` is not on the path."""

import sys

from normkit_cli import main

# Processes that a command spawns import this file again.
if __name__ == "__main__":
    sys.exit(main())
