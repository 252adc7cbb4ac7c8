"""Does this project compute on a cluster what it computes elsewhere? See `pretrain.acceptance`; slurm/lib/acceptance.sh calls this.

    python -m pretrain.acceptance data FOLDER
    python -m pretrain.acceptance cases --nodes 2 --processes-per-node 8 [--once-more FOLDER]
    python -m pretrain.acceptance prepare FOLDER "NAME" --nodes 2 --processes-per-node 8
    python -m pretrain.acceptance report FOLDER --nodes 2 --processes-per-node 8

`cases` prints a line for each start, fields separated by tabs: name, kind (killed:STEP says when), directory, nodes, processes of a
node, flags of pretrain.train; with `--once-more` those that a tipped entry may have moved (pretrain.acceptance.compare). `report` ends
with status 0 where all cases fit, else 1.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.arguments import Parser, exit_status, named_path
from pretrain.acceptance.cases import COMMON, KILL_AFTER, LONG, VARIANTS, Case, cases

if TYPE_CHECKING:
    from pretrain.acceptance.report import Result


def main(args: list[str] | None = None) -> int:
    parser = Parser(prog="python -m pretrain.acceptance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="make a small corpus, tokenizer and shards of Python's standard library")
    data.set_defaults(run=_data)
    listed = commands.add_parser("cases", help="print what is to be run")
    listed.add_argument("--once-more", type=named_path, metavar="FOLDER", help="what has to be taken once more after all were run there")
    listed.set_defaults(run=_cases)
    prepare = commands.add_parser("prepare", help="give a case the checkpoint that it begins with")
    prepare.set_defaults(run=_prepare)
    report = commands.add_parser("report", help="compare all, write report.md and report.json")
    report.set_defaults(run=_report)
    for command in (data, prepare, report):
        command.add_argument("folder", type=named_path)
    prepare.add_argument("name")
    for command in (listed, prepare, report):
        command.add_argument("--nodes", type=int, required=True)
        command.add_argument("--processes-per-node", type=int, required=True)
    options = parser.parse_args(args)
    return options.run(options)


def _data(options: argparse.Namespace) -> int:
    import json
    import sysconfig

    from data_tools.cli import main as data_tools

    corpus, tokenizer = options.folder / "corpus.jsonl", options.folder / "tokenizer"
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text(errors="replace")[:2000] for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:150]]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    steps = (
        ["train-tokenizer", "--input", str(corpus), "--vocab-size", "512", "--output", str(tokenizer), "--overwrite"],
        ["tokenize", "--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(options.folder / "shards"),
         "--validation-fraction", "0.2", "--workers", "1"],
    )  # fmt: skip
    return next((status for step in steps if (status := data_tools(step))), 0)


def _cases(options: argparse.Namespace) -> int:
    found, left_out = _cases_here(options)
    if options.once_more:
        found, left_out = [case.once_more for case in found if _tipped(case, options.once_more)], []
    for case in found:
        nodes, per_node = _spread(case, options)
        kind = f"{case.kind}:{KILL_AFTER}" if case.kind == "killed" else case.kind
        print("\t".join([case.name, kind, case.run, str(nodes), str(per_node), *_flags(case)]))
    for name, reason in left_out:
        print(f"not run: {name}: {reason}", file=sys.stderr)
    return 0


def _cases_here(options: argparse.Namespace) -> tuple[list[Case], list[tuple[str, str]]]:
    """Those that can be spread over the nodes, and the others with the reason."""
    found, left_out = cases(options.nodes * options.processes_per_node)
    uneven = [case for case in found if _spread(case, options) is None]
    size = f"{options.nodes} nodes of {options.processes_per_node}"
    left_out += [(case.name, f"{case.processes} processes cannot be spread evenly over {size}") for case in uneven]
    return [case for case in found if case not in uneven], left_out


def _spread(case: Case, options: argparse.Namespace) -> tuple[int, int] | None:
    """(nodes, processes of each), over as many nodes as can be: what goes through the network is what may be wrong."""
    for nodes in range(options.nodes, 0, -1):
        if case.processes % nodes == 0 and case.processes // nodes <= options.processes_per_node:
            return nodes, case.processes // nodes
    return None


def _tipped(case: Case, folder: Path) -> bool:
    from pretrain.acceptance.compare import compare, may_have_flipped

    try:
        return any(not figure.fits for figure in compare(case, folder)) and may_have_flipped(case, folder)
    except (OSError, ValueError, KeyError):
        # The report says what is wrong with it.
        return False


def _flags(case: Case) -> list[str]:
    return [*COMMON, *VARIANTS[case.variant], "--train.precision", case.precision, *case.flags]


def _prepare(options: argparse.Namespace) -> int:
    found = _cases_here(options)[0]
    case = next(case for first in found for case in (first, first.once_more) if case.name == options.name)
    if case.begins is not None:
        source, step = case.begins
        checkpoint = Path("checkpoints") / f"step_{step:08d}"
        if not (options.folder / "runs" / source / checkpoint).is_dir():
            print(f"{case.name} needs {checkpoint.name} of {source}, which is not there", file=sys.stderr)
            return 1
        shutil.copytree(options.folder / "runs" / source / checkpoint, options.folder / "runs" / case.run / checkpoint)
    if case.kind == "continued":
        step = _newest_step(options.folder / "runs" / case.run)
        if not 0 < step < LONG:
            # Else the run would not go on from anything, and equal the unbroken one nevertheless.
            print(f"{case.name} needs a checkpoint from before the kill; the newest complete one is of step {step}", file=sys.stderr)
            return 1
    return 0


def _newest_step(run: Path) -> int:
    """Of the newest complete checkpoint, 0 without one."""
    from pretrain.checkpoint.directory import CheckpointDirectory, step_of

    try:
        path = CheckpointDirectory(run / "checkpoints", 1).newest(contents=False)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 0
    return step_of(path) if path is not None else 0


def _report(options: argparse.Namespace) -> int:
    from pretrain.acceptance.report import surroundings, write

    found, left_out = _cases_here(options)
    results = []
    for case in found:
        result = _result(case, options.folder)
        if (options.folder / "logs" / case.once_more.name).is_dir():
            first, result = result, _result(case.once_more, options.folder)
            result.note = f"{first.worst} in the step before: an entry that tipped over, or the layout"
        results.append(result)
    print(write(options.folder, surroundings(options.nodes, options.processes_per_node), results, left_out))
    print(options.folder / "report.md")
    return 0 if all(result.fits for result in results) else 1


def _result(case: Case, folder: Path) -> "Result":
    from pretrain.acceptance.compare import compare
    from pretrain.acceptance.report import Result

    logs = folder / "logs" / case.name
    result = Result(case.name, case.processes, log=f"logs/{case.name}", seconds=_seconds(logs / "seconds"))
    status = (logs / "status").read_text().strip() if (logs / "status").exists() else "missing: it was not run"
    if case.kind == "killed":
        if status == "0":
            result.problem = f"it was to be killed after step {KILL_AFTER}, and was done before"
    elif status != "0":
        result.problem = f"training ended with status {status}" if status.isdecimal() else status
    else:
        try:
            result.figures = compare(case, folder)
        except (OSError, ValueError, KeyError) as error:
            result.problem = f"cannot be compared: {error}"
    return result


def _seconds(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(exit_status(main))
