"""Pretrain a model.

    torchrun --nproc-per-node 2 -m pretrain.train --config pretrain/configs/tiny_qsparse.yaml [--section.field value ...]

A run that is started again with the same output_dir goes on from its newest complete checkpoint. SIGTERM or SIGUSR1 saves a
checkpoint after the present step and ends the run.
"""

import os
import signal
import sys
import time

from data_tools.arguments import exit_status


def main(args: list[str] | None = None) -> int:
    """Exit status 0 when the run finished or was stopped by a signal, 2 where it cannot start, 1 where it cannot go on."""
    from pretrain import launcher
    from pretrain.config import ConfigurationError, parse
    from pretrain.libraries import prepare
    from pretrain.validate import validate

    try:
        config = parse(args, prog="python -m pretrain.train", description=__doc__)
        validated = validate(config, launcher.world_size())
        launcher.check()
    except ConfigurationError as error:
        return _refuse(error)

    prepare(config.device)
    from pretrain.failures import report
    from pretrain.progress import Progress
    from pretrain.run import Refused, run
    from pretrain.trainer import Stopped

    progress = Progress()
    try:
        return run(validated, progress)
    except Refused as error:
        return _refuse(error)
    except Stopped as error:
        return _refuse(error, status=1)
    except Exception as error:
        report(error, progress)
        return 1


def _interrupted() -> int:
    """Ctrl-C before the run answers signals itself, while libraries are imported."""
    if os.environ.get("RANK", "0") == "0":
        print("interrupted before training began", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


def _refuse(error: Exception, status: int = 2) -> int:
    """Rank 0 speaks first and, where all ranks fail alike, alone: torchrun ends the others as soon as one has failed.

    A rank that fails by itself, say on a machine that lacks a file, still says so after its wait.
    """
    from pretrain.job import outcome
    from pretrain.launcher import rank as rank_of_launcher

    rank = rank_of_launcher()
    if rank:
        # The launcher's SIGTERM ends the wait: the run's own handlers would only take note of it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    prefix = f"error (rank {rank}): " if rank else "error: "
    print(*(prefix + line for line in str(error).splitlines()), sep="\n", file=sys.stderr, flush=True)
    outcome.write(status, " ".join(str(error).split()))
    return status


if __name__ == "__main__":
    try:
        sys.exit(exit_status(main))
    except KeyboardInterrupt:
        sys.exit(_interrupted())
