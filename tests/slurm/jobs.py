"""Submitting the scripts of slurm/ as a user would, with a tiny model on CPUs."""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.pretrain.finished import ARGUMENTS, uri
from tests.pretrain.launch import TINY, journal
from tests.slurm.cluster import ENDED, Cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
INSIDE = Path(__file__).parent / "inside"
START_S = 120
"""From a submission, or a requeue, to something the job does, on a machine that is busy."""


@dataclass
class Job:
    """A submitted job."""

    cluster: Cluster
    folder: Path
    """Where it was submitted: log, run directory `run`, MLflow's database."""
    id: str
    times: dict[str, float] = field(default_factory=dict)
    """What happened when, time.time()."""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> str:
        """Of all jobs that were submitted from there."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.out")))

    def wait(self, timeout: float = START_S, states: tuple[str, ...] = ENDED) -> dict[str, str]:
        """What Slurm says of it once it is in one of the states. Raises TimeoutError with the log."""
        try:
            return self.cluster.wait(self.id, timeout, states)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log}\n{self.cluster.logs()}") from error

    def finish(self, timeout: float = START_S) -> str:
        """Wait for its end; the log. Fails where it did not complete."""
        found = self.wait(timeout)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), f"{found}\n{self.log}"
        return self.log

    def until(self, condition: Callable[[], object], what: str, timeout: float = START_S, ended: bool = False) -> None:
        """Raises TimeoutError, or AssertionError where the job ends before.

        ended: it may be at its end by what Slurm says, while its processes still are at work.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not after {timeout} s\n{self.log}\n{self.cluster.logs()}")
            assert ended or self.cluster.job(self.id)["JobState"] not in ENDED, f"{what}: ended before\n{self.log}"
            time.sleep(0.1)
        self.times[what] = time.time()

    def until_said(self, text: str, timeout: float = START_S) -> None:
        self.until(lambda: text in self.log, text, timeout)

    def until_waiting(self, restart: int = 0) -> None:
        """For a process that TEST_FAULT lets wait in this start."""
        self.until((self.folder / f"waits.{restart}").exists, "waits")

    def go_on(self, restart: int = 0) -> None:
        (self.folder / f"go.{restart}").touch()

    def signal(self, *arguments: str) -> None:
        self.times["signal"] = time.time()
        self.cluster.client("scancel", *arguments, self.id)

    def warn(self) -> None:
        """The time limit's signal, to an element of an array as well: to one scancel sends it again and again, and waits for long."""
        deadline = time.monotonic() + START_S
        while "USR1: the training processes are to finish" not in self.log:
            assert time.monotonic() < deadline, self.log
            self.cluster.client("timeout", "3", "scancel", "--batch", "--signal=USR1", self.id, check=False)
            time.sleep(1)

    def give_time(self) -> None:
        """The time limit is no matter any more."""
        self.cluster.client("scontrol", "update", f"JobId={self.id}", "TimeLimit=60")

    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])

    def seconds_to_requeue(self) -> float:
        """From the signal to when the job was in the queue again."""
        return self.times["requeued"] - self.times["signal"]

    def seconds_to_step(self, step: int) -> float:
        """From there to the end of the first step after it."""
        taken = next(entry["timestamp_ms"] for entry in journal(self.run) if entry["step"] == step)
        return taken / 1000 - self.times["requeued"]


def submit(
    cluster: Cluster, folder: Path, *flags: object, script: str = "pretrain_7b_qsparse.sh", options: tuple[str, ...] = ("--nodes=2",),
    env: dict[str, str] | None = None,
) -> Job:  # fmt: skip
    """`sbatch options slurm/SCRIPT flags` in `folder`, with what a site of CPUs has in its environment."""
    id_ = cluster.sbatch(*options, SCRIPTS / script, *flags, cwd=folder, env=environment(folder) | (env or {}))
    return Job(cluster, folder, id_)


def environment(folder: Path) -> dict[str, str]:
    return {
        "QSPARSE_PROCESSES_PER_NODE": "1",
        "QSPARSE_SETUP": f"PATH={Path(sys.executable).parent}:$PATH",
        "QSPARSE_SCRATCH": str(folder),
        "PYTHONPATH": f"{INSIDE}:{ROOT}",
        "PREFLIGHT": "0",
        "TEST_FAULT_FOLDER": str(folder),
    }


def flags(folder: Path, shards: Path, *more: object) -> list[object]:
    """A run of 12 steps, tracked in the folder's own MLflow; the same as `tests.pretrain.finished.start`."""
    config = ["--config", ROOT / "pretrain/configs/tiny_qsparse.yaml"]
    return [*config, "--data.path", shards, "--output_dir", folder / "run", *LIKE_FINISHED, *TINY, *ARGUMENTS, *more]


LIKE_FINISHED = [
    *("--validation.samples", 32, "--schedule.min_lr", 0, "--train.seed", 0, "--tracking.experiment", "megatron-qsparse"),
    *("--tracking.run_name", "run", "--qsparse.groups", 8),
]
"""What the file of configuration says otherwise than the defaults."""


def tracked(folder: Path, database: Path, **env: str) -> dict[str, str]:
    """Environment of a job that ships to a database of its own and writes down its samples."""
    shutil.copy(database, folder)
    return {"MLFLOW_TRACKING_URI": uri(folder), "TEST_SAMPLES": str(folder / "samples.jsonl"), **env}


WAITS_AT_5 = "0 wait 5 0"
"""Rank 0, before step 5 of the first start."""


def start(cluster, folder, shards, database, *more, **options):
    """The run that is compared with the unbroken one. fault: TEST_FAULT; options: of `submit`."""
    env = tracked(folder, database, TEST_FAULT=options.pop("fault", WAITS_AT_5)) | options.pop("env", {})
    return submit(cluster, folder, *flags(folder, shards, *more), env=env, **options)
