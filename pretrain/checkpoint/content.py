"""What lies beside the tensors of a checkpoint: trainer.json and config.yaml."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import PretrainConfig, dump_yaml

FORMAT_VERSION = 2
"""Of trainer.json. 1: without `layout` and `run_id`."""
TRAINER_NAME, CONFIG_NAME = "trainer.json", "config.yaml"


@dataclass(frozen=True, kw_only=True)
class TrainerRecord:
    """The content of trainer.json."""

    numerics_version: int
    state: dict[str, Any]
    """Where training stands (TrainerState): steps, samples consumed."""
    identity: dict[str, Any]
    """What a run that goes on from here must share (pretrain.identity)."""
    layout: dict[str, int] = dataclasses.field(default_factory=dict)
    """Processes, parallel sizes and ZeRO stage that wrote the checkpoint; any other may read it."""
    run_id: str | None = None
    """MLflow run, as far as it was known by then."""
    format_version: int = FORMAT_VERSION

    def write(self, checkpoint: Path, config: PretrainConfig) -> None:
        (checkpoint / TRAINER_NAME).write_text(json.dumps(dataclasses.asdict(self), indent=1))
        (checkpoint / CONFIG_NAME).write_text(dump_yaml(config))

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainerRecord":
        """Raises ValueError where it was written by a newer version, OSError where there is none."""
        content = json.loads((checkpoint / TRAINER_NAME).read_text())
        if content["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{checkpoint} was written by a newer version of this project ({TRAINER_NAME} format {content['format_version']})"
            )
        return cls(**content)
