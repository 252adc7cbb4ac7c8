"""The command line: `python -m pretrain.checkpoint COMMAND --help`.

Exit status: 0 done, 1 `verify` found damage, 2 bad input or usage, 130 interrupted. Heavy imports live inside the commands.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_tools.arguments import Parser, named_path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:
        # No fault of a file: `exit_status` sees to it.
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="python -m pretrain.checkpoint", description="Look after the checkpoints of a run.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    where = "run directory, its checkpoints/ folder, or one checkpoint"

    command = commands.add_parser("verify", help="compare every file with its checksum; exit status 1 names the damaged ones")
    command.add_argument("directory", type=named_path, help=where)
    command.set_defaults(run=run_verify)

    command = commands.add_parser("list", help="steps, dates, sizes, and whether all files are there")
    command.add_argument("directory", type=named_path, help=where)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_list)

    command = commands.add_parser("show", help="what a checkpoint holds: run, sparsity, layout, tensors")
    command.add_argument("directory", type=named_path, help=f"{where}; of several the newest complete one")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_show)

    command = commands.add_parser(
        "prune", help="remove old complete checkpoints once those that stay are verified; milestones only if asked; or the one named"
    )
    command.add_argument("directory", type=named_path, help="run directory, its checkpoints/ folder, or the one checkpoint to remove")
    command.add_argument("--keep-last", type=_count, metavar="N", help="complete checkpoints to keep, at least 1")
    command.add_argument("--milestones", action="store_true", help="prune the milestones instead, all but the last N")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    command.set_defaults(run=run_prune)
    return parser


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1: the newest checkpoint is always kept")
    return value


def run_verify(options: argparse.Namespace) -> int:
    from pretrain.checkpoint.directory import kind_of
    from pretrain.checkpoint.inspection import checkpoints

    problems = _verified(checkpoints(options.directory))
    for checkpoint, found in problems.items():
        for problem in found:
            print(f"{checkpoint}: {problem}")
    damaged = sum(map(bool, problems.values()))
    if damaged:
        intact = [checkpoint.name for checkpoint, found in problems.items() if not found and kind_of(checkpoint) == "step"]
        use = f"of these training would go on from {intact[-1]}" if intact else "training could go on from none of these"
        print(f"{damaged} of {_number(len(problems), 'checkpoint')} damaged: {use}", file=sys.stderr)
        return 1
    print(f"{options.directory}: every byte of {_number(len(problems), 'checkpoint')} is what was written")
    return 0


def _verified(found: Sequence[Path]) -> dict[Path, list[str]]:
    """Damages of each checkpoint, by all bytes; one that a run at work removes meanwhile is left out, and that is told."""
    from data_tools.progress import Progress
    from pretrain.checkpoint.files import damages, size
    from pretrain.checkpoint.inspection import unreadable

    problems = {}
    with Progress("verify", sum(map(size, found))) as progress:
        for checkpoint in found:
            lines = list(damages(checkpoint, contents=True, progress=progress.update)) or list(filter(None, [unreadable(checkpoint)]))
            if lines and not checkpoint.is_dir():
                print(f"note: {checkpoint} was removed meanwhile", file=sys.stderr)
            else:
                problems[checkpoint] = lines
    return problems


def run_list(options: argparse.Namespace) -> int:
    import dataclasses

    from data_tools.progress import format_count
    from pretrain.checkpoint.inspection import summaries

    found = summaries(options.directory)
    if options.json:
        print(json.dumps([dataclasses.asdict(summary) for summary in found], indent=1))
        return 0
    rows = [("step", "kind", "saved", "size", "state")]
    rows += [
        (str(s.step), s.kind, s.created, format_count(s.size, "B"), s.state + (", a run goes on from here" if s.resume_point else ""))
        for s in found
    ]
    _print_table(rows)
    return 0


def run_show(options: argparse.Namespace) -> int:
    from pretrain.checkpoint.inspection import description, one_checkpoint

    shown = description(one_checkpoint(options.directory, warn=lambda text: print(f"warning: {text}", file=sys.stderr)))
    if options.json:
        print(json.dumps(shown, indent=1))
        return 0
    if shown["run_id"] is None:
        shown["run_id"] = "none yet when it was saved" if shown["tracking_enabled"] else "none: tracking.enabled=false"
    _print_table([(name, _text(shown[name])) for name in ("checkpoint", "kind", "created", "run_id", "numerics_version")])
    for title in ("state", "layout", "identity"):
        print(f"\n{title}")
        _print_table([(f"  {name}", _text(value)) for name, value in shown[title].items()])
    print("\ninputs kept: K x groups of the width")
    rows = [(f"  {name}", f"{item['k']} x {item['groups']} of {item['width']}") for name, item in shown["kept"].items()]
    _print_table(rows or [("  all of them", "dense")])
    print("\ntensors")
    _print_table([(f"  {name}", item["dtype"], "x".join(map(str, item["shape"]))) for name, item in shown["tensors"].items()])
    return 0


def run_prune(options: argparse.Namespace) -> int:
    from pretrain.checkpoint.directory import CheckpointDirectory, is_one
    from pretrain.checkpoint.inspection import checkpoints_directory

    named = options.directory.resolve()
    if is_one(named):
        if options.keep_last is not None or options.milestones:
            raise ValueError(f"{options.directory} is one checkpoint, which goes by itself: leave out --keep-last and --milestones")
        return _prune_one(named, options.dry_run)
    if options.keep_last is None:
        raise ValueError("--keep-last N is missing: how many complete checkpoints to keep; or name the one checkpoint to remove")
    directory = CheckpointDirectory(checkpoints_directory(options.directory), options.keep_last)
    kind = "milestone" if options.milestones else "step"
    superfluous = directory.superfluous(options.keep_last, kind)
    if superfluous:
        # Complete is a matter of sizes: before the others go, those that stay are read.
        staying = _verified([checkpoint for checkpoint in directory.complete(kind) if checkpoint not in superfluous])
        if damaged := next((checkpoint for checkpoint, problems in staying.items() if problems), None):
            raise ValueError(f"{damaged} would stay and is damaged ({staying[damaged][0]}): nothing was removed; move it away first")
        if len(staying) < options.keep_last:
            raise ValueError(f"{directory.path}: what would stay was removed meanwhile: nothing was removed")
    for checkpoint in superfluous:
        _remove(checkpoint, options.dry_run)
    if not superfluous:
        print(f"nothing to remove: {_number(len(directory.complete(kind)), f'complete {kind} checkpoint')}")
    return 0


def _prune_one(checkpoint: Path, dry_run: bool) -> int:
    """Remove it where a complete one stays to go on from, or where nothing goes on from it anyway: damaged ones, milestones."""
    from pretrain.checkpoint.directory import CheckpointDirectory, kind_of
    from pretrain.checkpoint.files import damage

    if kind_of(checkpoint) == "step":
        others = [other for other in CheckpointDirectory(checkpoint.parent, keep_last=1).complete() if other != checkpoint]
        problem = damage(checkpoint)
        if not others and problem is None:
            raise ValueError(f"{checkpoint} is the only complete checkpoint of its run: nothing was removed")
        if not others:
            # It may only be newer than this version, or not to be read from here.
            raise ValueError(
                f"{checkpoint} is not complete ({problem}), but no other one is: nothing was removed; see what can be restored"
            )
        if problem is None and (problems := _verified(others[-1:]).get(others[-1], ["it was removed meanwhile"])):
            raise ValueError(f"{others[-1]} would be what a run goes on from and is damaged ({problems[0]}): nothing was removed")
    _remove(checkpoint, dry_run)
    return 0


def _remove(checkpoint: Path, dry_run: bool) -> None:
    from data_tools.progress import format_count
    from pretrain.checkpoint.directory import remove
    from pretrain.checkpoint.files import size

    freed = format_count(size(checkpoint), "B")
    if not dry_run:
        remove(checkpoint)
    print(f"{'would remove' if dry_run else 'removed'} {checkpoint} ({freed})")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _text(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    """Left-aligned columns, the last one of any width."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]))
