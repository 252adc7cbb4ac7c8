"""Ship journals to MLflow by hand, or see how far shipping has come.

    python -m pretrain.tracking sync RUN_DIR... [--uri URI]     exit code 1 if something could not be shipped
    python -m pretrain.tracking status RUN_DIR...

Shipping is idempotent: running it again adds nothing.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from data_tools.arguments import Parser, exit_status, named_path
from pretrain.tracking.record import RunRecord
from pretrain.tracking.shipper import RUN_ID_NAME, Shipper
from pretrain.tracking.state import METRICS_NAME, ShippingState, count_points, unshipped_points
from pretrain.tracking.store import resolve_uri, shipping_errors, validate_uri


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 all well, 1 something was not shipped, 2 wrong arguments)."""
    parser = Parser(prog="python -m pretrain.tracking", description="Ship metric journals to MLflow, or show the rest.")
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="ship what MLflow lacks; running it again adds nothing")
    sync.add_argument("--uri", default="", help="MLflow tracking URI (default: the one the run was started with)")
    status = commands.add_parser("status", help="show shipped and unshipped points")
    for command in (sync, status):
        command.add_argument(
            "run_directories", nargs="+", type=named_path, metavar="RUN_DIR", help="directory with run.json and metrics.jsonl"
        )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.command == "status":
        results = [show(directory) for directory in options.run_directories]
    else:
        if options.uri and (problem := validate_uri(options.uri)):
            print(f"error: {problem}", file=sys.stderr)
            return 2
        results = [ship(directory, options.uri) for directory in options.run_directories]
    return 0 if all(results) else 1


def ship(directory: Path, uri: str) -> bool:
    """Ship one run directory, print the outcome in a line; False when something is left."""
    errors = shipping_errors()
    try:
        record = RunRecord.load(directory)
    except FileNotFoundError as error:
        print(f"{directory}: no tracked run here ({error.filename} is missing)", file=sys.stderr)
        return False
    except (OSError, ValueError) as error:
        print(f"{directory}: not shipped: {error}", file=sys.stderr)
        return False
    try:
        target = resolve_uri(uri or record.uri)
        if problem := validate_uri(target):
            print(f"{directory}: {problem}", file=sys.stderr)
            return False
        shipper = Shipper(directory.absolute(), target)
        try:
            points = shipper.ship()
        finally:
            shipper.close()
    except errors as error:
        print(f"{directory}: not shipped: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return False
    print(f"{directory}: {points:,} points shipped to {target}" if points else f"{directory}: nothing new for {target}")
    return True


def show(directory: Path) -> bool:
    """Print one run directory's state in a line; False when it holds no readable run."""
    try:
        record = RunRecord.load(directory)
    except (OSError, ValueError) as error:
        print(f"{directory}: no tracked run here ({error})", file=sys.stderr)
        return False
    total, waiting = count_points(directory / METRICS_NAME), unshipped_points(directory)
    run_id = (directory / RUN_ID_NAME).read_text().strip() if (directory / RUN_ID_NAME).exists() else "none yet"
    state = ShippingState.load(directory)
    shipped = "shipped" if state.status == record.status else "not shipped"
    columns = (
        f"{record.status} ({shipped})",
        f"{total:,} metric points",
        f"{waiting:,} points unshipped, the system's included",
        f"run {run_id}",
    )
    print(f"{directory}: {' | '.join(columns)} | {state.uri or record.uri}")
    return True


if __name__ == "__main__":
    sys.exit(exit_status(main))
