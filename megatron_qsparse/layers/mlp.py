"""Activations of the gated MLP: `act(x W_gate^T) * (x W_up^T)`; Megatron's MLP applies them."""

import torch
import torch.nn.functional as F


def squared_relu(gate: torch.Tensor) -> torch.Tensor:
    """relu(gate)^2: ReLU2GLU of Q-Sparse (sec. 2), which adds natural zeros before the down projection."""
    return F.relu(gate).square()


ACTIVATIONS = {"relu2_glu": squared_relu, "silu_glu": F.silu}
"""`model.activation` -> function of the gate."""
