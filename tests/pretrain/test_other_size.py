"""A run that goes on with another number of data-parallel processes: the same samples and the same step, then rounding."""

import shutil

import pytest

from pretrain.compare.load import load_runs
from pretrain.tracking.record import RunRecord
from tests.pretrain.finished import STEPS, Finished, start, uri
from tests.pretrain.launch import TIMEOUT_S, losses

RESUMED = 9
TIMES_SEEDS = 3


@pytest.fixture(scope="module")
def other_seed(shards, database, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("seed")
    shutil.copy(database, folder)
    _run(folder, shards, "--train.seed", 1)
    return Finished.read(folder)


def _run(folder, shards, *more, processes=2) -> str:
    with start(folder, shards, *more, processes=processes) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(("processes", "more"), [(1, []), (4, ["--train.micro_batch_size", 4])], ids=["1", "4"])
def test_2_processes_become(processes, more, unbroken, other_seed, shards, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(unbroken.folder, folder)
    # As if it had been moved: beside its original a copy is another run.
    record = RunRecord.load(folder / "run")
    record.directory = str(folder / "run")
    record.save(folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / f"step_{STEPS:08d}")
    shutil.rmtree(folder / "run" / "checkpoints" / f"milestone_{STEPS:08d}")
    output = _run(folder, shards, *more, processes=processes)
    assert f"going on after step {RESUMED}," in output
    found = Finished.read(folder)
    assert found.samples == unbroken.samples
    expected, changed, seed = (losses(run.folder / "run") for run in (unbroken, found, other_seed))
    assert [changed[step] for step in range(1, RESUMED + 1)] == [expected[step] for step in range(1, RESUMED + 1)]
    assert abs(changed[RESUMED + 1] - expected[RESUMED + 1]) <= 2e-6 * expected[RESUMED + 1]
    later = range(RESUMED + 1, STEPS + 1)
    spread = max(abs(seed[step] - expected[step]) for step in later)
    assert max(abs(changed[step] - expected[step]) for step in later) <= TIMES_SEEDS * spread

    # What was logged again with another value is a second point, and the newest one counts.
    points = found.shipped["train/loss"]
    for step in later:
        values = [value for number, value in points if number == step]
        assert values == list(dict.fromkeys((expected[step], changed[step])))
    assert len(points) > STEPS, "no value differs: nothing was shown"
    run = load_runs(uri(folder), "megatron-qsparse").runs[0]
    assert dict(zip(run.history["train/loss"].steps, run.history["train/loss"].values, strict=True)) == changed
    assert run.tags["resume.1.from_step"] == str(RESUMED) and run.tags["resume.1.world_size"] == str(processes)
