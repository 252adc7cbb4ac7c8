"""`python -m data_tools COMMAND`."""

import os
import sys

if __name__ == "__main__":
    # Nothing here multiplies matrices, and NumPy's linear algebra library would start a thread for each processor in
    # each worker process. Those inherit the setting; they import this module as well, and must not start the program.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from data_tools.arguments import exit_status
    from data_tools.cli import main

    sys.exit(exit_status(main))
