"""What slurm/lib.sh asks around the training processes; see `pretrain.job`. Every command takes the training flags after `--`.

    python -m pretrain.job directory -- --config pretrain/configs/7b_qsparse.yaml ...
    python -m pretrain.job code --source . -- ...
    python -m pretrain.job begin --job 17 --nodes "node1 node2" --processes-per-node 8 -- ...
    python -m pretrain.job end --job 17 --status 1 -- ...

Answers are assignments for a shell to evaluate; what a person should read goes to stderr. Exit status 0: go on; 2: the run cannot
start, and neither can it later; 3: it is complete; 4: it was started often enough; 5: somebody has stopped it.
"""

import argparse
import dataclasses
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from data_tools.arguments import Parser
from pretrain import notify, run_directory
from pretrain.config import ConfigurationError, PretrainConfig, parse
from pretrain.job import attempts, decide, outcome, provenance
from pretrain.job.attempts import Attempt
from pretrain.job.fit import Fit, fit
from pretrain.job.snapshot import take

REFUSED, COMPLETE, GIVEN_UP, STOPPED = 2, 3, 4, 5
TRIES = 3
END_WAIT_S = 90
"""For which training processes may go on once one has ended, besides what rank 0 takes to ship to MLflow: where one has failed, the
others notice, wait for the save under way, tell people and end, within a minute; where that does not help they are killed."""
PREEMPTED, CANCELLED = ("preempted", "requeued"), "cancelled"
OF_ONE_START = ("signalled", outcome.NAME, attempts.PREEMPTED_NAME, attempts.SUCCESSOR_NAME)
"""Files in RUN_DIR/slurm/JOB.RESTART/ that say how that start ended."""
FATES = ("", *PREEMPTED, CANCELLED, "timeout", "lost", "requeued_lost", "running", "unknown")
"""Of a job that was sent TERM, as slurm/lib/survive.sh finds it out."""


