"""What tests of the suggestion share: clusters, and configurations with their resolved models."""

from pathlib import Path

import pretrain
from megatron_qsparse.models.presets import apply_preset
from pretrain.config import parse
from pretrain.gpus import GPUS
from pretrain.suggest.step_time import Cluster

CONFIGS = Path(pretrain.__file__).parent / "configs"
SEVEN, MIXTURE = ("7b_dense", "7b_qsparse", "7b_bitnet", "7b_bitnet_qsparse"), "moe_qsparse"
H100 = GPUS["h100-80"]
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
