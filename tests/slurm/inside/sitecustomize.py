"""Python imports this at its start in every process of a test's jobs, which have this folder on PYTHONPATH. It touches training
processes alone, once they have imported `pretrain.run`: writes down the samples they take, and lets them fail or wait where the test says.

TEST_SAMPLES: file for the samples. TEST_FAULT: `rank what step restart`, several with commas between: raise, or wait (until
TEST_FAULT_FOLDER/go.RESTART is there, having made TEST_FAULT_FOLDER/waits.RESTART) before that step, or in the middle of writing a
checkpoint ("save", whatever the step), in the start with that number of restarts; `*` in all of them.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path


class _After(importlib.abc.MetaPathFinder):
    """Calls `install` when a module has been imported."""

    def __init__(self, name: str, install):
        self.name, self.install = name, install

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            # The import statement does so, a moment later.
            parent, _, last = name.rpartition(".")
            setattr(sys.modules[parent], last, module)
            self.install()

        spec.loader.exec_module = exec_module
        return spec


def _install() -> None:
    from tests.pretrain.killing import Watched

    rank, restart = int(os.environ["RANK"]), os.environ["SLURM_RESTART_COUNT"]
    if samples := os.environ.get("TEST_SAMPLES"):
        Watched(samples=Path(samples), session=f"{os.environ['SLURM_JOB_ID']}.{restart}")(rank)
    for fault in filter(None, os.environ.get("TEST_FAULT", "").split(",")):
        fault_rank, what, step, fault_restart = fault.split()
        if rank == int(fault_rank) and fault_restart in ("*", restart):
            {"raise": _at_step, "wait": _at_step, "save": _in_save}[what](what, int(step))


def _at_step(what: str, step: int) -> None:
    from pretrain.trainer import Trainer

    take = Trainer._step

    def taking(trainer):
        if trainer.state.step + 1 == step:
            _wait() if what == "wait" else _fail()
        return take(trainer)

    Trainer._step = taking


def _in_save(what: str, step: int) -> None:
    from megatron_qsparse.parallel.checkpoint.writing import _Recorder

    write = _Recorder.write

    def writing(recorder, data):
        if len(data) > 4096:
            write(recorder, bytes(data)[: len(data) // 2])
            recorder.flush()
            _wait()
        return write(recorder, data)

    _Recorder.write = writing


def _fail() -> None:
    raise ArithmeticError("a fault of this test")


def _wait() -> None:
    folder, restart = Path(os.environ["TEST_FAULT_FOLDER"]), os.environ["SLURM_RESTART_COUNT"]
    (folder / f"waits.{restart}").touch()
    while not (folder / f"go.{restart}").exists():
        time.sleep(0.02)


if "RANK" in os.environ and "SLURM_JOB_ID" in os.environ:
    sys.meta_path.insert(0, _After("pretrain.run", _install))
