"""DeepSpeed, imported once, with what it would do at import or start on a machine without CUDA switched off."""

import contextlib
import gc
import io
import logging
import os
import warnings

from megatron_qsparse.compat import cpu


def load():
    """Import deepspeed. Without CUDA: the CPU accelerator, and no compilation of its shared-memory communication op.

    The op serves `inference_all_reduce` only, needs a compiler and costs 15 s at the first start; marking it incompatible is
    how DeepSpeed itself skips it (ops.__compatible_ops__, comm/torch.py build_shm_op in 0.19.8). No setting exists for it.
    """
    if cpu.needed():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if cpu.needed():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(**kwargs):
    """deepspeed.initialize(**kwargs) -> engine, without the memory report that its bf16 optimizer prints unconditionally."""
    deepspeed = load()
    # The report collects garbage six times, 0.3 s each over the hundred thousands of objects that the imports left.
    # A caller that has frozen them keeps them frozen: unfreezing knows no half.
    freeze = not gc.get_freeze_count()
    if freeze:
        gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(**kwargs)
    finally:
        if freeze:
            gc.unfreeze()
    return engine
