"""`python -m pretrain.plan --suggest --nodes N --gpu NAME`: layouts of a run that fit a cluster, the fastest first.

Exit status 0 where there is one, 2 where nothing fits or something must be changed first.
"""

import math
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from megatron_qsparse.models.accounting import parameters
from megatron_qsparse.models.config import ModelConfig
from pretrain.arguments import read, to_config
from pretrain.config import ConfigurationError, PretrainConfig
from pretrain.gpus import GPUS
from pretrain.suggest import page
from pretrain.suggest.calibrate import efficiency_of
from pretrain.suggest.search import SEARCHED, evaluate, layout_problems, search
from pretrain.suggest.step_time import Cluster
from pretrain.validate import examine
from pretrain.validation import ranges

FLAG = "--suggest"
ARGUMENTS: dict[str, tuple[type, object, str]] = {
    "nodes": (int, None, "nodes of the cluster"),
    "gpus_per_node": (int, 8, "GPUs of each node"),
    "gpu": (str, "", f"kind of GPU: {', '.join(GPUS)}"),
    "node_bandwidth": (float, None, "GB/s that all network adapters of a node send together, in one direction; unset: the GPU's "
                                    "usual node"),
    "reserve": (float, 0.15, "fraction of a GPU's memory that is kept free"),
    "efficiency": (float, None, "fraction of the GPU's peak that computation reaches; unset: assumed for the kind of GPU"),
    "calibrate": (str, "", "run directory of the same model on the same kind of GPU, whose measured step time gives the efficiency"),
}  # fmt: skip
"""Name -> (type, default, help) of what goes with --suggest."""
TYPES = {name: kind for name, (kind, _, _) in ARGUMENTS.items()}
LIMITS = {"nodes": 100_000, "gpus_per_node": 1024}


def add_arguments(parser) -> None:
    """To the parser of `pretrain.plan`."""
    text = "rank layouts of the configuration on --nodes nodes of --gpu GPUs instead; a layout setting given as a flag is kept"
    parser.add_argument(FLAG, action="store_true", help=text)
    for name, (kind, default, words) in ARGUMENTS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"with {FLAG}: {words}")


def misplaced(args: list[str]) -> str | None:
    """Flags of --suggest without it, and the other way round, would have no effect."""
    given = _names(args)
    if FLAG in args:
        if whole := sorted(given & {name.split(".")[0] for name in SEARCHED}):
            return f"{whole[0]}: with {FLAG} name each setting that is to stay, say --parallel.tensor"
        return f"world_size has no effect with {FLAG}: give --nodes and --gpus_per_node" if "world_size" in given else None
    lost = sorted(given & ARGUMENTS.keys())
    return f"{', '.join(lost)}: no effect without {FLAG}" if lost else None


def main(parser, args: list[str]) -> int:
    """args: with `FLAG`. Raises ConfigurationError with a line for each mistake."""
    args = [arg for arg in args if arg != FLAG]
    values = read(parser, args, more=TYPES)
    config, (cluster, usable, source) = to_config(values), _cluster(values)
    model = _model(config)
    if values["calibrate"]:
        efficiency, source = efficiency_of(Path(values["calibrate"]), config, model, cluster)
        cluster = replace(cluster, gpu=replace(cluster.gpu, efficiency=efficiency))
    pinned = frozenset(SEARCHED) & _names(args)
    found = search(config, model, cluster, usable, pinned)
    size = f"{values['nodes']} node{'s' if values['nodes'] > 1 else ''} of {cluster.gpus_per_node} {values['gpu'].lower()}"
    count = parameters(model, config.bitnet.subln).total
    batch = f"{config.train.global_batch_size} samples of {config.data.sequence_length} tokens"
    lines = [
        f"{count / 1e9:.3g} billion parameters on {size}, {batch} a step: {found.possible:,} layouts are possible, "
        f"{len(found.fitting):,} fit into {usable / page.GIB:.1f} GiB ({cluster.gpu.memory / 1e9:.0f} GB less "
        f"{100 * values['reserve']:.0f} %); seconds of a step on the right\n"
    ]
    if found.best is None:
        lines += page.nothing_lines(found, cluster, usable, values["reserve"])
    else:
        configured = None if layout_problems(config, model, cluster.world_size) else evaluate(config, model, cluster)
        lines += [page.layout_table(found, configured, cluster), "", *page.choice_lines(found), ""]
        lines += page.source_lines(cluster, values["gpu"].lower(), values["reserve"], source)
        problems = examine(found.best.config, cluster.world_size)[0]
        lines += [f"besides, before the run can start: {problem}" for problem in problems]
    print("\n".join(lines))
    return 2 if found.best is None else 0


def _cluster(values) -> tuple[Cluster, float, str]:
    """(cluster, usable bytes of a GPU, where its efficiency comes from)"""
    mistakes = []
    if values["nodes"] is None:
        mistakes.append(f"nodes is not set: {FLAG} needs --nodes N")
    for name, limit in LIMITS.items():
        if values[name] is not None and not 1 <= values[name] <= limit:
            mistakes.append(f"{name}={values[name]} must lie in 1 .. {limit}")
    gpu = GPUS.get(values["gpu"].lower())
    if gpu is None:
        close = get_close_matches(values["gpu"].lower(), GPUS, n=1)
        what = f"gpu={values['gpu']!r} is unknown" if values["gpu"] else "gpu is not set"
        mistakes.append(f"{what}: choose one of {', '.join(GPUS)}{f'; did you mean {close[0]}?' if close else ''}")
    bandwidth, efficiency = values["node_bandwidth"], values["efficiency"]
    if bandwidth is not None and not (0 < bandwidth and math.isfinite(bandwidth)):
        mistakes.append(f"node_bandwidth={bandwidth} must be larger than 0 GB/s")
    if efficiency is not None and not 0 < efficiency <= 1:
        mistakes.append(f"efficiency={efficiency} must lie in (0, 1]")
    if not 0 <= values["reserve"] < 1:
        mistakes.append(f"reserve={values['reserve']} must lie in [0, 1)")
    if efficiency is not None and values["calibrate"]:
        mistakes.append("efficiency has no effect beside calibrate: leave one of them out")
    if mistakes:
        raise ConfigurationError("\n".join(mistakes))
    source = f"assumed: {gpu.source}" if efficiency is None else "given (--efficiency)"
    gpu = gpu if efficiency is None else replace(gpu, efficiency=efficiency)
    network = gpu.network * values["gpus_per_node"] if bandwidth is None else bandwidth * 1e9
    cluster = Cluster(nodes=values["nodes"], gpus_per_node=values["gpus_per_node"], gpu=gpu, node_bandwidth=network)
    return cluster, (1 - values["reserve"]) * gpu.memory, source


def _model(config: PretrainConfig) -> ModelConfig:
    """Resolved. Raises ConfigurationError with what no layout could help."""
    if config.train.precision != "bf16":
        raise ConfigurationError(f"train.precision={config.train.precision}: {FLAG} knows how fast GPUs are in bf16 only")
    if numbers := ranges.problems(config):
        raise ConfigurationError("\n".join(numbers.values()))
    problems, model, _ = examine(config, 1)
    if model is None:
        if config.model.vocab_size is None:
            problems.append("model.vocab_size is not set and no data say it: give --model.vocab_size, or --data.path of tokenized shards")
        raise ConfigurationError("\n".join(problems))
    return model


def _names(args: list[str]) -> set[str]:
    return {arg.removeprefix("--").partition("=")[0] for arg in args if arg.startswith("--")}
