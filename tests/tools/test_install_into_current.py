"""Installing beside what an environment brings: nothing protected changes, and what cannot work is refused before anything is done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.packages import changes, installed


def row(output: str, name: str) -> list[str]:
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [name])


def test_what_is_protected_stays_and_other_pins_give_way(miniature):
    small = miniature(torch="2.9.0a0+site", numpy="1.26.4", nvidia_nccl_cu13="2.29.7", tqdm="4.0")
    small.offers_all()
    # The tested pandas is too new for this numpy; an older one fits.
    small.offers("mlflow", "3.17.2", "pandas", "tqdm>=4.5", "torchvision")
    small.offers("pandas", "3.1.1", "numpy>=2")
    small.offers("pandas", "2.3.0", "numpy>=1.24")
    small.offers("tqdm", "4.70")
    small.offers("torchvision", "0.25")
    small.finish_wheels()
    before = small.versions()
    planned = small.install("--plan")
    assert planned.returncode == 0 and "to be added: 4 packages (deepspeed, megatron-core, mlflow, pandas)" in planned.stdout, (
        planned.stdout
    )
    assert small.versions() == before
    result = small.install()
    output, versions = result.stdout, small.versions()
    assert result.returncode == 0, output
    assert row(output, "torch") == ["torch", "2.9.0a0+site", "2.13.0", "untested"] and row(output, "numpy")[1:] == [
        "1.26.4",
        "2.4.6",
        "untested",
    ]
    assert row(output, "megatron-core")[1:] == ["-", "0.16.1", "to", "be", "installed"]
    assert "warning: not tested with this project: torch 2.9.0a0+site, numpy 1.26.4" in output
    assert "at other versions than tested: pandas 2.3.0 (3.1.1)" in output
    assert "to be replaced: tqdm 4.0 by 4.70" in output and "left out: torchvision 0.25" in output
    assert "untouched: torch 2.9.0a0+site, numpy 1.26.4" in output
    wanted = {
        "torch": "2.9.0a0+site",
        "numpy": "1.26.4",
        "nvidia-nccl-cu13": "2.29.7",
        "megatron-core": "0.16.1",
        "pandas": "2.3.0",
        "tqdm": "4.70",
    }
    assert wanted.items() <= versions.items() and "torchvision" not in versions and "megatron-qsparse" in versions
    again = small.install("--plan")
    assert again.returncode == 0 and "to be added: 0 packages" in again.stdout and "to be replaced" not in again.stdout, again.stdout


@pytest.mark.parametrize(
    "packages, told",
    [
        ({"numpy": "2.4.6"}, ["there is no torch in this environment", "PYTHON=/path/to/python"]),
        ({"torch": "2.5.1"}, ["torch 2.5.1 is installed here, torch >=2.8 is needed, and it is not touched", "make install"]),
        ({"torch": "2.8.0a0+ngc"}, ["torch 2.8.0a0+ngc is installed here"]),
        (
            {"torch": "2.13.0", "megatron_core": "0.14.0"},
            [
                "megatron-core 0.14.0 is installed here, megatron-core <0.17,>=0.16.1 is needed: it is not replaced",
                "venv --system-site-packages",
            ],
        ),
        ({"torch": "2.13.0", "deepspeed": "0.20.1"}, ["deepspeed 0.20.1 is installed here", "pip uninstall deepspeed"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_installed(miniature, packages, told):
    small = miniature(**packages)
    before = small.versions()
    result = small.install()
    assert result.returncode == 1 and "Traceback" not in result.stdout, result.stdout
    for text in ["error: ", *told]:
        assert text in result.stdout, result.stdout
    assert small.versions() == before


def test_triton_under_another_name_is_not_written_over(miniature):
    """As in NVIDIA's and AMD's containers and beside nightly builds."""
    small = miniature(torch="2.9.0", numpy="2.4.6", pytorch_triton="3.4.0+git1")
    (small.packages / "triton").mkdir()
    (small.packages / "triton" / "__init__.py").write_text("theirs = True\n")
    setup = small.project / "setup.cfg"
    setup.write_text(setup.read_text() + "    triton>=3.3\n")
    small.offers_all()
    small.offers("triton", "3.7.1")
    small.finish_wheels()
    result = small.install()
    assert result.returncode == 0, result.stdout
    assert "triton" not in small.versions() and (small.packages / "triton" / "__init__.py").read_text() == "theirs = True\n"


def test_a_stack_below_the_virtual_environment_is_hidden_not_replaced(miniature, tmp_path):
    small = miniature()
    system = tmp_path / "system"
    system.mkdir()
    small.has("megatron-core", "0.14.0", target=system)
    (small.packages / "system.pth").write_text(f"{system}\n")
    small.offers_all()
    small.finish_wheels()
    result = small.install()
    assert result.returncode == 0 and "to be hidden: megatron-core 0.14.0 by 0.16.1" in result.stdout, result.stdout
    assert small.versions()["megatron-core"] == "0.16.1" and (system / "megatron_core-0.14.0.dist-info").is_dir()


def test_what_python_path_puts_before_it_is_told(miniature, tmp_path):
    small = miniature()
    (tmp_path / "Megatron-LM" / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "Megatron-LM" / "megatron" / "core" / "__init__.py").write_text("__version__ = '0.14.0'\n")
    small.offers_all()
    small.finish_wheels()
    result = small.install(PYTHONPATH=str(tmp_path / "Megatron-LM"))
    assert result.returncode == 1 and "Python finds megatron-core 0.14.0 first: take its folder out of PYTHONPATH" in result.stdout, (
        result.stdout
    )


def test_constraints_of_the_environment_go_before_the_tested_versions(miniature, tmp_path):
    small = miniature()
    small.offers_all()
    small.offers("mlflow", "3.1")
    small.finish_wheels()
    (tmp_path / "constraint.txt").write_text("mlflow==3.1\ntorch==2.9.0a0+site\n")
    result = small.install(PIP_CONSTRAINT=str(tmp_path / "constraint.txt"))
    assert result.returncode == 0 and "at other versions than tested: mlflow 3.1 (3.17.2)" in result.stdout, result.stdout


def test_where_nothing_fits_the_package_in_the_way_is_named(miniature):
    small = miniature()
    small.offers_all()
    small.offers("mlflow", "3.17.2", "numpy>=2")
    small.finish_wheels()
    before = small.versions()
    result = small.install()
    assert result.returncode == 1 and "Traceback" not in result.stdout, result.stdout
    assert (
        "pip would have to change numpy 1.26.4, which is left alone" in result.stdout
        and "mlflow 3.17.2 depends on numpy>=2" in result.stdout
    )
    assert small.versions() == before
    (small.wheels / "deepspeed-0.19.8-py3-none-any.whl").unlink()
    small.offers("mlflow", "3.17.2")
    small.finish_wheels()
    result = small.install()
    assert result.returncode == 1 and "make wheelhouse FOR=current" in result.stdout and "deepspeed" in result.stdout, result.stdout


def test_a_torch_that_does_not_import_is_told_at_once(miniature):
    small = miniature()
    (small.packages / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    small.offers_all()
    small.finish_wheels()
    result = small.install()
    assert result.returncode == 1 and "torch 2.9.0a0+site does not import here: ImportError: libcudart.so.13" in result.stdout, (
        result.stdout
    )


def test_an_environment_of_the_operating_system_is_left_alone(miniature, tmp_path):
    small = miniature()
    # As a distribution marks its Python: not in a virtual environment, with a file beside the standard library.
    code = f"""
