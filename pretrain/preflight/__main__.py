"""Are the nodes of a job fit for training? See `pretrain.preflight`; slurm/lib/preflight.sh calls this.

    srun python -m pretrain.preflight node --report DIR --nodes "node1 node2" --run-directory RUN_DIR --data SHARDS
    python -m pretrain.preflight judge --report DIR --nodes "node1 node2" --processes-per-node 8

`judge` ends with status 0 where all nodes are good, and 3 where some are bad: it prints why, and writes their names to DIR/bad.
"""

import argparse
import os
import sys
import time

from data_tools.arguments import Parser, named_path

BAD_NODES = 3
BAD_NAME = "bad"
WAIT_S = 120.0


def main(args: list[str] | None = None) -> int:
    parser = Parser(prog="python -m pretrain.preflight", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    node = commands.add_parser("node", help="in each process: look, measure, report")
    node.add_argument("--run-directory", type=named_path, required=True, help="written to for trial")
    node.add_argument("--scratch", type=named_path, help="the node's own disk, written to for trial")
    node.add_argument("--data", type=named_path, help="shards, read for trial")
    node.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    node.add_argument("--wait-s", type=float, default=WAIT_S, help="for others to come (default: %(default)s)")
    node.set_defaults(run=_node)
    judge = commands.add_parser("judge", help="once, afterwards: name the bad nodes")
    judge.add_argument("--fraction", type=float, default=0.5, help="of the median, below which a node is slow (default: %(default)s)")
    judge.set_defaults(run=_judge)
    for command in (node, judge):
        command.add_argument("--report", type=named_path, required=True, help="folder that all nodes see")
        command.add_argument("--nodes", required=True, help="names of all nodes, with spaces between")
        command.add_argument("--processes-per-node", type=int, required=True)
    options = parser.parse_args(args)
    return options.run(options)


def _node(options: argparse.Namespace) -> int:
    """Where it is, by what Slurm tells each task."""
    from pretrain.libraries import prepare
    from pretrain.preflight import local
    from pretrain.preflight.joint import measure, stay_away
    from pretrain.preflight.reports import Report

    nodes, rank = options.nodes.split(), int(os.environ["SLURM_PROCID"])
    report = Report(node=nodes[rank // options.processes_per_node], local_rank=rank % options.processes_per_node)
    if report.local_rank == 0:
        report.disk_mb_s = local.check_disk(report, options.run_directory, "run directory")
        if options.scratch:
            local.check_disk(report, options.scratch, "node's own disk")
        if options.data:
            local.check_data(report, options.data)
    prepare(options.device)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kind = local.check_devices(report, options.device, options.processes_per_node)
    if kind is None:
        stay_away(rank, address, port, options.wait_s)
    else:
        local.check_computing(report, kind)
        measure(report, kind, rank, nodes, options.processes_per_node, address, port, options.wait_s)
    try:
        report.write(options.report)
    except OSError as error:
        # What is missing of it is found by the judge.
        print(f"{report.node}: cannot write to {options.report} ({error}); found: {report.problems}", file=sys.stderr)
    return 0


def _judge(options: argparse.Namespace) -> int:
    from pretrain.preflight.judge import judge
    from pretrain.preflight.reports import read

    verdict = judge(read(options.report), options.nodes.split(), options.processes_per_node, options.fraction)
    widths = [max(map(len, column)) for column in zip(*verdict.table, strict=True)]
    for row in verdict.table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in verdict.notes:
        print(f"note: {note}")
    for node, problems in verdict.problems.items():
        for problem in problems:
            print(f"bad node: {node}: {problem}")
    (options.report / BAD_NAME).write_text("".join(f"{name}\n" for name in verdict.bad))
    count = len(options.nodes.split())
    print(f"{len(verdict.bad)} of {count} nodes are bad" if verdict.bad else f"{count} nodes are good, {time.strftime('%H:%M:%S')}")
    return BAD_NODES if verdict.bad else 0


if __name__ == "__main__":
    sys.exit(main())
