"""What training compiles: on a CPU nothing, which the absence of compilers proves."""

import subprocess
import sys
from pathlib import Path

from tools.prebuild import CACHES, Trainer

ROOT = Path(__file__).parents[2]


def trainer(folder: Path) -> Trainer:
    return Trainer(folder, {variable: folder / "cache" / name for variable, name in CACHES.items()}, processes=2)


def test_a_model_trains_where_there_is_no_compiler(tmp_path):
    at_work = trainer(tmp_path)
    at_work.make_data()
    status, output, called = at_work.train("bitnet_qsparse", hidden=True)
    assert status == 0 and "step 2/2" in output, output
    # DeepSpeed's import asks whether there is a library.
    assert all("test.c" in call or "FILE" in call and call.startswith("gcc") for call in called), called
    assert not at_work._cached()


def test_a_compiler_that_is_called_is_noticed(tmp_path):
    code = "import subprocess, sys; sys.exit(subprocess.run(['g++', '-c', '/x/y.cpp']).returncode)"
    assert trainer(tmp_path).run(["-c", code], hidden=True)[::2] == (1, {"g++ -c FILE"})
    assert trainer(tmp_path).run(["-c", "import shutil, sys; sys.exit(not shutil.which('sh'))"], hidden=False)[0] == 0


def test_an_interpreter_without_the_project_is_told(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    command = ["bash", "tools/prebuild.sh", tmp_path / "nothing", tmp_path / "cache"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "venv" / "bin" / "python")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "has no torch: `make install` makes an environment with all that is needed" in result.stderr
