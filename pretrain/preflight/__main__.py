"""`python -m pretrain.preflight`."""

import sys

from pretrain.preflight.cli import main

if __name__ == "__main__":
    sys.exit(main())
