"""Installing next to a torch of another version, and without a network, for real: downloads some 300 MB and takes minutes."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("Makefile", "README.md", "LICENSE", "constraints.txt", "setup.cfg", "pyproject.toml", "ruff.toml")
PACKAGES = ("tools", "megatron_qsparse", "pretrain", "data_tools")
OTHER_TORCH = "2.12.0a0+site"
"""As containers name theirs: a pre-release by its version."""
OTHER_NUMPY = "2.2.6"
OFFLINE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""Nothing is found but what is installed."""


def run(*command: object, env: dict[str, str] = ENVIRONMENT, **options) -> str:
    result = subprocess.run(
        [str(part) for part in command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200, **options
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the sources: an installation writes its metadata beside them."""
    folder = tmp_path_factory.mktemp("project")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheelhouse(project) -> Path:
    index = os.environ.get("TORCH_INDEX", "")
    run("make", "wheelhouse", f"PYTHON={sys.executable}", f"TORCH_INDEX={index}", cwd=project)
    return project / "wheelhouse"


@pytest.fixture(scope="module")
def site(tmp_path_factory, wheelhouse) -> Path:
    """An environment as a cluster has it: a torch and a numpy of its own. Where TORCH_INDEX names an index, its newest other torch;
    else this environment's torch under another version, since the default index has several GB of CUDA with every one."""
    folder = tmp_path_factory.mktemp("site") / "venv"
    run(sys.executable, "-m", "venv", folder)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    run(*pip, f"numpy=={OTHER_NUMPY}")
    if index := os.environ.get("TORCH_INDEX"):
        run(*pip, "--index-url", index, f"torch>=2.8,!={importlib.metadata.version('torch').partition('+')[0]}")
        return folder
    dist = importlib.metadata.distribution("torch")
    needed = ["filelock", "typing-extensions", "setuptools>=77", "sympy", "networkx", "jinja2", "fsspec"]
    run(*pip, "--no-index", "--find-links", wheelhouse, *needed)
    packages = next(folder.glob("lib/python3.*/site-packages"))
    for part in {file.parts[0] for file in dist.files if file.parts[0] not in ("..", "__pycache__")}:
        target = part if ".dist-info" not in part else f"torch-{OTHER_TORCH}.dist-info"
        source = Path(dist.locate_file(part))
        (shutil.copytree if source.is_dir() else shutil.copy)(source, packages / target)
    _relabel(packages / f"torch-{OTHER_TORCH}.dist-info" / "METADATA", "Version: ", dist.version)
    _relabel(packages / f"torch-{OTHER_TORCH}.dist-info" / "RECORD", "torch-", dist.version)
    _relabel(packages / "torch" / "version.py", "__version__ = '", dist.version)
    return folder


def _relabel(path: Path, before: str, version: str) -> None:
    text = path.read_text()
    assert before + version in text
    path.write_text(text.replace(before + version, before + OTHER_TORCH))


def versions(site: Path) -> str:
    return run(site / "bin" / "python", "-c", "import torch, numpy; print(torch.__version__, numpy.__version__)", cwd=site)


def state(site: Path) -> dict[str, tuple[int, int]]:
    """Size and time of writing of every file of torch and numpy."""
    packages = next(site.glob("lib/python3.*/site-packages"))
    files = [
        path for pattern in ("torch*", "numpy*") for folder in packages.glob(pattern) for path in folder.rglob("*") if path.suffix != ".pyc"
    ]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()}


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_into_an_environment_with_another_torch(project, site, tmp_path):
    environment = {**ENVIRONMENT, "PATH": f"{site / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    before, files = versions(site), state(site)
    assert importlib.metadata.version("torch") not in before
    lacking = tmp_path / "lacking"
    collected = run("make", "wheelhouse", "FOR=current", f"WHEELHOUSE={lacking}", cwd=project, env=environment)
    print(collected)
    assert not list(lacking.glob("torch-*")) and not list(lacking.glob("numpy-*")) and list(lacking.glob("deepspeed-*.whl"))
    installed = run(*OFFLINE, "make", "install-into-current", f"OFFLINE={lacking}", cwd=project, env=environment)
    print(installed)
    print(run(site / "bin" / "python", "-m", "pip", "check"))
    assert "untouched: torch" in installed and versions(site) == before and state(site) == files

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "document {number} of the corpus, {number * 7919} words"}}\n' for number in range(400)))
    python = [site / "bin" / "python", "-m"]
    run(*python, "data_tools", "train-tokenizer", "--input", corpus, "--vocab-size", 300, "--output", tmp_path / "tokenizer", cwd=tmp_path)
    run(
        *(*python, "data_tools", "tokenize", "--input", corpus, "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "shards"),
        *("--validation-fraction", 0.2), cwd=tmp_path,
    )  # fmt: skip
    trained = run(
        *(*python, "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "pretrain.train"),
        *("--config", project / "pretrain" / "configs" / "tiny_bitnet_qsparse.yaml", "--data.path", tmp_path / "shards"),
        *("--data.sequence_length", 32, "--train.steps", 2, "--schedule.warmup_steps", 1, "--train.log_interval", 1),
        *("--validation.samples", 4, "--tracking.enabled", "false", "--device", "cpu", "--output_dir", tmp_path / "run"),
        cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert "step 2/2" in trained and versions(site) == before


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_an_environment_of_its_own_without_a_network(project, wheelhouse, tmp_path):
    make = [*OFFLINE, "make", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", f"OFFLINE={wheelhouse}"]
    print(run(*make, "install", cwd=project))
    print(run(*make, "lint", cwd=project))
    python = tmp_path / "venv" / "bin" / "python"
    assert str(project) in run(python, "-c", "import pretrain.run; print(pretrain.run.__file__)", cwd=tmp_path)
    assert "No broken requirements" in run(python, "-m", "pip", "check")


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_everything_that_is_compiled_is_compiled_beforehand(project, tmp_path):
    output = run("make", "prebuild", f"PYTHON={sys.executable}", f"CACHE={tmp_path / 'cache'}", cwd=project)
    assert output.count(" 2 steps, ") == 5 and "no compiler to be found" in output, output
