"""How long one optimizer step may take, by arithmetic alone: an estimate to rank layouts with, not a measurement.

Nothing is taken to overlap with anything else, and latencies, kernel launches, reading data, saving, and what top-K and int8 cost
beyond the dense products are left out. What is counted, for the pipeline stage that has most to do:

- compute: FLOPs (`flops_per_token`, with recomputation another forward of the layers) at `Gpu.efficiency` of the peak.
- tensor: all-reduces of hidden states, two a layer in the forward and two in the backward. With sequence parallelism an
  all-gather and a reduce-scatter each, which are the same bytes, and in the backward the two inputs are gathered again;
  quantized inputs are gathered as int8 codes (`layers/code_linear.py`).
- experts: all-to-all of each token's copies to its experts and back, in the forward and in the backward.
- bubble: (stages - 1) / (chunks * micro-batches) of the three above (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
- pipeline: hidden states sent to the next stage and their gradients to the one before.
- gradients: memory traffic of adding each micro-batch's bf16 gradients to the fp32 ones.
- data: what DeepSpeed 0.19.8 sends between data-parallel ranks. Stage 1: one fp32 all-reduce of the gradients a step and an
  all-gather of the new weights. Stage 2: the same, but the all-reduce for every micro-batch. Stage 3: for every micro-batch two
  gathers of the weights and a reduce-scatter of fp32 gradients.
- optimizer: memory traffic of AdamW on this rank's share.

A ring moves (n - 1)/n of a tensor through every rank's link, an all-reduce twice that. Ranks lie as Megatron lays them out:
tensor-parallel ones next to each other, then expert-, data- and pipeline-parallel ones.
"""

from dataclasses import dataclass, fields

from megatron_qsparse.models.accounting import copies_per_token, expert_copies, flops_per_token, parameters
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.memory import ELEMENT_BYTES, Layout
from pretrain.config import PretrainConfig
from pretrain.gpus import Gpu
from pretrain.layouts import layout_of

REACHED = 0.8
"""Assumed fraction of a data sheet's bandwidth, of links and of memory."""
ACCUMULATION_BYTES = 12
"""Memory traffic for each parameter and micro-batch: read and clear bf16 gradients, read and write the fp32 ones."""
OPTIMIZER_BYTES = 40
"""Memory traffic for each parameter of a share: norm 4, clipping 8, AdamW 28 (gradient, weight, two moments)."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    node_bandwidth: float
    """Bytes/s out of one node, in one direction."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on; see the module."""

    compute: float
    tensor: float
    experts: float
    bubble: float
    pipeline: float
    gradients: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def step_time(config: PretrainConfig, model: ModelConfig, cluster: Cluster) -> StepTime:
    """model: resolved. The layout must be possible on all GPUs of the cluster (`pretrain.validation.layout`), in bf16."""
    layout, gpu = layout_of(config, cluster.world_size), cluster.gpu
    tokens = config.train.micro_batch_size * config.data.sequence_length
    memory_rate, stages, count = REACHED * gpu.hbm, layout.pipeline, layout.micro_batches
    compute = count * tokens * stage_flops(model, layout, config.data.sequence_length) / layout.tensor / (gpu.efficiency * gpu.peak_flops)
    tensor, experts = (
        count * tokens * model.num_layers / stages * seconds
        for seconds in (_tensor_seconds(model, layout, cluster, config.bitnet.enabled), _expert_seconds(model, layout, cluster))
    )
    held = held_parameters(model, layout, config.bitnet.subln)
    return StepTime(
        compute=compute, tensor=tensor, experts=experts,
        bubble=(stages - 1) / (layout.virtual_pipeline * count) * (compute + tensor + experts),
        pipeline=count * tokens * _pipeline_seconds(model, layout, cluster),
        gradients=count * ACCUMULATION_BYTES * sum(held) / memory_rate,
        data=_data_seconds(layout, cluster, *held),
        optimizer=OPTIMIZER_BYTES * (held[0] / layout.data + held[1] * layout.expert / layout.data) / memory_rate,
    )  # fmt: skip