def main(args: list[str] | None = None) -> int:
    args = list(sys.argv[1:] if args is None else args)
    own, flags = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    options = _parser().parse_args(own)
    try:
        options.flags = flags
        return options.run(options, parse(flags))
    except (ConfigurationError, ValueError, OSError) as error:
        return _refuse(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretrain.job", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    directory = commands.add_parser("directory", help="where the run's directory is")
    directory.set_defaults(run=_directory)
    code = commands.add_parser("code", help="make the run's own copy of the code")
    code.add_argument("--source", type=Path, required=True, help="folder of the checkout")
    code.add_argument("--update", action="store_true", help="replace a copy that is there")
    code.add_argument("--job", default="")
    code.set_defaults(run=_code)
    fitting = commands.add_parser("fit", help="on how many of the nodes a start would train")
    fitting.set_defaults(run=_fit)
    begin = commands.add_parser("begin", help="whether to start now, and on how many of the nodes")
    begin.set_defaults(run=_begin)
    for command in (fitting, begin):
        command.add_argument("--nodes", required=True, help="names of the allocated nodes, with spaces between")
        command.add_argument("--processes-per-node", type=int, required=True)
    end = commands.add_parser("end", help="how the start ended, and what follows")
    end.add_argument("--status", type=int, required=True, help="exit status of srun")
    end.add_argument("--signal", default="", choices=["", "USR1", "TERM"], help="what the job had been sent")
    end.add_argument("--fate", default="", choices=FATES, help="what Slurm has made of a job that was sent TERM")
    end.add_argument("--ends-here", default="", metavar="WHY", help="nothing starts the run again after this job")
    end.add_argument("--reason", default="", help="why training was not begun")
    end.set_defaults(run=_end)
    for command in (begin, end):
        command.add_argument("--job", required=True)
        command.add_argument("--restart", type=int, default=0, help="how often Slurm has started this job again")
        command.add_argument("--chain", default="", help="what jobs that go on from each other have in common (default: the job)")
        command.add_argument("--tries", type=int, default=TRIES, help="starts in a row without a new checkpoint (default: %(default)s)")
    return parser


def _directory(options: argparse.Namespace, config: PretrainConfig) -> int:
    _answer(RUN_DIRECTORY=config.run_directory.absolute())
    return 0


def _code(options: argparse.Namespace, config: PretrainConfig) -> int:
    directory = config.run_directory.absolute()
    if options.update and (other := _at_work(directory, options.job)):
        return _refuse(f"UPDATE_CODE: {other}")
    if found := run_directory.problems(directory):
        return _refuse("\n".join(found))
    with run_directory.writing(directory):
        found = take(options.source, directory, options.update, _config_files(options.flags))
    if found.made:
        _say(f"code: copied from {options.source} to {found.path}{f'; the copy before is kept as {found.kept}' * bool(found.kept)}")
    for name in found.differs:
        _say(f"code: this run goes on with its own copy, {found.path}, which differs from {name}: UPDATE_CODE=1 takes that")
    _answer(CODE=found.path)
    return 0


def _fit(options: argparse.Namespace, config: PretrainConfig) -> int:
    nodes = options.nodes.split()
    used = fit(config, len(nodes), options.processes_per_node)
    _tell_idle(nodes, used, config)
    _answer(TRAIN_NODES=used.nodes)
    return 0


def _begin(options: argparse.Namespace, config: PretrainConfig) -> int:
    from pretrain.outlook import look
    from pretrain.validate import examine

    nodes = options.nodes.split()
    used = fit(config, len(nodes), options.processes_per_node)
    if (stop := decide.stop_file(config)) is not None:
        _say(f"{stop} is there: remove it and submit the job again to train on")
        return STOPPED
    if other := _at_work(config.run_directory.absolute(), options.job):
        return _refuse(other)
    before, chain = attempts.read(config.run_directory), options.chain or options.job
    if config.resume == "never" and any(attempt.chain == chain for attempt in before):
        # That was asked of the first start; what is there by now is this run's own.
        config = dataclasses.replace(config, resume="auto")
    problems, model, manifest = examine(config, used.processes)
    warnings: list[str] = []
    if not problems:
        outlook = look(config, model, manifest)
        problems, warnings = outlook.problems, outlook.warnings
        if outlook.complete:
            _mark_finished(config)
            _say(f"{config.run_directory} is complete: all {config.train.steps} steps are done")
            return COMPLETE
    if problems:
        notify.tell(config, "failure", 0, "the run cannot start:\n" + "\n".join(problems))
        return _refuse("\n".join(problems))
    step = decide.newest_step(config)
    if given_up := decide.give_up(decide.starts_without_progress(before, chain, step), options.tries, step):
        notify.tell(config, "failure", step, given_up)
        _say(f"error: {given_up}")
        return GIVEN_UP
    _say(*(f"warning: {warning}" for warning in warnings))
    _tell_idle(nodes, used, config)
    _tell_change(before, used.processes, used.data_parallel)
    (config.run_directory / decide.FINISHED_NAME).unlink(missing_ok=True)
    attempts.begin(
        config.run_directory,
        Attempt(
            job=options.job, restart=options.restart, chain=chain, began=time.time(), step=step, nodes=nodes,
            devices=len(nodes) * options.processes_per_node, processes=used.processes,
        ),
    )  # fmt: skip
    folder = _folder(options, config)
    # An interactive job may start a run twice.
    for name in OF_ONE_START:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "preflight", ignore_errors=True)
    provenance.write(folder)
    _answer(
        TRAIN_NODES=used.nodes, STEP=step, STEPS=config.train.steps, START_DIRECTORY=folder, QSPARSE_OUTCOME=_outcome_file(folder),
        DATA=Path(config.data.path).absolute(), DEVICE=config.device, RESUME=config.resume,
        END_WAIT=END_WAIT_S + math.ceil(config.tracking.drain_timeout_s),
        JOURNAL_ONLY=1 if config.tracking.enabled and not config.tracking.uri and not os.environ.get("MLFLOW_TRACKING_URI") else "",
        # One queue keeps the order in which Megatron issues communication and computation of tensor parallelism; ZeRO-3
        # overlaps gathering with computing, which one queue would forbid. The user may know better.
        CUDA_DEVICE_MAX_CONNECTIONS=os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
        or (1 if config.parallel.tensor > 1 and config.zero.stage < 3 else ""),
    )  # fmt: skip
    return 0


