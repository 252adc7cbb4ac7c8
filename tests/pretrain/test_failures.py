"""A rank that fails, dies or hangs: the others end soon, and what is said first is what happened."""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from pretrain.blackboard import Blackboard
from pretrain.callbacks.signals import AGAIN_S, JOB_VARIABLE
from pretrain.job.outcome import VARIABLE
from pretrain.lease import FOLDER, Owner
from pretrain.status import facts, state
from tests.pretrain import notified
from tests.pretrain.faults import Fault
from tests.pretrain.forked import ForkedRun, _free_port
from tests.pretrain.launch import TIMEOUT_S, TINY, journal, started, training, wait_for_step

ARGUMENTS = [
    *("--train.micro_batch_size", 2, "--train.global_batch_size", 8, "--validation.samples", 8, "--train.steps", 100000),
    *("--checkpoint.interval", 1000),
]


def _launched(fault: str, shards, run) -> tuple[int, str, float]:
    """(exit status, output up to the launcher's own, seconds from the first step to the end) under the real launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.pretrain.faults"]
    arguments = [str(value) for value in (*TINY, "--data.path", shards, "--output_dir", run, *ARGUMENTS)]
    with started([*launcher, *arguments], env={"FAULT": fault, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        lines, begun = [], None
        for line in process.stdout:
            lines.append(line)
            if begun is None and line.startswith("step 1/"):
                begun = time.monotonic()
        process.wait()
    assert begun is not None, "".join(lines)
    output = "".join(lines)
    # torchrun ends with a traceback of its own, behind a page about the workers.
    assert "ChildFailedError" in output
    return (
        process.returncode,
        output[: output.index("torch.distributed.elastic.multiprocessing.errors")].rpartition("Traceback")[0],
        time.monotonic() - begun,
    )


@pytest.mark.parametrize("fault", ["1,4,step,raises", pytest.param("1,4,step,killed", marks=pytest.mark.matrix)])
def test_under_the_launcher_the_others_end_and_the_cause_is_told_first(shards, tmp_path, fault):
    status, output, seconds = _launched(fault, shards, tmp_path / "run")
    assert status == 1 and seconds < 60
    if fault.endswith("raises"):
        assert output.count("Traceback (most recent call last)") == 1
        told = output.index("rank 1 (")
        assert output.index(") failed in step 4: computing\nTraceback (most", told) < output.index("ArithmeticError: a fault of this test")
        assert "lost contact" not in output[:told]
    else:
        assert "Traceback (most" not in output and "rank 0: ends in step 4: computing, it has lost contact" in output


@pytest.mark.parametrize(("where", "rank", "doing"), [("data", 1, "waiting for data"), ("callback", 0, "logging")])
def test_the_failing_rank_says_what_it_did(shards, tmp_path, where, rank, doing):
    arguments = ["--data.path", shards, "--output_dir", tmp_path / "run", *ARGUMENTS, *notified.NOTIFY]
    with training(*arguments, before=Fault(rank, 3, where, "raises")) as process:
        output, _ = process.communicate(60)
    assert process.returncode == 1
    assert output.count("Traceback (most recent call last)") == 1 and "ArithmeticError: a fault of this test" in output
    assert f"rank {rank} (" in output and f") failed in step 3: {doing}\n" in output
    assert f"rank {1 - rank}: ends in step " in output and "lost contact with another rank" in output
    ((event, _, _, step, message),) = notified.told(tmp_path / "run")
    assert (event, step) == ("failure", "3") and message.startswith(f"rank {rank} (")
    assert message.endswith(f") failed in step 3: {doing}: ArithmeticError: a fault of this test")


@dataclass(frozen=True)
class LinkFails:
    """One rank's connection breaks while the ranks meet."""

    outcome: str

    def __call__(self, rank: int) -> None:
        os.environ[VARIABLE] = self.outcome
        if rank == 1:
            dist.init_process_group = self._fail

    @staticmethod
    def _fail(*_, **__):
        raise dist.DistStoreError("a fault of this test")


def test_a_failure_while_the_ranks_meet_is_no_refusal(shards, tmp_path):
    """Another start of the job may well succeed."""
    outcome = tmp_path / "outcome.json"
    arguments = ["--data.path", shards, "--output_dir", tmp_path / "run", *ARGUMENTS]
    with training(*arguments, before=LinkFails(str(outcome))) as process:
        process.processes[1].join(60)
        assert process.processes[1].exitcode == 1 and not outcome.exists()
        assert ") failed meeting the other ranks\nTraceback" in process.output and "DistStoreError: a fault" in process.output


@dataclass(frozen=True)
class From:
    """Nothing counts as a hang or a silence before that step: how long a start takes is not what is tested."""

    step: int
    before: Callable[[int], None]

    def __call__(self, rank: int) -> None:
        from pretrain.progress import Progress
        from pretrain.watchdog import Watchdog

        standing, silent = Progress.standing_s.fget, Watchdog._silent
        Progress.standing_s = property(lambda progress: standing(progress) if progress.now.step >= self.step else 0.0)
        Watchdog._silent = lambda watchdog: silent(watchdog) if watchdog.progress.now.step >= self.step else {}
        self.before(rank)


