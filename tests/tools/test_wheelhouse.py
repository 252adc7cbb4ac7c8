"""A wheelhouse is checked against its manifest and the machine before anything is installed from it."""

import json
import subprocess

import pytest


@pytest.fixture
def house(miniature):
    small = miniature()
    small.offers_all()
    small.finish_wheels()
    return small


def check(small, action: str = "check", folder=None) -> subprocess.CompletedProcess:
    command = [small.python, "-m", "tools.wheelhouse", action, folder or small.wheels]
    result = subprocess.run(command, cwd=small.project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "Traceback" not in result.stdout, result.stdout
    return result


def edit(small, **fields) -> None:
    path = small.wheels / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_whole(house):
    result = check(house)
    assert result.returncode == 0 and "checking 6 wheels" in result.stdout, result.stdout


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda small: edit(small, python="3.9"), "was made for Python 3.9, this is Python 3.1"),
        (lambda small: edit(small, platform="linux-riscv64"), "was made on linux-riscv64, this is linux-"),
        (lambda small: edit(small, project="0" * 64), "was made for another version of this project"),
        (lambda small: edit(small, format=2), "has format 2, 1 is known"),
        (lambda small: edit(small, beside={"torch": "2.9.0"}), "was made with FOR=current, for an environment that has torch 2.9.0 itself"),
        (lambda small: (small.wheels / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda small: (small.wheels / "manifest.json").unlink(), "manifest.json: No such file or directory: OFFLINE names a folder"),
        (lambda small: (small.wheels / "torch-2.13.0-py3-none-any.whl").unlink(), "torch-2.13.0-py3-none-any.whl is missing"),
        (
            lambda small: (small.wheels / "numpy-2.4.6-py3-none-any.whl").open("r+b").write(b"x"),
            "numpy-2.4.6-py3-none-any.whl is cut or changed",
        ),
    ],
    ids=["python", "platform", "project", "format", "current", "manifest", "no manifest", "missing", "changed"],
)
def test_damage_is_told(house, damage, told):
    damage(house)
    result = check(house)
    assert result.returncode == 1 and result.stdout.splitlines()[-1].startswith("error: ") and told in result.stdout, result.stdout


def test_wheels_of_another_c_library(house):
    (house.wheels / "torch-2.13.0-py3-none-any.whl").rename(house.wheels / "torch-2.13.0-cp311-cp311-manylinux_2_99_x86_64.whl")
    house.finish_wheels()
    result = check(house)
    assert result.returncode == 1 and "torch-2.13.0-cp311-cp311-manylinux_2_99_x86_64.whl cannot be used on this machine" in result.stdout


def test_a_folder_of_somebody_elses_is_not_replaced(house, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("")
    result = check(house, "make", tmp_path / "theirs")
    assert result.returncode == 1 and "exists and is no wheelhouse: name another folder with WHEELHOUSE=DIR" in result.stdout
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.tex"]


def test_a_folder_with_a_manifest_of_another_kind_is_not_replaced(house, tmp_path):
    theirs = tmp_path / "shards"
    theirs.mkdir()
    (theirs / "manifest.json").write_text('{"format_version": 1, "shards": []}')
    (theirs / "train-00000.tar").write_text("")
    # A wheelhouse with something of the user's in it.
    (house.wheels / "notes.txt").write_text("")
    for folder in (theirs, house.wheels):
        before = sorted(folder.iterdir())
        result = check(house, "make", folder)
        assert result.returncode == 1 and "exists and is no wheelhouse" in result.stdout and sorted(folder.iterdir()) == before


def test_what_lies_beside_is_left_alone(house, tmp_path):
    for name in ("wheels.old", "wheels.partial"):
        (house.wheels.parent / name).mkdir()
    code = "from pathlib import Path\nfrom tools.wheelhouse import replacing\nimport sys\n"
    code += "with replacing(Path(sys.argv[1])) as partial: (partial / 'new').write_text('')"
    subprocess.run([house.python, "-c", code, house.wheels], cwd=house.project, check=True)
    assert [path.name for path in house.wheels.iterdir()] == ["new"] and (house.wheels.stat().st_mode & 0o700) == 0o700
    assert {"wheels.old", "wheels.partial"} <= {path.name for path in house.wheels.parent.iterdir()}
    assert not list(house.wheels.parent.glob(".wheels.*"))
