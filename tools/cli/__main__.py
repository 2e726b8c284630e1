"""`python -m seqpar.tools.cli`: the command `seqpar` where it is not installed."""

import sys

from seqpar.tools.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
