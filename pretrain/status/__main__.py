"""How runs are doing, from their directories: a table, or a page of one run. Needs neither MLflow nor Slurm.

    python -m pretrain.status                      all run directories in $QSPARSE_RUNS or ./runs, and this one where it is one
    python -m pretrain.status runs/a runs/b --watch
    python -m pretrain.status runs/a               everything of one run

Exit status: 0 shown, 2 where a path is no run directory or none was found (the others are shown), 130 interrupted while watching.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_tools.arguments import Parser, exit_status, named_path

WATCH_S = 5.0
RUNS, RUNS_VARIABLE = "runs", "QSPARSE_RUNS"
"""Folder of the run directories, and the variable that names another one (slurm/site.env)."""
HOME, CLEAR_LINE, CLEAR_BELOW, CLEAR = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = Parser(
        prog="python -m pretrain.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    told = "run directories (default: those in $QSPARSE_RUNS or ./runs)"
    parser.add_argument("runs", nargs="*", type=named_path, metavar="RUN", help=told)
    parser.add_argument(
        "--watch", nargs="?", const=WATCH_S, type=_seconds, metavar="SECONDS", help=f"show it again every so often (default {WATCH_S:g})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if isinstance(options.watch, Path):
        # `--watch runs/a` names a run.
        options.runs, options.watch = [options.watch, *options.runs], WATCH_S
    try:
        if options.watch is None:
            text, status = _shown(options.runs, options.json)
            if text:
                print(text, flush=True)
            return status
        return _watch(options.runs, options.json, options.watch)
    except KeyboardInterrupt:
        return 130


def _seconds(text: str) -> float | Path:
    try:
        seconds = float(text)
    except ValueError:
        return named_path(text)
    if not 0.2 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0.2 and 86400 seconds")
    return seconds


def _watch(runs: list[Path], as_json: bool, seconds: float) -> int:
    """Until Ctrl-C."""
    terminal = sys.stdout.isatty()
    if terminal:
        print(CLEAR, end="")
    while True:
        text, _ = _shown(runs, as_json)
        if terminal:
            print(HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in _fitting(text.splitlines())) + CLEAR_BELOW, end="", flush=True)
        else:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n", flush=True)
        time.sleep(seconds)


def _fitting(lines: Sequence[str]) -> list[str]:
    """A longer line would wrap and a longer page scroll, and both stay behind when it is shown again."""
    width, height = shutil.get_terminal_size()
    shown = list(lines[: height - 1]) if len(lines) < height else [*lines[: height - 2], f"... {len(lines) - height + 2} lines more"]
    return [line[:width] for line in shown]


def _shown(named: list[Path], as_json: bool) -> tuple[str, int]:
    """(what is printed, exit status). What is wrong with a path goes to stderr, in JSON into it as well."""
    from pretrain.status import facts, queue, show, state

    now = time.time()
    runs, errors, found = named or _here(), [], []
    for run in runs:
        try:
            found.append(facts.read(run, now, counting=len(named) == 1))
        except facts.NoRun as error:
            errors.append(str(error))
    if not runs:
        folder = os.environ.get(RUNS_VARIABLE) or f"./{RUNS}"
        errors.append(f"there is no run directory in {folder}: name the output_dir of a run")
    jobs = queue.ask(job for fact in found for job in (state.number_of_job(fact), *fact.successors))
    statuses = []
    for fact in found:
        try:
            statuses.append(state.judge(fact, jobs, now))
        except facts.DAMAGED as error:
            # Numbers that nobody would write: one run must not hide the others.
            errors.append(f"{fact.directory} cannot be judged ({type(error).__name__}: {error})")
    sys.stdout.flush()
    for error in errors:
        with contextlib.suppress(OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
    if as_json:
        text = show.to_json(statuses, errors, now)
    elif not statuses:
        text = ""
    else:
        text = "\n".join(show.page(statuses[0], now) if len(named) == 1 else show.table(statuses, now))
    return text, 2 if errors else 0


def _here() -> list[Path]:
    """The run directories where jobs and runs put them by default, and the current directory where it is one."""
    from pretrain.status.facts import is_run

    here = [Path.cwd()] if is_run(Path.cwd()) else []
    with contextlib.suppress(OSError):
        here += sorted(path for path in Path(os.environ.get(RUNS_VARIABLE) or RUNS).iterdir() if is_run(path))
    return here


if __name__ == "__main__":
    sys.exit(exit_status(main))
