"""The run's own copy of the code, and what is written of where it comes from."""

import json
import subprocess

import pytest

from pretrain.job import provenance
from pretrain.job.snapshot import take
from pretrain.tracking.environment import _copied


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
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True).stdout


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
    assert (again.made, again.differs) == (False, False)
    (checkout / "pretrain" / "train.py").write_text("third\n")
    later = take(checkout, run)
    assert (later.made, later.differs) == (False, True)
    assert (run / "code" / "pretrain" / "train.py").read_text() == "second\n"


def test_is_replaced_on_purpose_and_kept(checkout, tmp_path):
    run = tmp_path / "run"
    for text in ("first\n", "second\n", "third\n"):
        (checkout / "pretrain" / "train.py").write_text(text)
        assert take(checkout, run, update=True).made
    assert not take(checkout, run, update=True).made
    texts = [(run / name / "pretrain" / "train.py").read_text() for name in ("code", "code.1", "code.2")]
    assert texts == ["third\n", "first\n", "second\n"]


def test_without_git_the_packages_are_copied(checkout, tmp_path):
    subprocess.run(["rm", "-rf", checkout / ".git"], check=True)
    (checkout / "runs").mkdir()
    (checkout / "runs" / "big").write_text("a run\n")
    found = take(checkout, tmp_path / "run")
    assert (found.path / "pretrain" / "train.py").exists() and not (found.path / "runs").exists()


def test_a_copy_that_was_cut_short_is_made_anew(checkout, tmp_path):
    run = tmp_path / "run"
    (run / ".code.partial").mkdir(parents=True)
    (run / ".code.partial" / "half").write_text("")
    assert take(checkout, run).made and not (run / "code" / "half").exists()


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
