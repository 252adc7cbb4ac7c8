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
