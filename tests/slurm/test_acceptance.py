"""Acceptance on two nodes of one process each, over gloo."""

import json

import pytest

from tests.slurm.jobs import submit


@pytest.mark.slurm
@pytest.mark.timeout(2700)
def test_acceptance(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--device", "cpu", script="acceptance.sh")
    log = job.finish(2400)
    report = tmp_path / "runs" / f"acceptance-{job.id}" / "report.json"
    found = {case["name"]: case for case in json.loads(report.read_text())["cases"]}
    assert all(case["fits"] for case in found.values()) and "cases fit.**" in log
    assert len(found["bitnet_qsparse fp32, pipeline 2"]["figures"]) == 4
    # That it was killed, and that both of what follows from it were compared.
    assert "killed: status 1" in log or "killed: status 137" in log
    assert [figure["value"] for figure in found["killed and started again"]["figures"]] == [0, 0]
