"""The whole stack on one machine: text -> tokenizer -> shards -> four runs -> report. `make quickstart` calls this.

Every step is a command that is printed before it runs, so that each can be repeated, changed and used alone. Steps that are
done already are skipped: an interrupted quickstart goes on where it was.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from data_tools.arguments import Parser, named_path

RUNS = ("dense", "qsparse", "bitnet", "bitnet_qsparse")
CONFIGS = Path(__file__).parent / "configs"


def main(args: list[str] | None = None) -> int:
    parser = Parser(prog="python -m pretrain.quickstart", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=named_path, default=Path("quickstart"), help="folder for everything (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes of each run (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: as in the configs)")
    options = parser.parse_args(args)

    started = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    # torchrun would set it for more than one process, with a warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(options.output / 'mlflow.db').absolute()}"
    commands = data_commands(options.output)
    commands += run_commands(options.output, options.processes, options.steps, uri)
    commands.append(report_command(options.output, uri, full_length=options.steps is None))
    try:
        for number, command in enumerate(commands, start=1):
            print(f"\n[{number}/{len(commands)}, {time.monotonic() - started:.0f} s] {shown(command)}", flush=True)
            status = subprocess.run(command).returncode
            if status:
                print(
                    f"error: the command above ended with status {status}; mend the cause and start the quickstart again", file=sys.stderr
                )
                return 1
    except KeyboardInterrupt:
        print("interrupted: start the quickstart again to go on from what is done", file=sys.stderr)
        return 130
    print(f"\nquickstart: done in {time.monotonic() - started:.0f} s; open {options.output / 'report' / 'index.html'}")
    return 0


def data_commands(output: Path) -> list[list[str]]:
    """Corpus, tokenizer and shards; each command itself skips what exists."""
    corpus, tokenizer, shards = (str(output / name) for name in ("corpus.jsonl.zst", "tokenizer", "shards"))
    tool = [sys.executable, "-m", "data_tools"]
    return [
        [*tool, "corpus", "stdlib", "--output", corpus],
        [*tool, "train-tokenizer", "--input", corpus, "--vocab-size", "1024", "--output", tokenizer],
        [*tool, "tokenize", "--input", corpus, "--tokenizer", tokenizer, "--output", shards, "--validation-fraction", "0.015"],
    ]


def run_commands(output: Path, processes: int, steps: int | None, uri: str) -> list[list[str]]:
    """One command a run: training, or for a run that has reached its last step the shipping of what MLflow may lack."""
    commands = []
    for name in RUNS:
        run = str(output / "runs" / name)
        flags = ["--config", str(CONFIGS / f"tiny_{name}.yaml"), "--data.path", str(output / "shards"), "--output_dir", run]
        flags += ["--tracking.uri", uri]
        if steps is not None:
            flags += ["--train.steps", str(steps), "--schedule.warmup_steps", str(max(1, steps // 10))]
        if settled(flags):
            print(f"{run} is complete")
        else:
            commands.append([*torchrun(processes), "-m", "pretrain.train", *flags])
    return commands


def torchrun(processes: int) -> list[str]:
    """Start of a command line that runs a module in this many processes on this machine, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def settled(flags: list[str]) -> bool:
    """Whether the newest complete checkpoint is that of the last step; if so, MLflow is brought up to date as well."""
    from pretrain.checkpoint.directory import CheckpointDirectory, step_of
    from pretrain.config import parse
    from pretrain.tracking import settle

    config = parse(flags)
    try:
        newest = CheckpointDirectory(config.run_directory / "checkpoints", config.checkpoint.keep_last).newest()
    except ValueError:
        # All are damaged: the training command says so and what to do.
        return False
    if newest is None or step_of(newest) < config.train.steps:
        return False
    settle(config.tracking, config.run_directory)
    return True


def report_command(output: Path, uri: str, full_length: bool) -> list[str]:
    """The report; runs of full length must be well below what token frequencies alone explain."""
    command = [sys.executable, "-m", "pretrain.compare", "--experiment", "quickstart", "--output", str(output / "report"), "--uri", uri]
    return [*command, "--require-under-unigram", "1.5"] if full_length else command


def shown(command: list[str]) -> str:
    """The command as a person would type it from the activated environment."""
    text = shlex.join(command[1:])
    return (
        "python " + text if not text.startswith("-m torch.distributed.run") else "torchrun" + text.removeprefix("-m torch.distributed.run")
    )


if __name__ == "__main__":
    sys.exit(main())
