"""The model of a pipeline stage under the interleaved schedule: several chunks of layers, each a GPTModel of its own.

With v chunks a stage, stage s of p holds the layers of chunks s, p + s, 2p + s, ... of the whole model.
"""

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn


class PipelineChunks(nn.Module):
    """One module over all chunks of a stage, so that they share one optimizer. Called as model(chunk, *inputs)."""

    def __init__(self, chunks: list[GPTModel]):
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self.config, self.share_embeddings_and_output_weights = chunks[0].config, chunks[0].share_embeddings_and_output_weights

    def forward(self, chunk: int, *args, **kwargs) -> torch.Tensor:
        return self.chunks[chunk](*args, **kwargs)

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        """As GPTModel's, of the chunk that has one; a stage is either the first or the last here."""
        return next((c.shared_embedding_or_output_weight() for c in self.chunks if c.pre_process or c.post_process), None)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The chunks' shards by this module's own names; the places they carry are those in the whole model."""
        state = {}
        for index, chunk in enumerate(self.chunks):
            own = chunk.sharded_state_dict(sharded_offsets=sharded_offsets, metadata=metadata)
            state |= {f"{prefix}chunks.{index}.{name}": value for name, value in own.items()}
        return state
