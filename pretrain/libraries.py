"""What must happen before torch, Megatron or DeepSpeed are imported."""

import os
import warnings


def prepare(device: str) -> None:
    """Silence what a user cannot act on, and make a CPU run a CPU run.

    device: as in the configuration. Megatron and DeepSpeed take a GPU wherever they see one, so with "cpu" they must not.
    The libraries announce deprecations and absent GPU packages on every rank; none of it is about the user's settings.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron|torch|deepspeed")
