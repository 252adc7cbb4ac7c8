"""What must happen before torch, Megatron or DeepSpeed are imported."""

import logging
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
    # megatron-core 0.19 says for every model that GPTModel gets no new features (gpt_model.py line 118 in 0.19.2).
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(lambda record: "GPTModel IS DEPRECATED" not in record.getMessage())
