"""Journal-first experiment tracking: a local file owns the numbers, MLflow receives copies.

Why a journal. A tracking server is one more thing that dies during weeks of training. A synchronous MLflow call with
the default retries blocks for minutes once the server is gone, an asynchronous one loses its points without a word,
and ending the run raises after training has finished. Here `Tracker.log` appends one line to `metrics.jsonl` in the
run directory (tens of microseconds) and is done; a daemon thread ships the lines to MLflow in batches whenever a server
answers. MLflow ignores a point it already has (same key, step, timestamp and value), so lines can be sent again after
any failure without doubling anything, and `python -m pretrain.tracking sync RUN_DIR` can do it days later.

A run directory holds:

    metrics.jsonl            one JSON object per logged step (journal.py)
    metrics.discarded.jsonl  steps after the checkpoint a resume went back to
    system.jsonl             CPU, memory, disk, network and GPU samples (system.py)
    run.json                 what MLflow is to know besides metrics: parameters, tags, data sets, status (record.py)
    artifacts/               copies of the files that MLflow is to have, as each session passed them
    run_id                   the MLflow run's id, used again on resume
    shipped.json             how far shipping has come (shipper.py)
    previous/N/              the same files of a run that was started here before and not resumed

Nothing here imports torch or Megatron, and MLflow is imported only where it is called.
"""

from pretrain.tracking.environment import collect_environment
from pretrain.tracking.journal import read_journal
from pretrain.tracking.record import DatasetInput
from pretrain.tracking.settle import settle
from pretrain.tracking.store import validate_uri
from pretrain.tracking.tracker import Tracker, TrackingConfig

__all__ = ["DatasetInput", "Tracker", "TrackingConfig", "collect_environment", "read_journal", "settle", "validate_uri"]
