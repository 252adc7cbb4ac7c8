"""`python -m data_tools COMMAND`."""

import os
import sys

# Nothing here multiplies matrices, and NumPy's linear algebra library would start a thread for each processor in each worker.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from data_tools.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