def stage_flops(model: ModelConfig, layout: Layout, sequence_length: int) -> float:
    """FLOPs for one token on the last pipeline stage, which has the head besides its layers, over all tensor-parallel ranks."""
    flops = flops_per_token(model, sequence_length)
    head = 2 * model.hidden_size * model.vocab_size
    layers = flops.total - 3 * head
    if layout.recompute:
        layers += flops.forward - head
    return layers / layout.pipeline + 3 * head


def held_parameters(model: ModelConfig, layout: Layout, subln: bool) -> tuple[float, float]:
    """(parameters of one rank outside of experts, in experts) before ZeRO; of several stages the one with an embedding or a head."""
    count = parameters(model, subln)
    experts = sum(n for name, n in count.projections.items() if expert_copies(model, name) > 1)
    # SubLN inside of experts is counted outside: thousandths.
    layers = (count.linear - experts + count.subln) / layout.tensor + count.router + count.norms
    tables = count.embedding + count.head if layout.pipeline == 1 else count.embedding
    return layers / layout.pipeline + tables / layout.tensor, experts / (layout.pipeline * layout.tensor * layout.expert)


def _tensor_seconds(model: ModelConfig, layout: Layout, cluster: Cluster, quantized: bool) -> float:
    """For one token and layer."""
    element, code = ELEMENT_BYTES["bf16"], 1 if quantized else ELEMENT_BYTES["bf16"]
    # An all-gather or reduce-scatter of one element: forward, backward, the forward again.
    if layout.sequence:
        forward, backward = code + element, code + 2 * element
    else:
        forward, backward = 2 * element, 2 * element
    moved = forward + backward + (forward if layout.recompute else 0)
    blocks = 1 + copies_per_token(model, "mlp.down") + bool(model.moe_shared_expert_ffn_hidden_size)
    hidden = blocks * moved * model.hidden_size
    return _ring_seconds(hidden, layout.tensor, 1, cluster)


def _expert_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    """For one token and layer. With tensor parallelism each of its ranks sends its share of the tokens."""
    passes = 6 if layout.recompute else 4
    size = passes * copies_per_token(model, "mlp.down") * model.hidden_size * ELEMENT_BYTES["bf16"] / layout.tensor
    within = min(layout.expert, max(1, cluster.gpus_per_node // layout.tensor))
    outside = size * (layout.expert - within) / layout.expert * cluster.gpus_per_node / (REACHED * cluster.node_bandwidth)
    return max(size * (within - 1) / layout.expert / (REACHED * cluster.gpu.nvlink), outside)


def _pipeline_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    """For one token: every chunk's hidden states are sent on, and their gradients back."""
    if layout.pipeline == 1:
        return 0.0
    size = 2 * layout.virtual_pipeline * model.hidden_size * ELEMENT_BYTES["bf16"] / (layout.tensor if layout.sequence else 1)
    link = cluster.gpu.nvlink if cluster.nodes == 1 else cluster.node_bandwidth / cluster.gpus_per_node
    return size / (REACHED * link)


def _data_seconds(layout: Layout, cluster: Cluster, dense: float, experts: float) -> float:
    """For one step."""
    element = ELEMENT_BYTES["bf16"]
    match layout.zero_stage:
        case 1:
            size = 2 * 4 + element
        case 2:
            size = 2 * 4 * layout.micro_batches + element
        case _:
            size = (4 + 2 * element) * layout.micro_batches
    spread = layout.tensor * layout.expert
    return _ring_seconds(size * dense, layout.data, layout.tensor, cluster) + _ring_seconds(
        size * experts, layout.data // layout.expert, spread, cluster
    )


def _ring_seconds(size: float, ranks: int, stride: int, cluster: Cluster) -> float:
    """An all-gather or reduce-scatter of `size` bytes among `ranks` ranks, each `stride` ranks after the one before.

    All groups of a kind communicate at once: those that leave a node share its network.
    """
    sent = size * (ranks - 1) / ranks
    within = min(ranks, max(1, cluster.gpus_per_node // stride))
    seconds = sent / (REACHED * cluster.gpu.nvlink)
    if within == ranks:
        return seconds
    return max(seconds, sent * cluster.gpus_per_node / within / (REACHED * cluster.node_bandwidth))
