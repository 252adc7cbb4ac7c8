"""The configuration of the mixture of experts, trained on two expert-parallel processes, stopped half-way and resumed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pretrain
from tests.pretrain.forked import ForkedRun
from tests.pretrain.launch import TIMEOUT_S, journal, losses

CONFIG = Path(pretrain.__file__).parent / "configs" / "tiny_moe_qsparse.yaml"
STEPS = 4


ARGUMENTS = [
    *("--config", CONFIG, "--data.sequence_length", 32, "--train.steps", STEPS, "--schedule.warmup_steps", 2, "--train.log_interval", 1),
    *("--train.micro_batch_size", 2, "--validation.interval", 0, "--validation.samples", 16, "--checkpoint.interval", 2),
    *("--tracking.enabled", "false", "--tracking.system_metrics", "false", "--device", "cpu"),
]  # fmt: skip


def _train(*args: object, processes: int = 2) -> str:
    with ForkedRun([str(arg) for arg in (*ARGUMENTS, *args)], processes) as run:
        output, _ = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 0, output
    return output


def test_a_mixture_trains_is_measured_and_resumes_bit_for_bit(shards, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    _train("--data.path", shards, "--output_dir", straight)
    assert sorted(losses(straight)) == list(range(1, STEPS + 1))
    entry = journal(straight)[-1]
    for layer in range(4):
        row = [entry[f"experts/layers.{layer}.{expert}/load"] for expert in range(8)]
        assert abs(sum(row) - 1) < 1e-9 and entry[f"moe/layers.{layer}/load_max"] == max(row)
    # Half of 256 and of 192 features, by groups of 32 and of 24.
    assert entry["sparsity/mlp.down"] > 1 - 13 / 32 - 1e-9 and entry["sparsity/mlp.shared_down"] > 1 - 10 / 24 - 1e-9
    assert entry["experts/layers.0.0/sparsity.mlp.gate_up"] >= 1 - 102 / 256 - 1e-9
    assert 0.9 < entry["moe/aux_loss"] < 8
    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoints" / "step_00000004")
    assert "going on after step 2" in _train("--data.path", shards, "--output_dir", broken)
    assert losses(broken) == losses(straight)

    # The same checkpoint on one process: other micro-batches, so other rounding in bf16, but the same network.
    shutil.rmtree(broken / "checkpoints" / "step_00000004")
    assert "going on after step 2" in _train("--data.path", shards, "--output_dir", broken, "--parallel.expert", 1, processes=1)
    assert abs(losses(broken)[3] - losses(straight)[3]) < 1e-4


def test_the_plan_counts_experts(shards):
    command = [sys.executable, "-m", "pretrain.plan", "--config", str(CONFIG), "--data.path", str(shards), "--data.sequence_length", "32"]
    done = subprocess.run([*command, "--world_size", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("8 in each layer, 2 for each token, and a shared one of width 192", "mlp.shared_down", "data 2, expert 2"):
        assert words in done.stdout, done.stdout
