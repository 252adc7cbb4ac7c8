"""States of the random number generators: Python, NumPy, torch (CPU and this rank's GPU), Megatron's tracker.

The network draws nothing while it trains (no dropout, weights by name, samples by position), so today these states decide
nothing that this project computes; a user's callback may draw. They belong to a rank, and no rank of another layout is its
heir: where the layout differs the generators start anew, from a seed and the step.
"""

import random

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel


def states(device: torch.device) -> dict:
    """Of this process; picklable. device: that of the model, whose generators Megatron's tracker holds."""
    return {
        "device": device.type,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore(saved: dict, device: torch.device) -> bool:
    """Go on from `states` of the same rank of the same layout; False, and nothing done, where those are of another kind of device."""
    if saved.get("device") != device.type:
        return False
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(saved["megatron"])
    return True


def start_anew(seed: int, step: int) -> None:
    """States that depend on the seed of the run that saved, the step and, outside of Megatron's generators, the rank.

    Megatron's own seeds must agree between the ranks that compute the same thing; it adds what must differ.
    """
    shared = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    own = [int(word) for word in np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(3)]
    random.seed(own[0])
    np.random.seed(own[1])
    torch.random.default_generator.manual_seed(own[2])
    tensor_parallel.model_parallel_cuda_manual_seed(shared)
