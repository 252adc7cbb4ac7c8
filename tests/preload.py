"""Imported once by the server that `tests.distributed` forks its processes from: nothing here may run or start anything."""

import gc

import jsonargparse  # noqa: F401
import mlflow
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

import megatron_qsparse.models.gpt
import megatron_qsparse.parallel.checkpoint
import megatron_qsparse.parallel.zero  # noqa: F401
import pretrain.run  # noqa: F401
from megatron_qsparse.compat import deepspeed

deepspeed.load()
# Half a million objects that the processes' collections need not walk through, 0.3 s each, nor copy.
gc.collect()
gc.freeze()
