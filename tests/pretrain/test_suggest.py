"""Layouts for a cluster: only possible ones, only what fits; the command, its mistakes and its calibration."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qsparse.models.accounting import flops_per_token
from megatron_qsparse.models.memory import memory_per_rank
from pretrain import plan
from pretrain.config import dump_yaml
from pretrain.layouts import layout_of
from pretrain.suggest.search import SEARCHED, search, with_settings
from pretrain.suggest.step_time import step_time
from pretrain.tracking.journal import Journal
from pretrain.validate import examine
from tests.pretrain.clusters import CONFIGS, EXPERTS, H100, SMALL, cluster, configured, small


def suggested(capsys, *args: str) -> tuple[int, str, str]:
    """Exit status, output, errors."""
    status = plan.main(["--suggest", *args])
    out, err = capsys.readouterr()
    return status, out, err


CASES = [
    ((), cluster(2, 4)),
    (("--model.tied_embeddings", "true"), cluster(1, 4)),
    (EXPERTS, cluster(2, 4)),
    (("--bitnet.enabled", "true"), cluster(2, 1)),
]


@pytest.mark.parametrize(("flags", "where"), CASES, ids=["dense", "tied", "experts", "two"])
def test_every_suggestion_could_start_and_its_memory_is_the_plans(flags, where, shards):
    config, model = small(*flags, "--data.path", str(shards), "--tracking.enabled", "false")
    found = search(config, model, where, 80e9)
    assert found.fitting and found.possible == len(found.fitting)
    assert len({str(candidate.settings) for candidate in found.fitting}) == len(found.fitting)
    for candidate in found.fitting:
        assert examine(candidate.config, where.world_size)[0] == []
        train, layout = candidate.config.train, layout_of(candidate.config, where.world_size)
        assert candidate.memory == memory_per_rank(model, layout, config.qsparse, config.bitnet, "bf16", train.micro_batch_size, 64)
        assert layout.data * candidate.micro_batches * train.micro_batch_size == 16
    times = [candidate.time.total for candidate in found.fitting]
    assert times == sorted(times)
    stages = {candidate.settings["zero.stage"] for candidate in found.fitting}
    assert stages == {1, 2, 3} and {candidate.settings["parallel.pipeline"] for candidate in found.fitting} >= {1, 2}


def test_every_layout_that_could_start_is_found():
    """By asking for all combinations of small numbers, where the search asks for divisors only."""
    config, model = small("--train.global_batch_size", "4", "--model.num_layers", "2")
    where = cluster(1, 4)
    found = {tuple(candidate.settings.values()) for candidate in search(config, model, where, 80e9).fitting}
    sizes, truths = (1, 2, 3, 4), (False, True)
    every = {
        (tensor, sequence, pipeline, virtual, 1, stage, recompute, micro)
        for tensor in sizes for sequence in truths for pipeline in sizes for virtual in sizes for stage in (1, 2, 3)
        for recompute in truths for micro in sizes
    }  # fmt: skip
    possible = {values for values in every if len(examine(with_settings(config, dict(zip(SEARCHED, values, strict=True))), 4)[0]) == 1}
    assert found == possible


def test_more_memory_removes_no_layout():
    config, model = small(*EXPERTS)
    before: set[str] = set()
    for usable in (0, 60e6, 70e6, 90e6, 150e6, 80e9):
        found = search(config, model, cluster(1, 4), usable)
        now = {str(candidate.settings) for candidate in found.fitting}
        assert before <= now and all(candidate.memory.total <= usable for candidate in found.fitting)
        assert len(now) == found.possible or found.nearest.memory.total > usable
        before = now
    assert before


def test_settings_that_are_kept():
    config, model = small("--parallel.tensor", "2", "--train.recompute", "true")
    found = search(config, model, cluster(1, 4), 80e9, frozenset({"parallel.tensor", "train.recompute"}))
    assert found.fitting
    assert {(item.settings["parallel.tensor"], item.settings["train.recompute"]) for item in found.fitting} == {(2, True)}


SEVEN_B = ["--config", str(CONFIGS / "7b_qsparse.yaml"), "--model.vocab_size", "32000"]


def test_the_command_gives_flags_that_a_plan_accepts(capsys, shards):
    command = [*SMALL, "--data.path", str(shards)]
    status, out, _ = suggested(capsys, *command, "--nodes", "2", "--gpus_per_node", "4", "--gpu", "H100-80")
    assert status == 0 and "besides" not in out
    flags = [line.split() for line in out.splitlines() if line.startswith("  --parallel.tensor")]
    assert 1 <= len(flags) <= 2
    for found in flags:
        assert plan.main([*command, *found, "--world_size", "8"]) == 0
    for words in ("not a measurement", "200 GB/s", "450 GB/s", "989 TFLOP/s", "Megatron-LM", "--calibrate"):
        assert words in out
    table = [line for line in out.splitlines() if line.startswith(("* ", "  ")) and " GiB " in line and "micro" not in line]
    assert sum(line.startswith("* ") for line in table) == 1 and any("as set" in line for line in table)


def test_nothing_fits(capsys):
    status, out, _ = suggested(capsys, *SEVEN_B, "--model.preset", "7b", "--nodes", "1", "--gpus_per_node", "1", "--gpu", "a100-40")
    assert status == 2
    assert "none of" in out and "the nearest needs" in out and "more --nodes" in out and "--train.recompute true" in out
    status, out, _ = suggested(capsys, *SEVEN_B, "--nodes", "8", "--gpu", "h100-80", "--reserve", "0.999")
    assert status == 2 and "--reserve below 0.9" in out


def test_no_layout_is_possible(capsys):
    status, out, _ = suggested(
        capsys, *SEVEN_B, "--train.global_batch_size", "1", "--nodes", "9", "--gpus_per_node", "7", "--gpu", "h100-80"
    )
    assert status == 2 and "train.global_batch_size=1" in out and "layouts)" in out


WRONG = [
    (["--gpu", "h100-80"], ["nodes is not set"]),
    (["--nodes", "8"], ["gpu is not set", "h100-80, h200-141"]),
    (["--nodes", "8", "--gpu", "h100"], ["gpu='h100' is unknown", "a100-80", "did you mean h100-80?"]),
    (["--nodes", "0", "--gpu", "h100-80"], ["nodes=0", "1 .. 100000"]),
    (["--nodes", "8", "--gpu", "h100-80", "--gpus_per_node", "-1"], ["gpus_per_node=-1"]),
    (["--nodes", "8", "--gpu", "h100-80", "--node_bandwidth", "0"], ["node_bandwidth=0.0", "larger than 0"]),
    (["--nodes", "8", "--gpu", "h100-80", "--reserve", "1"], ["reserve=1.0", "[0, 1)"]),
    (["--nodes", "8", "--gpu", "h100-80", "--efficiency", "1.5"], ["efficiency=1.5", "(0, 1]"]),
    (["--nodes", "8", "--gpu", "h100-80", "--efficiency", "0.5", "--calibrate", "runs/a"], ["efficiency has no effect beside calibrate"]),
    (["--nodes", "8", "--gpu", "h100-80", "--calibrate", "no/such/run"], ["calibrate=no/such/run is no run directory"]),
    (["--nodes", "many", "--gpu", "h100-80"], ["nodes=many: an integer is needed"]),
    (["--nodes", "8", "--gpu", "h100-80", "--world_size", "64"], ["world_size has no effect with --suggest"]),
    (["--nodes", "8", "--gpu", "h100-80", "--train.steps", "0"], ["train.steps=0"]),
    (["--nodes", "8", "--gpu", "h100-80", "--train.precision", "fp32"], ["train.precision=fp32", "bf16"]),
    (["--nodes", "8", "--gpu", "h100-80", "--model.vocab_size", "null"], ["model.vocab_size is not set"]),
    (["--nodes", "8", "--gpu", "h100-80", "--model.preset", "8b"], ["model.preset='8b'", "7b"]),
    (["--nodes", "8", "--gpu", "h100-80", "--node_bandwith", "1"], ["no setting node_bandwith"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), WRONG, ids=[words[0] for _, words in WRONG])
def test_mistakes_are_told(capsys, flags, words):
    status, out, err = suggested(capsys, *SEVEN_B, *flags)
    assert (status, out) == (2, "") and err.startswith("error: ")
    for word in words:
        assert word in err


def test_flags_of_the_suggestion_have_no_effect_without_it(capsys):
    assert plan.main([*SEVEN_B, "--nodes", "8", "--gpu", "h100-80"]) == 2
    assert "gpu, nodes: no effect without --suggest" in capsys.readouterr().err


def test_a_suggestion_needs_no_torch():
    script = (
        "import sys\n"
        "from pretrain.plan import main\n"
        f"assert main(['--suggest', '--nodes', '32', '--gpu', 'h100-80', *{SEVEN_B!r}]) == 0\n"
        "print(sorted({'torch', 'megatron', 'deepspeed', 'mlflow'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=CONFIGS.parents[1])
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]", result.stderr


def _measured_run(folder: Path, config, model, world_size: int, seconds: float, peak: float = H100.peak_flops) -> Path:
    """A run directory with what `LogMetrics` writes on GPUs; the first entry is slow, as with kernels that are being compiled."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(dataclasses.replace(config, model=model)))
    journal = Journal(folder / "metrics.jsonl")
    tokens = config.train.global_batch_size * config.data.sequence_length
    for step, took in ((10, 5 * seconds), (20, 0.99 * seconds), (30, seconds), (40, 1.2 * seconds)):
        mfu = tokens / took * flops_per_token(model, config.data.sequence_length).total / (peak * world_size)
        journal.append(step, {"perf/step_time_s": took, "perf/tokens_per_s": tokens / took, "perf/mfu": mfu})
    journal.close()
    return folder