def _hang(fault: Fault, told: str, *marks):
    return pytest.param(fault, told, id=f"{fault.where}-{fault.what}", marks=marks)


HANGS = [
    _hang(Fault(1, 4, "data", "sleeps"), "rank 1 in step 4: waiting for data"),
    _hang(Fault(1, 4, "step", "sleeps"), "rank 1 in step 4: computing", pytest.mark.matrix),
    _hang(Fault(0, 4, "callback", "sleeps"), "rank 0 in step 4: logging", pytest.mark.matrix),
    _hang(Fault(1, 4, "step", "stopped"), "rank 1 does not answer, last heard of "),
]


@pytest.mark.parametrize(("fault", "told"), HANGS)
def test_a_hang_names_the_rank_that_the_others_wait_for(shards, tmp_path, fault, told):
    arguments = ["--data.path", shards, "--output_dir", tmp_path / "run", *ARGUMENTS, *notified.NOTIFY, "--train.hang_timeout_s", 4]
    with training(*arguments, before=From(fault.step, fault)) as process:
        other = process.processes[1 - fault.rank]
        other.join(TIMEOUT_S)
        output, code = process.output, other.exitcode
        if fault.what == "sleeps":
            output, _ = process.communicate(60)
    assert code == 1, output
    ((event, _, _, step, message),) = notified.told(tmp_path / "run")
    assert (event, step) == ("stall", "4") and "): no progress for " in message
    line = next(line for line in output.splitlines() if line.startswith(f"rank {1 - fault.rank} ("))
    assert "no progress for " in line and f"; waiting for ranks [{fault.rank}]: {told}" in line
    if fault.what == "sleeps":
        own = output.index(f"rank {fault.rank} (")
        assert own < output.index(f"rank {1 - fault.rank} (") and "; the others wait for this rank; its stack:" in output
        assert "in <lambda>" in output[own:] and "faults.py" in output[own:], "the stack shows where"


@dataclass(frozen=True)
class Silenced:
    """A rank stands still, as with its machine gone under NCCL, and is given up soon."""

    rank: int

    def __call__(self, rank: int) -> None:
        from pretrain import watchdog

        watchdog.SILENCE_S, watchdog.MAX_TICK_S = 5.0, 0.5
        Fault(self.rank, 4, "step", "stopped")(rank)


@pytest.mark.parametrize("silent", [1, pytest.param(0, marks=pytest.mark.matrix)])
def test_a_rank_without_a_sign_of_life_ends_the_others_long_before_a_hang_would(shards, tmp_path, silent):
    arguments = ["--data.path", shards, "--output_dir", tmp_path / "run", *ARGUMENTS, "--train.hang_timeout_s", 1800]
    with training(*arguments, before=From(4, Silenced(silent))) as process:
        other = process.processes[1 - silent]
        other.join(60)
        assert other.exitcode == 1, process.output
        told = f"rank {1 - silent}: ends in step 4: computing, there was no sign of life for 5 s from rank {silent} ("
        assert told in process.output


def _wait_until_stopped(process: ForkedRun) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while any(psutil.Process(one.pid).status() != psutil.STATUS_STOPPED for one in process.processes):
        assert time.monotonic() < deadline, process.output
        time.sleep(0.02)


@dataclass(frozen=True)
class Hasty:
    """Ranks are given up soon. Where the file is there a rank stops by itself, once, in the middle of the watchdog's look."""

    stop: Path

    def __call__(self, rank: int) -> None:
        from pretrain import watchdog

        watchdog.SILENCE_S, watchdog.MAX_TICK_S, watchdog.STOPPED_S = 5.0, 0.5, 2.0
        publish, stops = watchdog.Watchdog._publish, [signal.SIGSTOP]

        def publishing(*args, **kwargs) -> None:
            if self.stop.exists() and stops:
                os.kill(os.getpid(), stops.pop())
            publish(*args, **kwargs)

        watchdog.Watchdog._publish = publishing


@pytest.mark.parametrize("moment", ["in a look", pytest.param("at any", marks=pytest.mark.matrix)])
def test_a_run_that_is_suspended_goes_on(shards, tmp_path, moment):
    """As Slurm does for jobs that must wait, node after node; longer than a hang and a silence may last."""
    run, stop = tmp_path / "run", tmp_path / "stop"
    arguments = ["--data.path", shards, "--output_dir", run, *ARGUMENTS, "--train.hang_timeout_s", 6]
    with training(*arguments, before=From(3, Hasty(stop))) as process:
        wait_for_step(process, run, 3)
        if moment == "in a look":
            stop.touch()
        else:
            process.send_signal(signal.SIGSTOP)
        _wait_until_stopped(process)
        time.sleep(8)
        seen = {later: state.judge(facts.read(run, time.time() + later), None, time.time() + later) for later in (0, 3600)}
        assert [status.state for status in seen.values()] == ["training", "stalled"] and seen[0].eta_s > 0
        reached = journal(run)[-1]["step"]
        for one in process.processes:
            os.kill(one.pid, signal.SIGCONT)
            time.sleep(0.5)
        # Two looks of the watchdog later.
        wait_for_step(process, run, reached + 20)
        time.sleep(2)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(60)
    assert process.returncode == 0 and "no sign of life" not in output and "no progress" not in output, output


