"""notify.command: run once for each event of real runs, apart from them, and ended when its time is over."""

import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from pretrain import notify
from pretrain.config import PretrainConfig
from pretrain.progress import Progress
from pretrain.watchdog import Watchdog
from tests.pretrain.faults import Fault
from tests.pretrain.launch import TIMEOUT_S, training
from tests.pretrain.notified import NOTIFY, log, told


@pytest.mark.matrix
def test_a_rank_that_is_killed_is_told_by_one_that_loses_contact(shards, tmp_path):
    """Those that fail, hang, spike and finish are told in test_failures and test_spikes."""
    run = tmp_path / "run"
    batch = ["--train.micro_batch_size", 2, "--train.global_batch_size", 8, "--validation.samples", 8, "--train.steps", 100000]
    with training("--data.path", shards, "--output_dir", run, *batch, *NOTIFY, before=Fault(1, 4, "step", "killed")) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode, output
    ((event, _, _, step, message),) = told(run)
    assert (event, step) == ("failure", "4") and message.startswith("rank 0: ends in step 4")
    assert "lost contact with another rank, which says why or was killed" in message


def test_it_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    notify.send('read line < "$QSPARSE_RUN_DIR/pipe"', "stall", tmp_path, 3, "hangs", timeout_s=300)
    assert notify._running[-1].poll() is None
    # For reading too, so that opening it waits for nobody.
    with (tmp_path / "pipe").open("r+b", buffering=0) as pipe:
        pipe.write(b"go on\n")
        log(tmp_path, "ended with status 0")
    notify.linger()


def test_a_command_that_takes_too_long_is_ended(tmp_path, capfd):
    notify.send("echo begun; sleep 600 & sleep 600", "stall", tmp_path, 3, "first\nsecond \0 \x1b[31m", timeout_s=5.0)
    text = log(tmp_path, "was killed after 5 s")
    assert "stall at step 3: first\n" in text and "begun\n" in text
    notify.linger()
    assert "warning: notify.command for stall was killed after 5 s (notify.timeout_s); its output is in " in capfd.readouterr().err


def test_a_command_that_fails_is_told_in_a_line(tmp_path, capfd):
    notify.send("echo no such host >&2; exit 7", "finish", tmp_path, 3, "done")
    notify.linger()
    said = capfd.readouterr().err
    assert said == f"warning: notify.command for finish ended with status 7; its output is in {tmp_path / notify.LOG_NAME}\n"
    assert "no such host\n" in log(tmp_path, "ended with status 7")
    # A run directory that is gone; and a text that no environment takes.
    notify.send("true", "finish", tmp_path / "gone", 3, "x" * 10**6)
    notify.send("true", "failure", tmp_path, 3, "\ud800")
    notify.linger()
    assert "Traceback" not in capfd.readouterr().err


def test_spikes_are_told_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(notify, "_told", {})
    config = PretrainConfig(output_dir=str(tmp_path))
    notify.tell(config, "finish", 1, "no command")
    config.notify.command = "echo $QSPARSE_EVENT$QSPARSE_STEP"
    for step in (1, 2):
        notify.tell(config, "spike", step, "loss")
    notify.tell(config, "finish", 3, "done")
    notify.linger()
    text = (tmp_path / notify.LOG_NAME).read_text()
    assert "spike1\n" in text and "spike2" not in text and "finish3\n" in text
    monkeypatch.setattr(notify, "QUIET_S", 0.0)
    notify.tell(config, "spike", 4, "loss")
    notify.linger()
    assert "spike4\n" in (tmp_path / notify.LOG_NAME).read_text()


def test_a_process_that_ends_waits_for_the_command_and_no_torch_is_needed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pretrain import notify\n"
        "notify.send('sleep 0.5; echo there', 'failure', Path(sys.argv[1]), 1, 'gave up'); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert (tmp_path / notify.LOG_NAME).read_text().splitlines()[1] == "there"


@dataclass
class Board:
    """A store that answers this."""

    answer: bool | None

    def first(self, key: str) -> bool | None:
        return self.answer


@pytest.mark.parametrize(("rank", "answer", "told_by"), [(0, True, True), (1, False, False), (0, None, False), (2, None, True)])
def test_the_end_is_told_by_the_first_or_where_the_store_is_gone_by_the_next_machine(rank, answer, told_by, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    seen = []
    watchdog = SimpleNamespace(
        rank=rank, size=4, tell=lambda *event: seen.append(event), progress=Progress(), _blackboard=Board(answer)
    )  # fmt: skip
    Watchdog.alarm(watchdog, "stall", "hangs", Watchdog.speaks.fget(watchdog))
    assert seen == ([("stall", 0, "hangs")] if told_by else [])
    watchdog.size = 2
    assert Watchdog.speaks.fget(watchdog) == (rank == 0)
