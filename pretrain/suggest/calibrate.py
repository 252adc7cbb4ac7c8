"""The fraction of a GPU's peak that a run of the same model reached, from the step times in its metrics.jsonl."""

from dataclasses import replace
from pathlib import Path
from statistics import median

from megatron_qsparse.models.accounting import flops_per_token
from megatron_qsparse.models.config import ModelConfig
from pretrain.config import ConfigurationError, PretrainConfig, parse
from pretrain.layouts import layout_of
from pretrain.suggest.step_time import Cluster, step_time
from pretrain.tracking.journal import read_journal

STEP_TIME, UTILIZATION, RATE = "perf/step_time_s", "perf/mfu", "perf/tokens_per_s"


def efficiency_of(directory: Path, config: PretrainConfig, model: ModelConfig, cluster: Cluster) -> tuple[float, str]:
    """(efficiency with which `step_time` gives the run's median step time, what to say of it).

    config, model: what layouts are looked for; the run must train the same network. cluster: its GPU and links are the run's; of
    how many the run had is in its metrics. Raises ConfigurationError where the run cannot tell.
    """
    run, rows = _read(directory)
    for name, here, there in (
        ("model", model, run.model), ("qsparse", config.qsparse, run.qsparse), ("bitnet", config.bitnet, run.bitnet),
        ("data.sequence_length", config.data.sequence_length, run.data.sequence_length),
        ("train.precision", config.train.precision, run.train.precision),
    ):  # fmt: skip
        if here != there:
            raise ConfigurationError(f"calibrate={directory}: the run's {name} is another one, and so is its speed: name a run of this one")
    world_size = _world_size(directory, run, rows, cluster)
    node = min(world_size, cluster.gpus_per_node)
    if world_size % node:
        raise ConfigurationError(f"calibrate={directory}: its {world_size} GPUs are no whole nodes of {node}: set --gpus_per_node")
    bandwidth = cluster.node_bandwidth / cluster.gpus_per_node * node
    there = replace(cluster, nodes=world_size // node, gpus_per_node=node, node_bandwidth=bandwidth)
    seconds = median(row[STEP_TIME] for row in rows)
    ideal = step_time(run, run.model, replace(there, gpu=replace(there.gpu, efficiency=1.0)))
    bubbles = (run.parallel.pipeline - 1) / (run.parallel.virtual_pipeline * layout_of(run, world_size).micro_batches)
    computing = ideal.compute * (1 + bubbles)
    rest = ideal.total - computing
    if seconds <= rest + computing:
        raise ConfigurationError(f"calibrate={directory}: its steps of {seconds:.3f} s are shorter than the GPU's peak and links allow "
                                 f"({rest + computing:.3f} s): check --gpu, --gpus_per_node and --node_bandwidth")  # fmt: skip
    efficiency = computing / (seconds - rest)
    text = f"so that the {seconds:.3f} s that a step of {directory} took in the median of {len(rows)} entries on {world_size} GPUs come out"
    return efficiency, text


def _read(directory: Path) -> tuple[PretrainConfig, list[dict]]:
    """(its configuration, entries with step times; the first one, in which kernels are compiled and caches filled, left out)"""
    try:
        run = parse(["--config", str(directory / "config.yaml")])
        rows = [row for row in read_journal(directory / "metrics.jsonl") if STEP_TIME in row][1:]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"calibrate={directory} is no run directory that can be read: {error}") from error
    if not rows:
        raise ConfigurationError(f"calibrate={directory}: metrics.jsonl has no second {STEP_TIME}: let the run go on for a while")
    if not all(UTILIZATION in row for row in rows):
        raise ConfigurationError(f"calibrate={directory}: the run was not on a GPU whose peak is known: its times say nothing of one")
    return run, rows


def _world_size(directory: Path, run: PretrainConfig, rows: list[dict], cluster: Cluster) -> int:
    """GPUs of the run: its utilization is that of all of them at this peak. So another kind of GPU is found out as well."""
    per_token = flops_per_token(run.model, run.data.sequence_length).total
    sizes = {row[RATE] * per_token / (row[UTILIZATION] * cluster.gpu.peak_flops) for row in rows}
    size = round(min(sizes))
    model_ranks = run.parallel.tensor * run.parallel.pipeline
    if size < 1 or any(abs(other - size) > 0.01 for other in sizes) or size % model_ranks:
        raise ConfigurationError(f"calibrate={directory}: its entries were written on another kind of GPU, or on different numbers of them")
    return size
