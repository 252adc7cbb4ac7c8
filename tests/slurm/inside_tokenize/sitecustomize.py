"""Python imports this at its start in the elements of test_tokenize.py, which have this folder on PYTHONPATH: in its first start each
waits before its second unit, until TEST_FAULT_FOLDER/go is there, having made TEST_FAULT_FOLDER/waits.ELEMENT."""

import os
import time
from pathlib import Path

if "SLURM_ARRAY_TASK_ID" in os.environ and os.environ["SLURM_RESTART_COUNT"] == "0":
    from data_tools import tokenize

    folder, element = Path(os.environ["TEST_FAULT_FOLDER"]), os.environ["SLURM_ARRAY_TASK_ID"]
    hash_unit, calls = tokenize.hash_unit, []

    def waiting(task):
        calls.append(task)
        if len(calls) == 2:
            (folder / f"waits.{element}").touch()
            while not (folder / "go").exists():
                time.sleep(0.02)
        return hash_unit(task)

    tokenize.hash_unit = waiting
