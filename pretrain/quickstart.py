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

RUNS = ("dense", "qsparse", "bitnet", "bitnet_qsparse")
CONFIGS = Path(__file__).parent / "configs"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.quickstart", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for everything (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes of each run (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: as in the configs)")
    options = parser.parse_args(args)

    started = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    environment.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(options.output / 'mlflow.db').absolute()}")
    commands = [
        *data_commands(options.output),
        *run_commands(options.output, options.processes, options.steps),
        report_command(options.output),
    ]
    for number, command in enumerate(commands, start=1):
        print(f"\n[{number}/{len(commands)}, {time.monotonic() - started:.0f} s] {shown(command)}", flush=True)
        status = subprocess.run(command, env=environment).returncode
        if status:
            print(f"error: the command above ended with status {status}; mend the cause and start the quickstart again", file=sys.stderr)
            return 1
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


def run_commands(output: Path, processes: int, steps: int | None) -> list[list[str]]:
    """One training command a run; runs that have reached their last step are left out."""
    commands = []
    for name in RUNS:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "pretrain.train",
        ]
        flags = [
            "--config",
            str(CONFIGS / f"tiny_{name}.yaml"),
            "--data.path",
            str(output / "shards"),
            "--output_dir",
            str(output / "runs" / name),
        ]
        if steps is not None:
            flags += ["--train.steps", str(steps), "--schedule.warmup_steps", str(max(1, steps // 10))]
        if is_complete(flags):
            print(f"{output / 'runs' / name} is complete")
        else:
            commands.append([*command, *flags])
    return commands


def is_complete(flags: list[str]) -> bool:
    """Whether the newest complete checkpoint of this run is that of its last step."""
    from pretrain.checkpoints import CheckpointDirectory, step_of
    from pretrain.config import parse

    config = parse(flags)
    newest = CheckpointDirectory(config.run_directory / "checkpoints", config.checkpoint.keep_last).newest()
    return newest is not None and step_of(newest) >= config.train.steps


def report_command(output: Path) -> list[str]:
    return [sys.executable, "-m", "pretrain.compare", "--experiment", "quickstart", "--output", str(output / "report")]


def shown(command: list[str]) -> str:
    """The command as a person would type it from the activated environment."""
    text = shlex.join(command[1:])
    return (
        "python " + text if not text.startswith("-m torch.distributed.run") else "torchrun" + text.removeprefix("-m torch.distributed.run")
    )


if __name__ == "__main__":
    sys.exit(main())