import sys, sysconfig
from pathlib import Path
from tools import install_into_current as tool
sys.prefix = sys.base_prefix
sysconfig.get_path, found = (lambda name: {str(tmp_path)!r} if name == "stdlib" else found(name)), sysconfig.get_path
print(tool._environment_problems(writes=True))
"""
    (tmp_path / "EXTERNALLY-MANAGED").write_text("[externally-managed]\n")
    environment = {name: value for name, value in os.environ.items() if name != "PIP_BREAK_SYSTEM_PACKAGES"}
    command = [small.python, "-c", code]
    told = subprocess.run(command, cwd=small.project, env=environment, capture_output=True, text=True, check=True).stdout
    assert "is marked as another installer's" in told and "venv --system-site-packages" in told
    environment["PIP_BREAK_SYSTEM_PACKAGES"] = "1"
    assert (
        "another installer's"
        not in subprocess.run(command, cwd=small.project, env=environment, capture_output=True, text=True, check=True).stdout
    )


def test_a_read_only_environment_is_told_with_the_way_out(miniature):
    small = miniature()
    small.offers_all()
    small.finish_wheels()
    if os.geteuid():
        small.packages.chmod(0o555)
        result = small.install()
        small.packages.chmod(0o755)
    else:
        bind = f'mount --bind "{small.packages}" "{small.packages}" && mount -o remount,ro,bind "{small.packages}" && exec "$@"'
        result = small.install(before=("unshare", "--mount", "sh", "-c", bind, "sh"))
    assert result.returncode == 1 and "cannot be written to" in result.stdout and "venv --system-site-packages" in result.stdout, (
        result.stdout
    )
    assert not list(small.packages.glob("deepspeed*"))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda small, info: info.rename(small.packages / "torch-2.13.0.dist-info") and _relabel(small), "torch was 2.9.0a0+site in"),
        (lambda small, info: shutil.rmtree(info), "torch 2.9.0a0+site is gone"),
        (lambda small, info: (small.packages / "torch" / "__init__.py").write_text(""), "torch 2.9.0a0+site: its files were changed"),
        (lambda small, info: small.has("tqdm", "4.70"), None),
    ],
    ids=["version", "gone", "files", "another package"],
)
def test_a_change_of_a_protected_package_is_found(miniature, change, told):
    small = miniature()
    before = installed([str(small.packages)])
    change(small, small.packages / "torch-2.9.0a0+site.dist-info")
    found = changes(before, installed([str(small.packages)]))
    assert (not found) if told is None else len(found) == 1 and found[0].startswith(told)


def _relabel(small) -> None:
    metadata = small.packages / "torch-2.13.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("2.9.0a0+site", "2.13.0"))


def script(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "tools/install_into_current.sh"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


def test_interpreters_that_cannot_be_used_are_told_in_a_line(miniature, tmp_path):
    small = miniature()
    assert "error: no /nowhere/python: install Python" in script(small.project, PYTHON="/nowhere/python").stderr
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.18\nexit 1\n')
    old.chmod(0o755)
    assert script(small.project, PYTHON=str(old)).stderr.startswith("error: Python 3.9.18 is not supported, Python 3.11 and 3.12 are")
    (small.packages / "pip.pth").unlink()
    result = script(small.project, PYTHON=str(small.python))
    assert result.returncode == 1 and "has no pip: add it with" in result.stderr and result.stderr.count("\n") == 1


def test_an_environment_that_is_there_is_not_taken_for_the_one_asked_for(tmp_path):
    def checked(python: str = "", index: str = "") -> str:
        command = ["bash", "tools/check_venv.sh", str(tmp_path / "venv"), python, index]
        return subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    assert checked("/nowhere") == "", "there is none yet"
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "venv" / ".installed").write_text("https://one\n")
    other = tmp_path / "python3"
    other.write_text("#!/bin/sh\necho 3.9\n")
    other.chmod(0o755)
    assert checked() == checked(sys.executable) == checked(index="https://one") == ""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"is of Python {here}, PYTHON={other} is 3.9: remove" in checked(str(other))
    assert "was installed with another index of torch: remove it" in checked(index="https://two")
    assert "PYTHON=/nowhere does not run" in checked("/nowhere")
