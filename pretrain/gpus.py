"""GPUs by what their data sheets say, and what is assumed of it in training. No torch in here: `pretrain.plan` answers at once."""

from dataclasses import dataclass

PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}
"""Dense bf16 tensor-core FLOP/s by the vendor's data sheets (SXM), for model FLOPs utilization."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU (SXM) in the vendor's node of eight. Bandwidths are those of the data sheets, in one direction."""

    memory: float
    """Bytes."""
    peak_flops: float
    """Dense bf16 FLOP/s."""
    hbm: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s between it and the others of its node."""
    network: float
    """Bytes/s of its share of its node's network: one adapter a GPU."""
    efficiency: float
    """Assumed fraction of `peak_flops` that a training step's matrix products and attention reach."""
    source: str
    """Where `efficiency` comes from."""


_HOPPER = (
    "whole bf16 steps on H100 reach 41 to 48 % (README of Megatron-LM, 2 to 462 billion parameters) and 33 to 39 % (torchtitan, "
    "8 billion); this project's unfused layers are not expected at the upper end"
)
_AMPERE = (
    "whole steps of 1.7 to 39 billion parameters reach 43 to 46 % on A100 (Narayanan et al. 2021, arXiv 2104.04473, table 1); this "
    "project's unfused layers are not expected there"
)
_BLACKWELL = "a guess, below Hopper's since the peak is higher: no published bf16 figure was used"

GPUS = {
    "a100-40": Gpu(memory=40e9, peak_flops=312e12, hbm=1.555e12, nvlink=300e9, network=25e9, efficiency=0.4, source=_AMPERE),
    "a100-80": Gpu(memory=80e9, peak_flops=312e12, hbm=2.039e12, nvlink=300e9, network=25e9, efficiency=0.4, source=_AMPERE),
    "h100-80": Gpu(memory=80e9, peak_flops=989e12, hbm=3.35e12, nvlink=450e9, network=50e9, efficiency=0.4, source=_HOPPER),
    "h200-141": Gpu(memory=141e9, peak_flops=989e12, hbm=4.8e12, nvlink=450e9, network=50e9, efficiency=0.4, source=_HOPPER),
    "b200-180": Gpu(memory=180e9, peak_flops=2250e12, hbm=7.7e12, nvlink=900e9, network=50e9, efficiency=0.35, source=_BLACKWELL),
}
