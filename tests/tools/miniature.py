"""A project of the shape of this one whose packages are a few bytes each: real wheels, installed by the real pip, without a network."""

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

SETUP = """[metadata]
name = megatron-qsparse
[options]
install_requires =
    torch>=2.8
    numpy>=1.26
    megatron-core>=0.16.1,<0.17
    deepspeed>=0.19.8,<0.20
    mlflow>=3
"""
CONSTRAINTS = {"torch": "2.13.0", "numpy": "2.4.6", "megatron-core": "0.16.1", "deepspeed": "0.19.8", "mlflow": "3.17.2", "pandas": "3.1.1"}
PYPROJECT = """[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = '''"""An editable wheel, made without setuptools."""
import sys
sys.path.insert(0, {tests!r})
from tests.tools.miniature import wheel


def get_requires_for_build_editable(config_settings=None):
    return []


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return wheel(wheel_directory, "megatron-qsparse", "0.1", [], {{"megatron_qsparse.pth": {project!r}}}).name
'''


def wheel(folder: str | Path, name: str, version: str, requires: list[str] = (), files: dict[str, str] | None = None) -> Path:
    """A wheel with one module of that name, or with these files."""
    module = name.replace("-", "_")
    if name == "megatron-core":
        files = {"megatron/core/__init__.py": f"__version__ = {version!r}\n"}
    info = f"{module}-{version}.dist-info"
    contents = dict(files or {f"{module}/__init__.py": f"__version__ = {version!r}\n"})
    contents[f"{info}/METADATA"] = "\n".join([
        "Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires), ""
    ])  # fmt: skip
    contents[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{path},sha256={_digest(text)},{len(text)}" for path, text in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    path = Path(folder) / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name_, text in contents.items():
            archive.writestr(name_, text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


class Miniature:
    """project: its sources, with this repository's tools. wheels: what an index would have. venv: the active environment."""

    def __init__(self, folder: Path, pip: Path):
        self.project, self.wheels, self.venv = folder / "project", folder / "wheels", folder / "venv"
        self.wheels.mkdir(parents=True)
        shutil.copytree(ROOT / "tools", self.project / "tools")
        (self.project / "setup.cfg").write_text(SETUP)
        (self.project / "pyproject.toml").write_text(PYPROJECT)
        (self.project / "constraints.txt").write_text("".join(f"{name}=={version}\n" for name, version in CONSTRAINTS.items()))
        (self.project / "backend.py").write_text(BACKEND.format(tests=str(ROOT), project=str(self.project)))
        (self.project / "pretrain").mkdir()
        (self.project / "pretrain" / "run.py").write_text("import torch, numpy, megatron.core, deepspeed\n")
        venv.create(self.venv, symlinks=True)
        (self.packages / "pip.pth").write_text(f"{pip}\n")

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def packages(self) -> Path:
        return next(self.venv.glob("lib/python3.*/site-packages"))

    def offers(self, name: str, version: str, *requires: str) -> None:
        wheel(self.wheels, name, version, list(requires))

    def offers_all(self) -> None:
        """Every requirement at its tested version."""
        for name, version in CONSTRAINTS.items():
            self.offers(name, version)

    def has(self, name: str, version: str, *requires: str, target: Path | None = None) -> None:
        """Unpack a package into the environment, or into a folder beside it."""
        scratch = self.wheels.parent / "present"
        scratch.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel(scratch, name, version, list(requires))) as archive:
            archive.extractall(target or self.packages)

    def finish_wheels(self, beside: dict[str, str] | None = None) -> None:
        """Make the wheels a wheelhouse."""
        finish = f"finish(Path({str(self.wheels)!r}), {beside or {}!r}, Path('wheels'))"
        code = f"from pathlib import Path; from tools.wheelhouse import finish; {finish}"
        subprocess.run([self.python, "-c", code], cwd=self.project, check=True, capture_output=True)

    def install(self, *args: object, before: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
        """`make install-into-current OFFLINE=wheels`; stdout holds both streams."""
        command = [*before, str(self.python), "-m", "tools.install_into_current", "--offline", str(self.wheels), *map(str, args)]
        # Where the tests find this repository is of no concern to the environment.
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")} | env
        return subprocess.run(
            command, cwd=self.project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, env=environment
        )

    def versions(self) -> dict[str, str]:
        """What the environment has now."""
        # Not above: the backend, which has no pip, imports this module.
        from tools.packages import installed

        return {name: package.version for name, package in installed([str(self.packages)]).items()}


def copy_of_pip(folder: Path) -> Path:
    """This environment's pip alone; to make an environment with one takes seconds."""
    dist = importlib.metadata.distribution("pip")
    for part in {file.parts[0] for file in dist.files if file.parts[0] != ".."}:
        shutil.copytree(dist.locate_file(part), folder / part)
    return folder
