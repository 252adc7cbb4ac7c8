"""Devices: which one a process uses and what it could do at best."""

import os

import torch

from pretrain.gpus import PEAK_BF16_FLOPS


class NoDevice(RuntimeError):
    """There is no such device; the message tells the user what to do."""


def choose_device(wanted: str) -> torch.device:
    """wanted: auto, cpu or cuda. CUDA devices are taken by LOCAL_RANK. Raises NoDevice where cuda is asked for and missing."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise NoDevice("device=cuda, but torch finds no CUDA device: use --device cpu, or install a CUDA build of torch")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= count:
        raise NoDevice(f"local rank {rank} has no device: this machine has {count}; start that many processes with --nproc-per-node")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of one device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_BF16_FLOPS.items() if model in name), None)
