"""`python -m seqpar.tools.bench`."""

import sys

from seqpar.tools.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
