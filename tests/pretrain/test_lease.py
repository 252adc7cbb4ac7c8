"""A run directory has one live owner, and only one process takes over from a dead one."""

import dataclasses
import errno
import functools
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from pretrain import processes
from pretrain.lease import FOLDER, DirectoryInUse, Lease, LeaseLost, Owner
from tests.distributed import run_distributed
from tests.pretrain.launch import fail, losses, training, wait_for_step

PATIENCE = {"interval_s": 0.05, "patience_s": 0.6}


def _lease(directory: Path) -> Lease:
    return Lease(directory, **PATIENCE)


def _leave(directory: Path, number: int = 1, **changes) -> Path:
    """The file of an owner of another machine that died."""
    owner = dataclasses.replace(Owner.here(), **{"host": "node7", "machine": "elsewhere", "pid": 4242, **changes})
    path = directory / FOLDER / f"{number:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, owner)
    return path


def _replace(path: Path, owner: Owner) -> None:
    """As a whole: others may be reading it."""
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(owner.encode())
    beside.replace(path)


def _files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / FOLDER).iterdir())


def test_the_directory_is_owned_until_it_is_released(tmp_path):
    run = tmp_path / "run"
    first, told = _lease(run), []
    first.acquire(told.append)
    with pytest.raises(DirectoryInUse, match=rf"{run} is in use by process {os.getpid()} on .*, since .*: end that run, or choose another"):
        _lease(run).acquire(told.append)
    first.check()
    first.release()
    assert not run.exists() and told == []
    again = _lease(run)
    again.acquire(told.append)
    (run / "metrics.jsonl").write_text("")
    again.release()
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"] and told == []


def _die_holding(rank: int, directory: Path) -> None:
    _lease(directory).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_of_this_machine_that_is_gone_is_no_owner(tmp_path):
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_distributed(_die_holding, 1, tmp_path)
    assert _files(tmp_path) == ["000001.json"]
    told, lease = [], Lease(tmp_path, patience_s=1e6)
    lease.acquire(told.append)
    assert len(told) == 1 and "which is gone: taking it over" in told[0] and _files(tmp_path) == ["000002.json"]
    lease.release()


def test_a_process_number_that_another_process_has_by_now_is_no_sign_of_life(tmp_path):
    here = Owner.here()
    _leave(tmp_path, machine=here.machine, pid=os.getpid(), started_ticks=here.started_ticks - 1000)
    lease = Lease(tmp_path, patience_s=1e6)
    lease.acquire(lambda text: None)
    lease.release()


def test_an_owner_on_another_machine_is_dead_when_its_heart_stands_still(tmp_path):
    _leave(tmp_path)
    told, lease = [], _lease(tmp_path)
    lease.acquire(told.append)
    assert "belongs to process 4242 on node7" in told[0] and "looking for a sign of life" in told[0] and "taking it over" in told[1]
    lease.release()


def test_an_owner_on_another_machine_whose_heart_beats_is_named(tmp_path):
    path, ended = _leave(tmp_path, job="77"), threading.Event()

    def beat():
        owner = Owner.decode(path.read_bytes())
        while not ended.wait(0.05):
            owner = dataclasses.replace(owner, beats=owner.beats + 1)
            _replace(path, owner)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(DirectoryInUse, match="in use by process 4242 on node7, Slurm job 77"):
            Lease(tmp_path, interval_s=0.05, patience_s=60).acquire(lambda text: None)
    finally:
        ended.set()
        thread.join()


