"""Versions found against versions tested."""

import pytest
from pip._vendor.packaging.requirements import Requirement

from tools.packages import canonical, installed, is_protected, pins, requirements
from tools.table import verdict


@pytest.mark.parametrize(
    "found, expected",
    [
        ("2.13.0", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.13.0a0+50eac811a6.nv25.09", "untested"),
        ("2.9.0a0+50eac811a6.nv25.09", "untested"),
        ("2.15.0", "untested"),
        ("2.7.1", "too old"),
        ("2.8.0a0+5228986c39.nv25.06", "too old"),
        ("3.0", "too new"),
        ("built by hand", "untested"),
    ],
)
def test_verdict(found, expected):
    assert verdict(found, "2.13.0", Requirement("torch>=2.8,<3")) == expected


def test_what_is_protected():
    for name in (
        "torch",
        "Torch_TensorRT",
        "transformer_engine_torch",
        "nvidia-cublas-cu12",
        "flash_attn",
        "numpy",
        "triton",
        "pytorch-triton-rocm",
    ):
        assert is_protected(name), name
    for name in ("torchmetrics", "numpydoc", "deepspeed", "megatron-core", "pandas"):
        assert not is_protected(name), name


def test_the_projects_own_files_are_understood():
    required, tested = requirements("test"), pins()
    assert {"torch", "numpy", "megatron-core", "deepspeed", "pytest"} <= required.keys() and len(tested) > 100
    for name, need in required.items():
        if name in tested:
            assert need.specifier.contains(tested[name]), name
    assert tested.keys() == {canonical(name) for name in tested}


def test_metadata_that_python_cannot_put_together_again(tmp_path):
    """As that of NVIDIA's packages: a description of several lines with what looks like a header in it."""
    folder = tmp_path / "nvidia_odd-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nvidia-odd\nVersion: 1.0\n\n.. SPDX-FileCopyrightText: somebody\nfirst\nSecond: line\n"
    )
    found = installed([str(tmp_path)])["nvidia-odd"]
    assert found.version == "1.0" and found.fingerprint
    (folder / "METADATA").write_text((folder / "METADATA").read_text().replace("somebody", "another"))
    assert installed([str(tmp_path)])["nvidia-odd"].fingerprint != found.fingerprint
