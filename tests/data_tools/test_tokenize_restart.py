"""Jobs that are killed, whose work files are lost, or whose inputs change: what is kept, and the same bytes in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data_tools import tokenize as tokenize_module
from data_tools.errors import DataError
from data_tools.tokenize import tokenize
from tests.data_tools.helpers import ENVIRONMENT, SMALL, assert_clear_error, folder_bytes, job_options, run, tokenize_here, write_jsonl
from tests.data_tools.stopping import stopped


@pytest.fixture(scope="module")
def many_inputs(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> list[Path]:
    """A hundred files, each a unit, so that a job can be caught in the middle; every third document is a duplicate."""
    folder = tmp_path_factory.mktemp("many")
    generator = random.Random(1)
    files = []
    for index in range(100):
        lines = [f"{index} {number} {generator.choice(texts)}" if number % 3 else texts[number] for number in range(24)]
        files.append(write_jsonl(folder / f"{index:03d}.jsonl", lines))
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, many_inputs: list[Path], tokenizer: Path) -> dict[str, bytes]:
    """The output of the job over `many_inputs` when nothing happens to it."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    tokenize(many_inputs, tokenizer, output, job_options(backend="tokenizers"), workers=1)
    return folder_bytes(output)


IN_HASH_PASS, IN_TOKENIZATION, AFTER_A_SHARD = ("hash/*.npz", 3), ("tokens/*.npz", 3), ("shards/train-*.json", 2)
"""Files that there are in the work folder then, and how many."""


def killed(process: subprocess.Popen) -> None:
    """With it its workers, by themselves."""
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=20)[1] == [], "workers must not outlive a killed parent"
    process.communicate()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("moment", [IN_HASH_PASS, IN_TOKENIZATION, AFTER_A_SHARD], ids=["hash", "tokenize", "shard"])
def test_killed_and_started_again(
    tmp_path: Path,
    tokenizer: Path,
    many_inputs: list[Path],
    undisturbed: dict[str, bytes],
    moment: tuple[str, int],
    workers: int,
) -> None:
    output, work = tmp_path / "out", tmp_path / "out" / ".tokenize"
    arguments = ("tokenize", "--input", *many_inputs, "--tokenizer", tokenizer, "--output", output, "--backend", "tokenizers")
    arguments = (*arguments, "--unit-bytes", 20_000, *SMALL)
    killed(stopped(work, *moment, *arguments, "--workers", workers))
    assert not (output / "manifest.json").exists()
    hashed, tokenized = len(list(work.glob("hash/*.npz"))), len(list(work.glob("tokens/*.npz")))
    assert 0 < tokenized < 100 if moment is not IN_HASH_PASS else 0 < hashed < 100 and tokenized == 0

    kept = {path: path.stat().st_mtime_ns for path in work.glob("*/*.npz")}
    # The second run is killed as well, once it has gone on, to see that it does not start anew.
    killed(stopped(work, "*/*.npz", len(kept) + 2, *arguments, "--workers", 3 - workers))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    result = run(*arguments, "--workers", workers)
    assert result.returncode == 0, result.stderr
    assert folder_bytes(output) == undisturbed


