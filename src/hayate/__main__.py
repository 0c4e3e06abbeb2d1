"""`python -m hayate` is the command `hayate`."""

import sys

from hayate.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
