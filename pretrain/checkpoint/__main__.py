"""`python -m pretrain.checkpoint`."""

import sys

from data_tools.arguments import exit_status
from pretrain.checkpoint.cli import main

if __name__ == "__main__":
    sys.exit(exit_status(main))