def _end(options: argparse.Namespace, config: PretrainConfig) -> int:
    chain = options.chain or options.job
    said = outcome.read(_outcome_file(_folder(options, config)))
    before = attempts.read(config.run_directory)
    preempted = options.fate in PREEMPTED
    decision = decide.after(config, options.status, options.signal, said, before, chain, options.tries, options.reason, preempted)
    if options.fate == CANCELLED and decision.kind == "again":
        decision = decide.Decision("stopped", f"the job was cancelled; {decision.reason}")
    elif options.ends_here and decision.kind == "again":
        decision = decide.Decision("stopped", f"{decision.reason}; {options.ends_here}")
    if decision.kind == "finished":
        _mark_finished(config)
    if decision.kind == "failed" and (said is None or said.status == outcome.REFUSED):
        # What stopped training was told by training.
        notify.tell(config, "failure", decide.newest_step(config), decision.reason)
    attempts.end(
        config.run_directory,
        Attempt(
            job=options.job, restart=options.restart, began=0, step=0, ended=time.time(), ended_step=decide.newest_step(config),
            outcome=decision.kind, preempted=preempted, reason=decision.reason,
        ),
    )  # fmt: skip
    _answer(OUTCOME=decision.kind, REASON=decision.reason)
    return 0


def _at_work(directory: Path, job: str) -> str | None:
    """Says that another job trains in this directory; None where none is known to. It is only the training processes that take it."""
    from pretrain.lease import Lease
    from pretrain.status import queue

    try:
        _, owner = Lease(directory).newest()
    except OSError:
        return None
    if owner is None or owner.job in ("", job):
        return None
    found = (queue.ask([owner.job]) or {}).get(owner.job)
    if found is None or found.state != "RUNNING":
        return None
    return f"{directory} is in use by {owner}: end that run, or choose another output_dir"


def _config_files(flags: list[str]) -> list[str]:
    """Values of --config, in order."""
    named = [value for flag, value in zip(["", *flags], flags, strict=False) if flag == "--config" or value.startswith("--config=")]
    return [value.removeprefix("--config=") for value in named]


def _folder(options: argparse.Namespace, config: PretrainConfig) -> Path:
    return config.run_directory.absolute() / attempts.FOLDER / f"{options.job}.{options.restart}"


def _outcome_file(folder: Path) -> Path:
    return folder / outcome.NAME


def _mark_finished(config: PretrainConfig) -> None:
    (config.run_directory / decide.FINISHED_NAME).write_text(f"{config.train.steps}\n")


def _tell_idle(nodes: list[str], used: Fit, config: PretrainConfig) -> None:
    if used.nodes < len(nodes):
        idle = " ".join(nodes[used.nodes :])
        _say(f"{used.nodes} of {len(nodes)} nodes train, {used.data_parallel} data-parallel ranks: the global batch of "
             f"{config.train.global_batch_size} does not divide among more; {idle} stays idle")  # fmt: skip


def _tell_change(before: list[Attempt], processes: int, data_parallel: int) -> None:
    if before and before[-1].processes != processes:
        _say(f"{processes} processes now, {before[-1].processes} before: {data_parallel} data-parallel ranks; global batch and order"
             " of the samples stay as they are")  # fmt: skip


def _answer(**values: object) -> None:
    print(*(f"{name}={shlex.quote(str(value))}" for name, value in values.items()), sep="\n")


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _refuse(message: str) -> int:
    _say(*(f"error: {line}" for line in message.splitlines()))
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
