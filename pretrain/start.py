"""Where a run that has nothing to resume takes its first weights from: `checkpoint.start_from`.

Only the network must be that of the checkpoint. Data, seed, precision and schedule are those of the new run, and so are the
optimizer's moments and the step count: none and 0.
"""

import json
from pathlib import Path

from data_tools.manifest import Manifest
from megatron_qsparse.models.config import ModelConfig
from pretrain.checkpoint.content import TrainerRecord
from pretrain.checkpoint.directory import CheckpointDirectory
from pretrain.checkpoint.inspection import NoCheckpoint, one_checkpoint
from pretrain.config import PretrainConfig
from pretrain.identity import define, differences

NETWORK = ("model.", "qsparse.", "bitnet.", "kept.", "data.tokenizer")
PLACES = "name a run directory, one of its checkpoints or a milestone, such as runs/a/checkpoints/step_00001000"
TRAINING = ("model.init_std", "model.vocab_multiple", "model.moe_aux_loss_coeff")
"""Of the model's fields those that decide nothing once there are weights."""


def source(config: PretrainConfig) -> Path | None:
    """The checkpoint to start from, complete by its files' sizes; None where none is asked for, or the run has checkpoints itself.

    Raises ValueError where there is none.
    """
    named = config.checkpoint.start_from
    if not named or CheckpointDirectory(config.run_directory / "checkpoints", config.checkpoint.keep_last).published():
        return None
    if not Path(named).is_dir():
        raise NoCheckpoint(f"{named} is {'a file' if Path(named).exists() else 'no directory'}: {PLACES}")
    return one_checkpoint(Path(named))


def problems(config: PretrainConfig, model: ModelConfig, manifest: Manifest) -> list[str]:
    """What keeps the run from starting there, in words."""
    try:
        checkpoint = source(config)
        if checkpoint is None:
            return []
        saved = TrainerRecord.read(checkpoint).identity
    except NoCheckpoint as error:
        return [f"checkpoint.start_from: {error}"]
    except (ValueError, OSError) as error:
        return [f"checkpoint.start_from: {error}: choose another checkpoint"]
    here = json.loads(json.dumps(define(config, model, manifest)))
    found = differences(_network(saved), _network(here))
    return [f"checkpoint.start_from: {checkpoint} holds another network: {line}; restore that setting" for line in found]


def _network(identity: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in identity.items() if name.startswith(NETWORK) and name not in TRAINING}