def test_a_job_that_slurm_has_started_again_goes_on_at_once(tmp_path, monkeypatch):
    _leave(tmp_path, job="77", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lease = Lease(tmp_path, patience_s=1e6)
    lease.acquire(lambda text: None)
    lease.release()


@pytest.mark.parametrize("content", [b"", b'{"host": "node7"', b"[]", b'{"host": "node7"}'])
def test_a_file_that_cannot_be_understood_is_watched_too(tmp_path, content):
    _leave(tmp_path).write_bytes(content)
    told, lease = [], _lease(tmp_path)
    lease.acquire(told.append)
    assert "belongs to process 0 on unknown" in told[0]
    lease.release()


def _contend(rank: int, directory: Path, rounds: int) -> list[str]:
    """All see the same dead owner at the same time; the winner keeps the directory until the others have given up."""
    import torch.distributed as dist

    outcomes = []
    for number in range(rounds):
        lease = _lease(directory / str(number))
        dist.barrier()
        try:
            lease.acquire(lambda text: None)
            outcomes.append("owner")
        except DirectoryInUse as error:
            outcomes.append(str(error).split(" on ")[0])
        dist.barrier()
        if outcomes[-1] == "owner":
            lease.check()
            outcomes[-1] = f"{os.getpid()}"
        lease.release()
    return outcomes


def test_of_many_that_see_a_dead_owner_one_takes_over(tmp_path):
    rounds = 5
    for number in range(rounds):
        _leave(tmp_path / str(number))
    for outcomes in zip(*run_distributed(_contend, 4, tmp_path, rounds), strict=True):
        [winner] = [outcome for outcome in outcomes if outcome.isdigit()]
        assert sum(outcome.endswith(f"in use by process {winner}") for outcome in outcomes) == 3, outcomes


def _wait(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_who_has_lost_the_directory_learns_of_it_and_leaves_it_alone(tmp_path, how):
    lease = _lease(tmp_path)
    lease.acquire(lambda text: None)
    lease.check()
    if how == "taken":
        successor = _leave(tmp_path, number=2)
    else:
        (tmp_path / FOLDER / "000001.json").unlink()
    _wait(lambda: lease._lost)
    with pytest.raises(LeaseLost, match=f"{tmp_path} was taken from this process .* by {'process 4242' if how == 'taken' else 'another'}"):
        lease.check()
    lease.release()
    assert how == "removed" or successor.exists()


def test_who_looked_long_ago_takes_no_number_behind_the_present_owner(tmp_path):
    """Between a look and the claim the dead owner's number may have been taken over and given up, several times."""
    path = _leave(tmp_path, token="dead")
    dead = Owner.decode(path.read_bytes())
    first, late = _lease(tmp_path), _lease(tmp_path)
    first.acquire(lambda text: None)
    assert _files(tmp_path) == ["000002.json"]
    assert not late._claim(0, None) and not late._claim(1, dead)
    # Its number belongs to somebody else by now, who lives; or to nobody, since numbers have begun anew.
    assert not late._claim(2, dead) and not late._claim(6, dead)
    assert _files(tmp_path) == ["000002.json"]
    first.check(now=True)
    first.release()
    assert not late._claim(1, dead), "the folder is gone with the owner"
    late.acquire(lambda text: None)
    late.release()


def test_an_owner_that_changes_between_listing_and_reading_is_found(tmp_path, monkeypatch):
    _leave(tmp_path)
    lease, read = _lease(tmp_path), Lease._read

    def overtaken(self, number):
        if number == 1:
            _leave(tmp_path, number=2, token="second")
            (tmp_path / FOLDER / "000001.json").unlink()
        return read(self, number)

    monkeypatch.setattr(Lease, "_read", overtaken)
    number, owner = lease.newest()
    assert (number, owner.token) == (2, "second")


def test_a_process_that_was_stopped_looks_before_it_believes_its_last_heartbeat(tmp_path):
    lease = Lease(tmp_path, interval_s=1000)
    lease.acquire(lambda text: None)
    _leave(tmp_path, number=2)
    lease._path(1).unlink()
    lease.check()
    lease._beaten -= 4000
    with pytest.raises(LeaseLost, match="by process 4242 on node7"):
        lease.check()
    lease.release()


def test_a_number_that_is_given_back_takes_nothing_away(tmp_path):
    """By who came too late, and saw so only then."""
    lease = Lease(tmp_path, interval_s=1000)
    lease.acquire(lambda text: None)
    _leave(tmp_path, number=2)
    threading.Timer(1.5, lease._path(2).unlink).start()
    lease.check(now=True)
    lease.release()


def test_a_file_system_that_does_not_answer_once_takes_nothing_away(tmp_path, monkeypatch):
    lease, other, failing = Lease(tmp_path, interval_s=1000), _lease(tmp_path), True
    lease.acquire(lambda text: None)
    for name in ("listdir", "scandir"):
        original = getattr(os, name)

        def stale(path=".", original=original):
            if failing and str(path).endswith(FOLDER):
                raise OSError(errno.ESTALE, "Stale file handle")
            return original(path)

        monkeypatch.setattr(os, name, stale)
    lease.check(now=True)
    with pytest.raises(OSError, match="Stale file handle"):
        other.acquire(lambda text: None)
    failing = False
    lease.check(now=True)
    lease.release()
    assert not (tmp_path / FOLDER).exists()


def test_nothing_is_left_on_a_disk_without_room(tmp_path, monkeypatch):
    run = tmp_path / "run"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    lease = _lease(run)
    with pytest.raises(OSError, match="No space left"):
        lease.acquire(lambda text: None)
    assert list((run / FOLDER).iterdir()) == []
    lease.release()
    assert not run.exists()


@dataclasses.dataclass(frozen=True)
class Quick:
    """Heartbeats follow each other closely."""

    def __call__(self, rank: int) -> None:
        import pretrain.run

        pretrain.run.Lease = functools.partial(Lease, interval_s=0.1)


def test_a_run_that_has_lost_its_directory_writes_nothing_there_any_more(shards, tmp_path):
    run = tmp_path / "run"
    tracked = ["--tracking.enabled", "true", "--tracking.system_metrics", "true", "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    batch = ["--train.global_batch_size", 4, "--train.steps", 100_000, "--checkpoint.interval", 5]
    with training("--data.path", shards, *batch, *tracked, "--output_dir", run, processes=1, before=Quick()) as process:
        wait_for_step(process, run, 2)
        _leave(run, number=2)
        # The other run's.
        (run / "run.json").write_text("of the other run")
        output, _ = process.communicate(120)
    assert process.returncode == 1 and "Traceback (most" not in output, output
    assert f"error: {run} was taken from this process" in output and "by process 4242 on node7" in output
    assert (run / "run.json").read_text() == "of the other run" and "000002.json" in _files(run)
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_heartbeat_is_seen_by_others(tmp_path):
    lease = _lease(tmp_path)
    lease.acquire(lambda text: None)
    path = tmp_path / FOLDER / "000001.json"
    size = path.stat().st_size
    _wait(lambda: Owner.decode(path.read_bytes()).beats >= 2)
    assert path.stat().st_size == size
    lease.release()


def test_a_second_run_in_the_same_directory_is_refused_and_the_first_goes_on(shards, tmp_path):
    run = tmp_path / "run"
    batch = ["--train.global_batch_size", 4, "--train.steps", 100_000]
    arguments = ["--data.path", shards, *batch, "--output_dir", run]
    with training(*arguments, processes=1) as first:
        wait_for_step(first, run, 2)
        output = fail(*arguments, processes=1)
        assert f"error: {run} is in use by process " in output and "choose another output_dir" in output
        reached = max(losses(run))
        wait_for_step(first, run, reached + 2)
        first.send_signal(signal.SIGUSR1)
        output, _ = first.communicate(timeout=300)
    assert first.returncode == 0 and "SIGUSR1: checkpoint saved after step" in output, output
    assert sorted(losses(run)) == list(range(1, max(losses(run)) + 1)) and not (run / FOLDER).exists()


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path):
    """As in a container whose first process reaps none."""
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = dataclasses.replace(Owner.here(), pid=process.pid, started_ticks=processes.started(process.pid))
        assert owner.is_dead(Owner.here()) is False
        process.kill()
        _wait(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        assert owner.is_dead(Owner.here()) is True
