"""Megatron-Core's router without Transformer Engine, on any device."""


def enable() -> None:
    """Define a name that moe_utils.py reads (lines 1192, 1225 in 0.16.1) and imports with Transformer Engine only, so that every
    router fails with a NameError where that is not installed. None is what it tests for. 0.19 defines it.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
