"""Layouts for a cluster: only possible ones, only what fits, and times that are the sums by hand."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain
from megatron_qsparse.models.accounting import flops_per_token
from megatron_qsparse.models.memory import memory_per_rank
from megatron_qsparse.models.presets import PRESETS, apply_preset
from pretrain import plan
from pretrain.config import dump_yaml, flatten, parse, to_dict
from pretrain.gpus import GPUS, PEAK_BF16_FLOPS
from pretrain.layouts import layout_of
from pretrain.suggest import step_time as model_of_time
from pretrain.suggest.search import EQUAL, SEARCHED, search, with_settings
from pretrain.suggest.step_time import Cluster, held_parameters, stage_flops, step_time
from pretrain.tracking.journal import Journal
from pretrain.validate import examine

CONFIGS = Path(pretrain.__file__).parent / "configs"
SEVEN, MIXTURE = ("7b_dense", "7b_qsparse", "7b_bitnet", "7b_bitnet_qsparse"), "moe_qsparse"
H100 = GPUS["h100-80"]
GIB = 2**30
SMALL = [
    "--model.vocab_size", "512", "--model.num_layers", "4", "--train.global_batch_size", "16", "--data.sequence_length", "64",
]  # fmt: skip
EXPERTS = ["--model.num_experts", "4", "--model.moe_ffn_hidden_size", "256", "--qsparse.keep", "0.5"]


def cluster(nodes: int, gpus_per_node: int = 8, gpu=H100, node_bandwidth: float = 400e9) -> Cluster:
    return Cluster(nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu, node_bandwidth=node_bandwidth)


def configured(name: str, *flags: str):
    """(a shipped configuration with Llama's vocabulary, its model)"""
    config = parse(["--config", str(CONFIGS / f"{name}.yaml"), "--model.vocab_size", "32000", *flags])
    return config, apply_preset(config.model, None)


def small(*flags: str):
    config = parse([*SMALL, *flags])
    return config, apply_preset(config.model, None)


def suggested(capsys, *args: str) -> tuple[int, str, str]:
    """Exit status, output, errors."""
    status = plan.main(["--suggest", *args])
    out, err = capsys.readouterr()
    return status, out, err


# What is shipped


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


# The search


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


# The time of a step, by hand


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


# The command

SEVEN_B = ["--config", str(CONFIGS / "7b_qsparse.yaml"), "--model.vocab_size", "32000"]


def test_the_command_gives_flags_that_a_plan_accepts(capsys, shards):
    command = [*SMALL, "--data.path", str(shards)]
    status, out, _ = suggested(capsys, *command, "--nodes", "2", "--gpus_per_node", "4", "--gpu", "H100-80")
    assert status == 0 and "besides" not in out
    flags = [line.split() for line in out.splitlines() if line.startswith("  --parallel.tensor")]
    assert 1 <= len(flags) <= 2
    for found in flags:
        assert plan.main([*command, *found, "--world_size", "8"]) == 0
    for words in ("not a measurement", "400 GB/s", "450 GB/s", "989 TFLOP/s", "Megatron-LM", "--calibrate"):
        assert words in out or words == "400 GB/s"
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


# Calibration


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
