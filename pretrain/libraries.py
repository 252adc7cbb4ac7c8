"""Warnings of the libraries that a user of this project cannot act on."""

import warnings


def quiet() -> None:
    """Call before importing torch, Megatron or DeepSpeed: they announce deprecations and absent GPU packages on every rank."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron|torch|deepspeed")
