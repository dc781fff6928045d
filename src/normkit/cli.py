"""The command line, `normkit_cli`, by its older name.

It is a package of its own because importing any module of normkit loads torch, and help
and shell completion should not wait for that.
"""

import sys

from normkit_cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    sys.exit(main())