def test_work_files_that_the_machine_lost_are_made_again(
    tmp_path: Path, tokenizer: Path, many_inputs: list[Path], undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    arguments = ("tokenize", "--input", *many_inputs, "--tokenizer", tokenizer, "--output", output, "--backend", "tokenizers")
    arguments = (*arguments, "--unit-bytes", 20_000, *SMALL, "--workers", 1)
    killed(stopped(output / ".tokenize", *AFTER_A_SHARD, *arguments))
    next(output.glob(".tokenize/hash/*.npz")).write_bytes(b"")
    for path in output.glob(".tokenize/tokens/*.validation"):
        path.write_bytes(b"")
    assert_clear_error(run(*arguments), ".validation was lost when the machine went down", "run the same command again")
    assert run(*arguments).returncode == 0
    assert folder_bytes(output) == undisturbed


def test_an_interrupted_job_whose_input_changed_starts_over(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    corpus, output = write_jsonl(tmp_path / "c.jsonl", texts), tmp_path / "out"
    tokenize_here([corpus], tokenizer, output)
    expected = folder_bytes(output)
    interrupted = tmp_path / "interrupted"
    write_jsonl(corpus, texts[:20] + ["{broken"])
    corpus.write_bytes(corpus.read_bytes()[:-3])
    arguments = ("tokenize", "--input", corpus, "--tokenizer", tokenizer, "--output", interrupted, "--workers", 1, *SMALL)
    assert_clear_error(run(*arguments), "c.jsonl, line 21")
    write_jsonl(corpus, texts)
    # It had written no shard, so nothing is lost and no --overwrite is asked for.
    assert run(*arguments).returncode == 0
    assert folder_bytes(interrupted) == expected


def test_the_advice_of_a_refused_document_works(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    corpus.write_bytes(corpus.read_bytes() + b'{"text": "\xff"}\n')
    commands = (
        ("tokenize", "--input", corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 1, *SMALL),
        ("train-tokenizer", "--input", corpus, "--vocab-size", 300, "--output", tmp_path / "trained"),
    )
    for arguments in commands:
        assert_clear_error(run(*arguments), "not UTF-8", "--on-invalid skip")
        assert run(*arguments, "--on-invalid", "skip").returncode == 0


@pytest.mark.parametrize("moment", ["_hash_pass", "_tokenize_pass"])
def test_an_input_rewritten_during_a_pass_is_refused_and_a_second_run_works(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The same number of documents of the same lengths: only the file's time tells."""
    corpus, output = write_jsonl(tmp_path / "c.jsonl", texts[:50]), tmp_path / "out"
    other = [text.swapcase() for text in texts[:50]]
    one_pass = getattr(tokenize_module, moment)

    def rewritten_during(*arguments: object) -> object:
        result = one_pass(*arguments)
        write_jsonl(corpus, other)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, moment, rewritten_during)
        with pytest.raises(DataError, match=f"input {corpus} has changed while it was read: run the same command again"):
            tokenize_here([corpus], tokenizer, output)
    assert not (output / "manifest.json").exists()
    (tmp_path / "other").mkdir()
    expected = tokenize_here([write_jsonl(tmp_path / "other" / "c.jsonl", other)], tokenizer, tmp_path / "expected")
    assert folder_bytes(tokenize_here([corpus], tokenizer, output).directory) == folder_bytes(expected.directory)


LINE = b'{"id": 9, "text": "document 9"}'


@pytest.mark.parametrize(
    "instead",
    [LINE.replace(b"text", b"tuxt"), b" " * len(LINE), b'{"text": "a"}\n{"text": "b"}'.ljust(len(LINE)), None],
    ids=["broken", "fewer", "more", "deleted"],
)
def test_other_documents_in_the_second_pass_are_an_error_in_words(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, instead: bytes | None
) -> None:
    """Size and time stay what they were, as on a file system with coarse times: the documents themselves tell."""
    corpus, output = write_jsonl(tmp_path / "c.jsonl", [f"document {number}" for number in range(20)]), tmp_path / "out"
    content, status = corpus.read_bytes(), corpus.stat()
    tokenize_pass = tokenize_module._tokenize_pass

    def after_a_change(*arguments: object) -> object:
        if instead is None:
            corpus.unlink()
        else:
            corpus.write_bytes(content.replace(LINE, instead))
            os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))
        return tokenize_pass(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, "_tokenize_pass", after_a_change)
        with pytest.raises(DataError, match=f"input {corpus} has changed .*: run the same command again"):
            tokenize_here([corpus], tokenizer, output)
    assert not (output / "manifest.json").exists()
    corpus.write_bytes(content)
    assert tokenize_here([corpus], tokenizer, output).content["filters"]["kept"] == 20


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json"])
def test_killed_while_it_publishes(name: str, tmp_path: Path, texts: list[str], tokenizer: Path) -> None:
    corpus, killed, whole = write_jsonl(tmp_path / "corpus.jsonl", texts), tmp_path / "killed", tmp_path / "whole"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nreplace = os.replace\n"
        f"os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if Path(b) == Path({str(killed / name)!r}) else replace(a, b)\n"
        "from data_tools.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    job = ["tokenize", "--input", corpus, "--tokenizer", tokenizer, "--workers", 1, *SMALL, "--output"]
    result = subprocess.run([sys.executable, "-c", code, *map(str, job), killed], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    for output in (killed, whole):
        assert run(*job, output).returncode == 0
    assert folder_bytes(killed) == folder_bytes(whole)
    assert run("verify", killed).returncode == 0