@pytest.mark.parametrize("flags", [(), ("--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2")])
def test_a_measured_step_gives_its_efficiency_back(tmp_path, capsys, flags):
    config, model = configured("7b_qsparse", *flags)
    real = dataclasses.replace(H100, efficiency=0.31)
    run = _measured_run(tmp_path / "run", config, model, 64, step_time(config, model, cluster(8, gpu=real)).total)
    status, out, _ = suggested(capsys, *SEVEN_B, "--nodes", "32", "--gpu", "h100-80", "--calibrate", str(run))
    assert status == 0 and "0.31 of 989 TFLOP/s" in out and "3 entries on 64 GPUs" in out


def test_runs_that_cannot_calibrate(tmp_path, capsys):
    config, model = configured("7b_qsparse")
    command = [*SEVEN_B, "--nodes", "8", "--gpu", "h100-80", "--calibrate"]
    too_fast = _measured_run(tmp_path / "fast", config, model, 64, 0.1)
    other_gpu = _measured_run(tmp_path / "a100", config, model, 64, 3.0, peak=312e12)
    other_model = _measured_run(tmp_path / "dense", *configured("7b_dense"), 64, 2.0)
    short = _measured_run(tmp_path / "short", config, model, 64, 2.0)
    lines = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
    (short / "metrics.jsonl").write_text(lines[0])
    cpu = _measured_run(tmp_path / "cpu", config, model, 64, 2.0)
    (cpu / "metrics.jsonl").write_text("".join(lines).replace("perf/mfu", "perf/other"))
    for run, words in (
        (too_fast, "shorter than the GPU's peak"), (other_gpu, "another kind of GPU"), (other_model, "qsparse is another one"),
        (short, "let the run go on"), (cpu, "not on a GPU whose peak is known"),
    ):  # fmt: skip
        status, out, err = suggested(capsys, *command, str(run))
        assert (status, out) == (2, "") and words in err
