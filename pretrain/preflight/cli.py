"""The command line: `python -m pretrain.preflight node|judge --help`.

Exit status of `node`: 0 its report is written, whatever it says; 1 it is not; 2 bad input. Of `judge`: 0 all nodes are good, 3 some
are bad and DIR/bad names them, 2 bad input.
"""

import argparse
import math
import os
import re
import sys

from data_tools.arguments import Parser, named_path

NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_DEVICES = 64
SOME_BAD = 3
SHORTEST_S, TIMEOUT_S = 15.0, 180.0


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if options.run is run_node else 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of both commands."""
    parser = Parser(prog="python -m pretrain.preflight", description="Look at the nodes of a job before it trains.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("node", help="look at this node; to be run once on each, at the same time")
    _add_common(command)
    command.add_argument("--node", metavar="NAME", default=os.environ.get("SLURMD_NODENAME"), help="this one's name, one of --nodes;"
                         " default: as Slurm calls it")  # fmt: skip
    command.add_argument("--address", required=True, help="of the first node, where all meet")
    command.add_argument("--port", required=True, type=_port, help="free on the first node; training may use it afterwards")
    command.add_argument(
        "--devices", required=True, type=_devices, metavar="N", help="GPUs that must be there, or processes with --device cpu"
    )
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto: GPUs where the node has a driver")
    command.add_argument("--run-directory", required=True, type=named_path, metavar="D", help="must be there and writable")
    command.add_argument("--data", type=named_path, metavar="PATH", help="shards directory that must be readable")
    command.add_argument("--scratch", type=named_path, metavar="DIR", help="another directory that must be there and writable")
    command.add_argument("--free-bytes", type=_bytes, default=0, metavar="B", help="that must be free in both; default 0: any")
    command.set_defaults(run=run_node)

    command = commands.add_parser("judge", help="compare what the nodes have found, and name the bad ones")
    _add_common(command)
    command.add_argument("--fraction", type=_fraction, default=0.5, help="of the median speed, below which a node is bad; default 0.5")
    command.add_argument("--clock-skew-s", type=_seconds, default=5.0, metavar="S", help="allowed between clocks; default 5")
    command.add_argument("--min-gbps", type=_speed, default=0.0, metavar="GB/s",
                         help="all-reduce between nodes below which they are bad however the others do; default 0: none")  # fmt: skip
    command.set_defaults(run=run_judge)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--report", required=True, type=named_path, metavar="DIR", help="directory that all nodes share; it must be there")
    command.add_argument(
        "--nodes", required=True, type=_nodes, metavar='"NAME NAME"', help="all nodes of the job, with blanks between them"
    )
    command.add_argument("--timeout", type=_timeout, default=TIMEOUT_S, metavar="S",
                         help=f"seconds that a node may take, at least {SHORTEST_S:.0f}; default {TIMEOUT_S:.0f}")  # fmt: skip


def run_node(options: argparse.Namespace) -> int:
    """Does not return: threads may be left behind in a file system that does not answer."""
    if options.node not in options.nodes:
        raise ValueError(f"--node {options.node} is none of --nodes {' '.join(options.nodes)}")
    from pretrain.preflight.health import kind_of
    from pretrain.preflight.node import Settings, examine

    settings = Settings(
        report=options.report, nodes=options.nodes, node=options.node, address=options.address, port=options.port,
        devices=options.devices, device=kind_of(options.device), run_directory=options.run_directory, data=options.data,
        scratch=options.scratch, free_bytes=options.free_bytes, timeout_s=options.timeout,
    )  # fmt: skip
    report = examine(settings)
    for problem in (*report.problems, *filter(None, [report.unreached])):
        print(f"preflight: {report.node}: {problem}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_judge(options: argparse.Namespace) -> int:
    if not options.report.is_dir():
        raise ValueError(f"--report {options.report} is no directory: make it where all nodes see it")
    from pretrain.preflight.judge import Limits, judge, read_reports, write_bad
    from pretrain.preflight.table import summary, table

    reports, missing = read_reports(options.report, options.nodes)
    limits = Limits(fraction=options.fraction, clock_skew_s=options.clock_skew_s, min_gbps=options.min_gbps)
    bad = judge(reports, missing, options.nodes, limits, options.timeout)
    write_bad(options.report, bad)
    for node, problems in bad.items():
        for problem in problems:
            print(f"bad node: {node}: {problem}")
    print(table(reports, options.nodes, bad))
    print(summary(reports, options.nodes, bad), flush=True)
    return SOME_BAD if bad else 0


def _nodes(text: str) -> list[str]:
    names = text.split()
    wrong = [name for name in names if not NODE.fullmatch(name)]
    if not names or wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no name of a node" if wrong else "there is no node in it")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"a node is named twice in {text!r}")
    return names


def _number(text: str, low: float, high: float, needed: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not math.isfinite(value) or not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} must be {needed}")
    return value


def _whole(text: str, low: int, high: int, needed: str) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} must be {needed}")
    return int(text)


def _port(text: str) -> int:
    return _whole(text, 1, 65535, "a port from 1 to 65535")


def _devices(text: str) -> int:
    return _whole(text, 1, MAX_DEVICES, f"a whole number from 1 to {MAX_DEVICES}")


def _bytes(text: str) -> int:
    return _whole(text, 0, 2**63, "a whole number of bytes")


def _timeout(text: str) -> float:
    return _number(text, SHORTEST_S, 86400, f"from {SHORTEST_S:.0f} to 86400 seconds")


def _fraction(text: str) -> float:
    return _number(text, 0.01, 0.99, "between 0.01 and 0.99")


def _seconds(text: str) -> float:
    return _number(text, 0.1, 1e6, "at least 0.1 seconds")


def _speed(text: str) -> float:
    return _number(text, 0.0, 1e6, "not negative")
