"""States of the random number generators: Python, NumPy, torch (CPU and this rank's GPU), Megatron's tracker.

They are stored as a vector of bytes, JSON, and not as pickled objects: reading a checkpoint runs none of its code.

The network draws nothing while it trains (no dropout, weights by name, samples by position), so today these states decide
nothing that this project computes; a user's callback may draw. They belong to a rank, and no rank of another layout is its
heir: where the layout differs the generators start anew, from a seed and the step.
"""

import json
import random

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel


def key(rank: int) -> str:
    """Under which a rank's states are stored."""
    return f"rng.{rank}"


def states(device: torch.device) -> dict:
    """Of this process, as plain values. device: that of the model, whose generators Megatron's tracker holds."""
    numpy = np.random.get_state(legacy=False)
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "device": device.type,
        "python": random.getstate(),
        "numpy": numpy | {"state": {name: np.asarray(value).tolist() for name, value in numpy["state"].items()}},
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "megatron": {name: _text(state) for name, state in tracked.items()},
    }


def encode(states: dict) -> torch.Tensor:
    """uint8 [number of bytes]."""
    return torch.frombuffer(bytearray(json.dumps(states).encode()), dtype=torch.uint8)


def restore(encoded: torch.Tensor, device: torch.device) -> bool:
    """Go on from the states of the same rank of the same layout; False, and nothing done, where those are of another kind of device.

    Raises ValueError where they are no states of generators.
    """
    try:
        saved = json.loads(bytes(encoded.tolist()))
        if saved["device"] != device.type:
            return False
        version, internal, gauss = saved["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(saved["numpy"])
        torch.set_rng_state(_bytes(saved["torch"]))
        if saved["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_bytes(saved["cuda"]))
        tensor_parallel.get_cuda_rng_tracker().set_states({name: _bytes(state) for name, state in saved["megatron"].items()})
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the states of the random number generators cannot be used ({type(error).__name__}: {error})") from error
    return True


def _text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


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
