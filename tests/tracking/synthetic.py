"""Runs that look like the quickstart's, written through the Tracker: the comparison's tests know every number in them."""

from __future__ import annotations

import math
from pathlib import Path

from pretrain.tracking import DatasetInput, Tracker, TrackingConfig

RUNS = {
    # name: (keep, bitnet, final validation loss, tokens per second, learning rate)
    "dense": (1.0, False, 4.103, 13000.0, 0.002),
    "qsparse": (0.4, False, 4.148, 10800.0, 0.002),
    "bitnet": (1.0, True, 4.096, 12100.0, 0.004),
    "bitnet_qsparse": (0.4, True, 4.133, 10100.0, 0.004),
}
ENTROPY = 6.251
SEED_STEP = 0.021
"""Seed 1 ends this much above seed 0."""
TOKENS_PER_STEP = 2048
PARAMETERS = 5_260_000


def train_loss(name: str, step: int, steps: int) -> float:
    """A falling curve with reproducible noise that ends near the run's validation loss."""
    final = RUNS[name][2]
    progress = step / steps
    noise = 0.05 * math.sin(12.9898 * step + 78.233 * len(name)) * math.cos(3.7 * step)
    return final + 4.2 * math.exp(-9 * progress) + 0.45 * (1 - progress) ** 2 + noise


def validation_loss(name: str, step: int, steps: int) -> float:
    """Exactly the run's final loss at the last step."""
    final = RUNS[name][2]
    progress = step / steps
    own = 0.02 * (1 - progress) * math.sin(0.01 * step + len(name))
    return final + 4.2 * (math.exp(-9 * progress) - math.exp(-9)) + 0.45 * (1 - progress) ** 2 + own


def step_metrics(name: str, step: int, steps: int) -> dict[str, float]:
    """What the trainer logs at one step >= 1."""
    keep, _, _, speed, rate = RUNS[name]
    tokens = step * TOKENS_PER_STEP
    sparsity = 1 - keep
    return {
        "train/loss": train_loss(name, step, steps),
        "train/grad_norm": 1.0 + 1 / step,
        "train/lr": rate * (1 - step / steps),
        "train/tokens": tokens,
        "train/flops": 6.0 * PARAMETERS * tokens,
        "train/activated_flops": 6.0 * PARAMETERS * (0.4 + 0.6 * keep) * tokens,
        "perf/tokens_per_s": speed + step % 3,
        "perf/step_time_s": TOKENS_PER_STEP / speed,
        "perf/peak_memory_gib": 0.85,
        "sparsity/attention.qkv": sparsity,
        "sparsity/attention.proj": sparsity,
        "sparsity/mlp.gate_up": sparsity,
        "sparsity/mlp.down": sparsity,
        "sparsity/overall": sparsity,
    }


def write_run(
    folder: Path,
    name: str,
    uri: str,
    *,
    experiment: str = "quickstart",
    steps: int = 40,
    interval: int = 10,
    validate: bool = True,
    seed: int = 0,
) -> Path:
    """Train nothing, log everything; returns the run directory, named like the run: `name`, or `name`_seed1 for seed 1."""
    keep, bitnet, _, _, rate = RUNS[name]
    directory = folder / (f"{name}_seed{seed}" if seed else name)
    config = TrackingConfig(experiment=experiment, uri=uri, system_metrics=False, drain_timeout_s=60.0)
    params = {
        "qsparse.keep": keep,
        "bitnet.enabled": bitnet,
        "train.steps": steps,
        "train.seed": seed,
        "optimizer.lr": rate,
        "model.preset": "tiny",
        "output_dir": str(directory.name),
    }
    shards = DatasetInput(name="shards", digest="0f" * 32, source="shards/manifest.json")
    tracker = Tracker(config, directory, params=params, tags={"git.commit": "0" * 40}, datasets=[shards])
    start = {
        "model/parameters": PARAMETERS,
        "model/activated_parameters": PARAMETERS * (0.4 + 0.6 * keep),
        "data/validation_unigram_entropy": ENTROPY,
    }
    tracker.log({**start, "val/loss": validation_loss(name, 0, steps)} if validate else start, step=0)
    for step in range(1, steps + 1):
        metrics = step_metrics(name, step, steps)
        if validate and step % interval == 0:
            metrics["val/loss"] = validation_loss(name, step, steps) + seed * SEED_STEP
        tracker.log(metrics, step)
    tracker.close()
    return directory
