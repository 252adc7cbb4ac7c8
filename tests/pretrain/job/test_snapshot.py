"""The run's own copy of the code, and what is written of where it comes from."""

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.job import provenance
from pretrain.job.snapshot import config_copy, take
from pretrain.tracking.environment import _copied

SCRIPTS = Path(__file__).parents[3] / "slurm"


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    (folder / "pretrain").mkdir(parents=True)
    (folder / "pretrain" / "train.py").write_text("first\n")
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "noise.log").write_text("not code\n")
    _git(folder, "init", "-q")
    _git(folder, "add", ".")
    _git(folder, "commit", "-qm", "first")
    return folder


def _git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


def test_is_made_once_with_what_is_not_committed(checkout, tmp_path):
    run = tmp_path / "run"
    (checkout / "pretrain" / "train.py").write_text("second\n")
    (checkout / "pretrain" / "new.py").write_text("untracked\n")
    made = take(checkout, run)
    assert made.made and made.path == run / "code"
    assert (made.path / "pretrain" / "train.py").read_text() == "second\n" and (made.path / "pretrain" / "new.py").exists()
    assert not (made.path / "noise.log").exists() and not (made.path / ".git").exists()
    assert "+second" in (made.path / "code.diff").read_text()
    record = json.loads((made.path / "code.json").read_text())
    assert record["git.commit"] == _git(checkout, "rev-parse", "HEAD").strip() and record["git.dirty"] == "true"
    assert _copied(made.path / "pretrain" / "tracking") == {"git.commit": record["git.commit"], "git.dirty": "true"}

    again = take(checkout, run)
    assert (again.made, again.differs) == (False, ())
    (checkout / "pretrain" / "train.py").write_text("third\n")
    later = take(checkout, run)
    assert (later.made, later.differs) == (False, (str(checkout),))
    assert (run / "code" / "pretrain" / "train.py").read_text() == "second\n"


def test_is_replaced_on_purpose_and_kept(checkout, tmp_path):
    run = tmp_path / "run"
    for text in ("first\n", "second\n", "third\n"):
        (checkout / "pretrain" / "train.py").write_text(text)
        assert take(checkout, run, update=True).made
    assert not take(checkout, run, update=True).made
    texts = [(run / name / "pretrain" / "train.py").read_text() for name in ("code", "code.1", "code.2")]
    assert texts == ["third\n", "first\n", "second\n"]


def test_files_of_settings_are_part_of_it(checkout, tmp_path, monkeypatch):
    run, mine, other = tmp_path / "run", tmp_path / "my settings.yaml", tmp_path / "other.yaml"
    mine.write_text("seed: 1\n")
    made = take(checkout, run, configs=[str(mine)])
    copy = config_copy(made.path, str(mine))
    assert copy.read_text() == "seed: 1\n" and take(checkout, run, configs=[str(copy)]).differs == ()
    mine.write_text("seed: 2\n")
    other.write_text("")
    again = take(checkout, run, configs=[str(mine), str(other)])
    assert (again.made, again.differs, copy.read_text()) == (False, (str(mine),), "seed: 1\n")
    assert config_copy(made.path, str(other)).exists()
    assert take(checkout, run, update=True, configs=[str(mine)]).made and copy.read_text() == "seed: 2\n"
    command = f'source {SCRIPTS}/lib.sh; CODE={made.path} FLAGS=("$@"); use_copied_settings; printf "%s\\n" "${{FLAGS[@]}}"'
    words = ["--a", "1", f"--config={mine}", "--config", str(mine), "--b", "2"]
    told = subprocess.run(["bash", "-c", command, "-", *words], check=True, capture_output=True, text=True, env={"PATH": os.defpath})
    assert told.stdout.splitlines() == ["--a", "1", f"--config={copy}", "--config", str(copy), "--b", "2"]


def test_a_change_in_another_encoding_applies(checkout, tmp_path):
    changed = checkout / "pretrain" / "train.py"
    changed.write_bytes(b"caf\xe9\r\n")
    copy = take(checkout, tmp_path / "run").path
    assert b"+caf\xe9\r\n" in (copy / "code.diff").read_bytes()
    _git(checkout, "checkout", "-q", "--", ".")
    _git(checkout, "apply", str(copy / "code.diff"))
    assert changed.read_bytes() == b"caf\xe9\r\n"


def test_what_is_no_code_is_not_copied(checkout, tmp_path):
    for name in ("corpus.jsonl", "job-7.out", "pretrain/notes.txt"):
        (checkout / name).write_text("text\n")
    found = take(checkout, tmp_path / "run")
    assert not any((found.path / name).exists() for name in ("corpus.jsonl", "job-7.out", "pretrain/notes.txt"))
    assert take(checkout, tmp_path / "run").differs == ()


def test_without_git_the_packages_are_copied(checkout, tmp_path):
    subprocess.run(["rm", "-rf", checkout / ".git"], check=True)
    (checkout / "runs").mkdir()
    (checkout / "runs" / "big").write_text("a run\n")
    found = take(checkout, tmp_path / "run")
    assert (found.path / "pretrain" / "train.py").exists() and not (found.path / "runs").exists()


def test_a_copy_that_fails_leaves_nothing(checkout, tmp_path):
    with pytest.raises(FileNotFoundError):
        take(checkout, tmp_path / "run", configs=["nowhere.yaml"])
    assert list((tmp_path / "run").iterdir()) == [] and take(checkout, tmp_path / "run").made


def test_two_jobs_begin_the_same_run_at_the_same_moment(checkout, tmp_path):
    """Both have all of it, and nothing is left over."""
    run, meet = tmp_path / "run", threading.Barrier(4)

    def begin(_):
        meet.wait()
        return take(checkout, run)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(begin, range(4)))
    assert sum(one.made for one in found) == 1 and {one.path for one in found} == {run / "code"}
    assert take(checkout, run).differs == () and [path.name for path in run.iterdir()] == ["code"]


def test_a_copy_that_has_lost_files_is_told(checkout, tmp_path):
    run = tmp_path / "run"
    (take(checkout, run).path / "pretrain" / "train.py").unlink()
    with pytest.raises(ValueError, match="code is not complete, pretrain/train.py is missing: UPDATE_CODE=1 replaces it"):
        take(checkout, run)
    again = take(checkout, run, update=True)
    assert (again.made, again.kept) == (True, "code.1") and take(checkout, run).differs == ()


def test_secrets_are_not_written_down(tmp_path):
    lines = provenance.environment(
        {
            "HF_TOKEN": "abc",
            "AWS_SECRET_ACCESS_KEY": "def",
            "DB_PASSWORD": "x",
            "HOME": "/home/me",
            "URL": "http://me:secret@host/x",
            "A": "1\n2",
        }
    )
    text = "\n".join(lines)
    assert not any(secret in text for secret in ("abc", "def", "=x\n", "me:secret"))
    assert "HOME=/home/me" in lines and "URL=http://(not shown)@host/x" in lines and "A=1\\n2" in lines


def test_packages_are_those_that_python_sees(tmp_path):
    provenance.write(tmp_path / "start")
    assert any(line.startswith("torch==") for line in (tmp_path / "start" / "packages.txt").read_text().splitlines())
