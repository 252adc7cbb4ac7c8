"""What torchrun, or a script in its place, tells each process through environment variables."""

import os

from pretrain.config import ConfigurationError

COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
VARIABLES = (*COUNTS[:3], "MASTER_ADDR", "MASTER_PORT")
REMEDY = "start with `torchrun --nproc-per-node N -m pretrain.train ...`"


def world_size() -> int:
    """Processes of the whole run; 1 where no launcher says it. Raises ConfigurationError where what it says is no number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(f"WORLD_SIZE={text} in the environment is no number of processes: unset it, or {REMEDY}")
    return int(text)


def rank() -> int:
    """Of this process; 0 where no launcher says it."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def check() -> None:
    """Raises ConfigurationError where a process that belongs to no launcher would wait or fail."""
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)} not set: {REMEDY}")
    wrong = [f"{name}={os.environ[name]}" for name in COUNTS if not os.environ[name].isdecimal()]
    if wrong:
        raise ConfigurationError(f"{', '.join(wrong)} in the environment must be whole numbers: unset them, and {REMEDY}")
    if rank() >= world_size():
        raise ConfigurationError(f"RANK={rank()} in the environment is not below WORLD_SIZE={world_size()}: unset them, and {REMEDY}")
