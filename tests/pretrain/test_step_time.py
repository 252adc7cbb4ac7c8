"""The time of a step, part by part, against sums by hand."""

import dataclasses

import pytest

from megatron_qsparse.models.accounting import flops_per_token
from megatron_qsparse.models.memory import memory_per_rank
from pretrain.gpus import GPUS, PEAK_BF16_FLOPS
from pretrain.layouts import layout_of
from pretrain.suggest import step_time as model_of_time
from pretrain.suggest.search import with_settings
from pretrain.suggest.step_time import held_parameters, stage_flops, step_time
from tests.pretrain.clusters import EXPERTS, H100, cluster, configured, small


def test_the_parts_of_a_step_by_hand():
    """Two nodes of four: tensor 2 with sequence parallelism, so that 4 data-parallel ranks are two on each node."""
    config, model = small("--parallel.tensor", "2", "--parallel.sequence", "true", "--train.micro_batch_size", "2")
    gpu = dataclasses.replace(H100, peak_flops=1e12, efficiency=0.5, nvlink=100e9, hbm=1e12)
    time = step_time(config, model, cluster(2, 4, gpu, 50e9))
    tokens, hidden, count = 2 * 64, 256, 2
    assert time.compute == pytest.approx(count * tokens * flops_per_token(model, 64).total / 2 / 0.5e12)
    # 4 layers, attention and MLP; five passes over the hidden states in bf16, half of which goes to the other rank.
    gathers_and_scatters = 2 * (2 + 3)
    assert time.tensor == pytest.approx(count * tokens * 4 * gathers_and_scatters * hidden * 2 / 2 / 80e9)
    held = (4 * (4 * 256 * 256 + 3 * 704 * 256) + 2 * 512 * 256) / 2 + 9 * 256
    assert held_parameters(model, layout_of(config, 8), False) == (held, 0)
    # Ring of 4, all-reduce in fp32 and all-gather in bf16; the two tensor-parallel ranks' rings share the node's network.
    assert time.data == pytest.approx(held * (8 + 2) * 3 / 4 * 2 / 40e9)
    assert time.gradients == pytest.approx(count * 12 * held / 0.8e12)
    assert time.optimizer == pytest.approx(40 * held / 4 / 0.8e12)
    assert (time.experts, time.bubble, time.pipeline) == (0, 0, 0)
    assert time.total == pytest.approx(time.compute + time.tensor + time.data + time.gradients + time.optimizer)


def test_recomputation_is_another_forward_of_the_layers():
    config, model = small()
    plain, again = (stage_flops(model, layout_of(with_settings(config, {"train.recompute": on}), 1), 64) for on in (False, True))
    flops = flops_per_token(model, 64)
    assert plain == flops.total and again == flops.total + flops.forward - 2 * 256 * 512


def test_pipeline_stages_by_hand():
    config, model = small("--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2")
    layout = layout_of(config, 2)
    head = 3 * 2 * 256 * 512
    assert stage_flops(model, layout, 64) == (flops_per_token(model, 64).total - head) / 2 + head
    time = step_time(config, model, cluster(2, 1, node_bandwidth=10e9))
    assert time.bubble == pytest.approx(time.compute / (2 * 16))
    # Two chunks, there and back, for 16 micro-batches.
    assert time.pipeline == pytest.approx(16 * 64 * 4 * 256 * 2 / 8e9)
    assert time.tensor == time.data == 0


@pytest.mark.parametrize(("stage", "bytes_"), [(1, 8 + 2), (2, 8 * 4 + 2), (3, 8 * 4)])
def test_what_each_zero_stage_sends(stage, bytes_):
    config, model = small("--zero.stage", str(stage))
    time = step_time(config, model, cluster(1, 4))
    held = sum(held_parameters(model, layout_of(config, 4), False))
    assert layout_of(config, 4).micro_batches == 4
    assert time.data == pytest.approx(held * bytes_ * 3 / 4 / (0.8 * 450e9))


def test_quantized_inputs_are_gathered_as_codes():
    flags = ("--parallel.tensor", "2", "--parallel.sequence", "true")
    full, codes = (step_time(*small(*flags, "--bitnet.enabled", bitnet), cluster(1, 2)) for bitnet in ("false", "true"))
    # Of the ten bytes for a feature the two gathers of an input shrink from four to two.
    assert codes.tensor == pytest.approx(full.tensor * 8 / 10) and codes.compute == full.compute


def test_experts_within_a_node_and_across():
    config, model = small(*EXPERTS, "--parallel.expert", "4")
    within, across = (step_time(config, model, cluster(nodes, 4 // nodes, node_bandwidth=20e9)) for nodes in (1, 2))
    # 2 copies of a token to and fro, forward and backward, 3/4 to other ranks; across, half of all by a node's network for 2 GPUs.
    size = 4 * 64 * 4 * 4 * 2 * 256 * 2
    assert within.experts == pytest.approx(size * 3 / 4 / (0.8 * 450e9)) and across.experts == pytest.approx(size / 2 / (16e9 / 2))
    dense, spread = held_parameters(model, layout_of(config, 4), False)
    assert spread == 4 * 3 * 256 * 256 and within.data == pytest.approx(dense * 10 * 3 / 4 / (0.8 * 450e9))


@pytest.mark.parametrize("flags", [(), ("--parallel.tensor", "2"), ("--parallel.pipeline", "2"), (*EXPERTS, "--parallel.expert", "2")])
def test_parameters_held_are_those_of_the_memory(flags):
    config, model = small(*flags)
    layout = layout_of(config, 4)
    memory = memory_per_rank(model, layout, config.qsparse, config.bitnet, "bf16", 1, 64)
    assert sum(held_parameters(model, layout, False)) == pytest.approx(memory.weights / 2, rel=2e-3)


def test_faster_hardware_is_never_slower():
    config, model = configured("7b_bitnet")
    base = step_time(config, model, cluster(8))
    for name, part in (("peak_flops", "compute"), ("nvlink", "tensor"), ("hbm", "gradients")):
        better = step_time(config, model, cluster(8, gpu=dataclasses.replace(H100, **{name: 2 * getattr(H100, name)})))
        assert getattr(better, part) == pytest.approx(getattr(base, part) / 2) and better.total < base.total
    assert step_time(config, model, cluster(8, node_bandwidth=800e9)).data == pytest.approx(base.data / 2)


def test_the_documented_parts_are_the_parts():
    for part in dataclasses.fields(model_of_time.StepTime):
        assert f"- {part.name}: " in model_of_time.__doc__


def test_the_tables_of_gpus_agree():
    for name, gpu in GPUS.items():
        assert gpu.peak_flops == PEAK_BF16_FLOPS[name.split("-")[0].upper()] and gpu.memory == int(name.split("-")[1]) * 1e9
        assert 0 < gpu.efficiency < 1 and gpu.source
