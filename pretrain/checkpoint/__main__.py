"""`python -m pretrain.checkpoint`."""

import sys

from pretrain.checkpoint.cli import main

if __name__ == "__main__":
    sys.exit(main())