def test_processes_that_torchrun_starts_again_do_not_find_what_ended_those_before(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    first = Blackboard()
    first.write("hang", "1")
    first.write_state(3, {"beat": 1})
    assert first.has("hang") and first.states([3, 4]) == {3: {"beat": 1}, 4: None} and first.states([]) == {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Blackboard()
    assert not again.has("hang") and again.states([3]) == {3: None}
    assert [board.first("alarm") for board in (again, Blackboard(), again)] == [True, False, False]
    del store
    assert again.states([3]) == {} and not again.has("hang") and again.first("alarm") is None


@dataclass(frozen=True)
class Patient:
    """The run directory's last owner, on another machine, is watched for so long."""

    patience_s: float

    def __call__(self, rank: int) -> None:
        import functools

        import pretrain.run

        pretrain.run.Lease = functools.partial(pretrain.run.Lease, interval_s=0.2, patience_s=self.patience_s)


def test_what_may_take_its_time_is_no_hang(shards, tmp_path):
    """The last owner of the directory is looked for, and a server that is down waited for, for longer than a step may take."""
    run = tmp_path / "run"
    (run / FOLDER).mkdir(parents=True)
    (run / FOLDER / "000001.json").write_bytes(dataclasses.replace(Owner.here(), machine="elsewhere").encode())
    arguments = ["--data.path", shards, "--output_dir", run, *ARGUMENTS, "--train.steps", 2, "--train.hang_timeout_s", 6]
    tracked = ["--tracking.enabled", "true", "--tracking.uri", f"http://127.0.0.1:{_free_port()}", "--tracking.drain_timeout_s", 8]
    with training(*arguments, *tracked, before=Patient(8.0)) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, output
    assert "which is gone: taking it over" in output and "MLflow does not take the metrics" in output and "no progress" not in output


def _told(process: ForkedRun, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in process.output:
        assert time.monotonic() < deadline, process.output
        time.sleep(0.05)


@dataclass(frozen=True)
class Blocked:
    """Rank 0 waits for the other one in step 4."""

    in_job: bool

    def __call__(self, rank: int) -> None:
        os.environ[JOB_VARIABLE] = "a folder" if self.in_job else ""
        Fault(1, 4, "step", "sleeps")(rank)


@pytest.mark.parametrize("in_job", [False, True])
def test_a_signal_is_answered_at_once_and_a_second_one_obeyed_though_the_rank_is_blocked(shards, tmp_path, in_job):
    """Of a job there may be copies that come late."""
    run = tmp_path / "run"
    with training("--data.path", shards, "--output_dir", run, *ARGUMENTS, before=Blocked(in_job)) as process:
        wait_for_step(process, run, 3)
        rank = process.processes[0]
        os.kill(rank.pid, signal.SIGTERM)
        second = "SIGINT" if in_job else "SIGTERM or SIGINT"
        _told(process, f"SIGTERM: finishing the step and saving, then ending; a second {second} ends at once")
        # The launcher's copy of the same signal.
        os.kill(rank.pid, signal.SIGTERM)
        rank.join(AGAIN_S + 2)
        assert rank.exitcode is None
        if in_job:
            os.kill(rank.pid, signal.SIGTERM)
            rank.join(2)
            assert rank.exitcode is None
        last = signal.SIGINT if in_job else signal.SIGTERM
        os.kill(rank.pid, last)
        rank.join(30)
        assert rank.exitcode == 128 + last
        assert f"{last.name} again: ending at once, without a checkpoint of this step" in process.output


@dataclass(frozen=True)
class Deaf:
    """As with NCCL, rank 0 does not notice by itself that the other one is gone."""

    def __call__(self, rank: int) -> None:
        import pretrain.callbacks.signals

        pretrain.callbacks.signals.LOST_S = 0.5
        Fault(0, 4, "step", "sleeps")(rank)


def test_a_rank_that_is_told_to_end_notices_that_another_is_gone(shards, tmp_path):
    run = tmp_path / "run"
    with training("--data.path", shards, "--output_dir", run, *ARGUMENTS, before=Deaf()) as process:
        wait_for_step(process, run, 3)
        process.processes[1].kill()
        output, _ = process.communicate(25)
    assert process.processes[0].exitcode == 1
    assert "rank 0: ends in step 4: computing, the processes of ranks [1] are gone" in output
