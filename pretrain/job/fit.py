"""How many of the allocated nodes train: data parallelism adapts to what Slurm gave (--nodes=MIN-MAX), the batch never does."""

from dataclasses import dataclass

from pretrain.config import PretrainConfig
from pretrain.validation.layout import batch_problems


@dataclass(frozen=True)
class Fit:
    """The part of an allocation that a run uses."""

    nodes: int
    processes_per_node: int
    data_parallel: int

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node


def fit(config: PretrainConfig, nodes: int, processes_per_node: int) -> Fit:
    """The most nodes whose data-parallel ranks divide the unchanged global batch; tensor and pipeline parallelism stay.

    Nodes are taken whole. Where no number of them will do it is all of them: `pretrain.validate` then says why.
    """
    parallel = config.parallel
    for count in range(nodes, 0, -1):
        world_size = count * processes_per_node
        if batch_problems(config, world_size) or world_size // (parallel.tensor * parallel.pipeline) % max(1, parallel.expert):
            continue
        return _fit(config, count, processes_per_node)
    return _fit(config, nodes, processes_per_node)


def _fit(config: PretrainConfig, nodes: int, processes_per_node: int) -> Fit:
    model_ranks = max(1, config.parallel.tensor) * max(1, config.parallel.pipeline)
    return Fit(nodes, processes_per_node, nodes * processes_per_node // model_ranks)
