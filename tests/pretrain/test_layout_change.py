"""A run that changes its layout at every restart goes on as the run that never did."""

import shutil

import torch

from tests.pretrain.launch import losses, train

RUN = [
    *("--train.micro_batch_size", 2, "--train.global_batch_size", 8, "--train.steps", 6, "--validation.samples", 8),
    *("--train.precision", "fp32", "--qsparse.keep", "0.4", "--optimizer.lr", "3e-3", "--schedule.warmup_steps", 2),
    *("--checkpoint.interval", 2, "--checkpoint.keep_last", 9),
]


def test_zero_3_and_tensor_parallelism_take_over_a_run(shards, tmp_path):
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    train("--data.path", shards, *RUN, "--output_dir", straight)
    expected = losses(straight)
    shutil.copytree(straight, changing)
    for step, layout, saved in (
        (2, ["--zero.stage", 3, "--train.recompute", "true"], {"zero_stage": 3, "data": 2}),
        (4, ["--parallel.tensor", 2, "--parallel.sequence", "true"], {"zero_stage": 1, "tensor": 2}),
        (4, ["--parallel.pipeline", 2, "--zero.stage", 2], {"zero_stage": 2, "pipeline": 2}),
    ):
        for later in range(step + 2, 7, 2):
            shutil.rmtree(changing / "checkpoints" / f"step_{later:08d}")
        assert f"going on after step {step}" in train("--data.path", shards, *RUN, "--output_dir", changing, *layout)
        found = losses(changing)
        assert found.keys() == expected.keys()
        assert saved.items() <= torch.load(changing / "checkpoints" / "step_00000006" / "state" / "common.pt")["layout"].items()
        assert max(abs(found[number] - expected[number]) for number in expected) <= 1e-5
