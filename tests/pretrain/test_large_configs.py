"""The configurations for clusters: nothing is missing but data, they fit 80 GB GPUs, and differ in their variant only."""

from pathlib import Path

import pytest

from megatron_qsparse.models.accounting import flops_per_token
from megatron_qsparse.models.memory import memory_per_rank
from megatron_qsparse.models.presets import PRESETS
from pretrain.config import flatten, parse, to_dict
from pretrain.layouts import layout_of
from pretrain.suggest.search import EQUAL, SEARCHED, evaluate, search
from pretrain.validate import examine
from tests.pretrain.clusters import CONFIGS, MIXTURE, SEVEN, cluster, configured


@pytest.mark.parametrize("world_size", [64, 256])
@pytest.mark.parametrize("name", [*SEVEN, MIXTURE])
def test_the_large_configurations_lack_nothing_but_data_and_fit_with_room_to_spare(name, world_size):
    config, model = configured(name)
    problems, found, _ = examine(config, world_size)
    assert len(problems) == 1 and problems[0].startswith("data.path is not set") and found == model
    layout = layout_of(config, world_size)
    memory = memory_per_rank(model, layout, config.qsparse, config.bitnet, "bf16", config.train.micro_batch_size, 2048)
    assert memory.total < 0.55 * 80e9
    assert config.train.global_batch_size == config.train.micro_batch_size * layout.data * layout.micro_batches
    assert parse(["--config", str(CONFIGS / f"{name}.yaml")]).output_dir == "" and config.run_directory == Path("runs") / name


def test_the_7b_configurations_differ_in_what_makes_the_variant():
    dense = flatten(to_dict(configured(SEVEN[0])[0]))
    sparse, quantized = {"qsparse.keep"}, {"bitnet.enabled", "optimizer.lr", "schedule.kind", "schedule.second_lr"}
    for name, expected in zip(SEVEN[1:], (sparse, quantized, sparse | quantized), strict=True):
        other = flatten(to_dict(configured(name)[0]))
        assert {key for key in dense if dense[key] != other[key]} == expected | {"tracking.run_name"}


@pytest.mark.parametrize("name", [*SEVEN, MIXTURE])
def test_the_large_configurations_follow_the_paper(name):
    config, _ = configured(name)
    paper, (first, second) = PRESETS["7b"].paper, PRESETS["7b"].paper.bitnet_learning_rates
    assert config.train.global_batch_size * config.data.sequence_length == paper.batch_tokens
    assert (config.train.steps, config.data.sequence_length) == (paper.steps, paper.sequence_length)
    assert (config.optimizer.beta1, config.optimizer.beta2) == paper.adam_betas and config.optimizer.weight_decay == paper.weight_decay
    rates = (config.optimizer.lr, config.schedule.second_lr)
    assert rates == ((first, second) if config.bitnet.enabled else (paper.learning_rate, 0.0))


def test_a_token_passes_as_many_linears_of_the_mixture_as_of_7b():
    (mixture, mixed), (_, dense) = configured(MIXTURE), configured("7b_qsparse")
    router = 6 * mixed.num_layers * mixed.num_experts * mixed.hidden_size
    assert flops_per_token(mixed, 2048).total == flops_per_token(dense, 2048).total + router
    assert mixture.parallel.expert == 8


@pytest.mark.parametrize("nodes", [8, 32])
@pytest.mark.parametrize("name", SEVEN)
def test_what_is_suggested_for_7b_fits(name, nodes):
    found = search(*configured(name), cluster(nodes), 0.85 * 80e9)
    assert found.best.memory.total <= 0.85 * 80e9 and found.best.time.total <= (1 + EQUAL) * found.fitting[0].time.total
    if nodes == 8:
        # The shipped layout is the one that the search would take.
        assert found.best.settings == {name: value for name, value in _settings(configured(name)[0]).items()}


def _settings(config) -> dict:
    flat = flatten(to_dict(config))
    return {name: flat[name] for name in SEARCHED}


@pytest.mark.parametrize("name", [*SEVEN, MIXTURE])
@pytest.mark.parametrize("nodes", [8, 32])
def test_the_page_says_what_the_code_says(name, nodes):
    page = (CONFIGS.parents[1] / "docs" / "plan_7b.md").read_text()
    config, model = configured(name)
    layout, found = layout_of(config, 8 * nodes), evaluate(config, model, cluster(nodes))
    size, seconds = config.train.micro_batch_size, found.time.total
    row = (
        f"| {name} | {nodes} | {layout.data} | {layout.micro_batches} of {size} sample{'s' if size > 1 else ''} | "
        f"{found.memory.total / 2**30:.1f} GiB | {100 - found.memory.total / 80e7:.0f} % | {seconds:.3f} s | {seconds / 0.864:.2f} days |"
    )
    assert row in page


@pytest.mark.parametrize("name", SEVEN)
def test_the_faster_layout_of_the_page_on_32_nodes(name):
    page = (CONFIGS.parents[1] / "docs" / "plan_7b.md").read_text()
    flags = next(line for line in page.splitlines() if line.startswith("--parallel.pipeline"))
    config, model = configured(name, *flags.split())
    assert [problem.split()[0] for problem in examine(config, 256)[0]] == ["data.path"]
    faster, plain = (evaluate(item, model, cluster(32)) for item in (config, configured(name)[0]))
    assert 0.3955 < faster.time.total < 0.3995 and 0.4495 < plain.time.total < 0.4535
    assert 19.5 < faster.memory.total / 2**30 < 20.55
