"""The command line as a module: ``python -m nomadam``."""

import sys

from nomadam.cli import main

if __name__ == "__main__":
    sys.exit(main())
