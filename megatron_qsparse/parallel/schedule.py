"""Megatron's pipeline schedule around a DeepSpeed engine.

The schedule runs all micro-batches of a step (1F1B with pipeline stages) and divides each loss by their number; the engine
only sees forwards and backwards, and one `step()` afterwards.
"""

import itertools
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from megatron_qsparse.models.chunks import PipelineChunks
from megatron_qsparse.parallel.stopwatch import Stopwatch


class ScheduledModel(nn.Module):
    """What the schedule calls. DeepSpeedEngine's own `config` attribute is DeepSpeed's and would shadow the TransformerConfig.

    DeepSpeed resets its per-backward bookkeeping in forward; in 1F1B two backwards follow each other without a forward, and
    the second would lose its epilogue (a wrong gradient norm with bf16 or ZeRO-2). A hook on the output, at the beginning of the
    backward of its micro-batch, resets it there and asks for the epilogue at the end of that backward: asked for later, by the
    first gradient, it could come at the end of the nested backward of a recomputed layer.
    """

    def __init__(self, engine, model: nn.Module, stopwatch: Stopwatch, chunk: int | None = None):
        super().__init__()
        # Not registered as submodules: the engine already owns the parameters.
        self.__dict__.update(engine=engine, inner=model)
        self.stopwatch = stopwatch
        self.config, self.model_type, self.vp_stage = model.config, model.model_type, chunk

    def set_input_tensor(self, tensor):
        self.inner.set_input_tensor(tensor)

    def forward(self, *args, **kwargs):
        with self.stopwatch.measuring():
            output = self.engine(*(() if self.vp_stage is None else (self.vp_stage,)), *args, **kwargs)
        if output.requires_grad:
            output.register_hook(self._before_backward)
        return output

    def _before_backward(self, grad):
        self.engine.optimizer.clear_backward_seen_flag()
        self.engine.optimizer.queue_post_backward_callback()


def scheduled_models(engine, model: nn.Module, stopwatch: Stopwatch) -> list[ScheduledModel]:
    """What the schedule calls of this stage: one model, or its chunks."""
    if not isinstance(model, PipelineChunks):
        return [ScheduledModel(engine, model, stopwatch)]
    return [ScheduledModel(engine, chunk, stopwatch, index) for index, chunk in enumerate(model.chunks)]


def run_micro_batches(
    models: list[ScheduledModel], batches: Iterator[torch.Tensor], num_micro_batches: int, micro_batch_size: int, sequence_length: int,
    train: bool,
) -> torch.Tensor:  # fmt: skip
    """Forward (and backward where `train`) of `num_micro_batches`; batches: int64 [micro_batch_size, sequence_length + 1] each.

    models: from `scheduled_models`. Returns the mean loss per token over this data-parallel rank's micro-batches, fp32 []; on every
    pipeline stage.
    """

    def forward_step(iterator, scheduled):
        tokens = next(iterator)
        positions = torch.arange(sequence_length, device=tokens.device).expand(tokens.shape[0], -1)
        losses = scheduled(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
        return losses, _mean_loss

    # Each chunk of an interleaved schedule goes through the micro-batches on its own.
    iterators = [batches] if len(models) == 1 else list(itertools.tee(itertools.islice(batches, num_micro_batches), len(models)))
    results = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iterators, model=models, num_microbatches=num_micro_batches,
        seq_length=sequence_length, micro_batch_size=micro_batch_size, forward_only=not train,
    )  # fmt: skip
    device = next(models[0].inner.parameters()).device
    loss = torch.zeros((), dtype=torch.float32, device=device)
    if parallel_state.is_pipeline_last_stage():
        loss = torch.stack(results).mean()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            loss, parallel_state.get_pipeline_model_parallel_last_rank(), group=parallel_state.get_pipeline_model_parallel_group()
        )
    return loss


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss for the backward, copy for the log): Megatron divides the first in place by the number of micro-batches.

    A loss that is not finite may have finite gradients, and DeepSpeed looks at gradients only. The factor is exactly 1 for a finite
    loss and NaN for any other: all gradients become NaN with it, and every rank leaves the step out.
    """
    loss = losses.float().mean()
    told = loss.detach().clone()
    return loss * (told * 0 + 1), told
