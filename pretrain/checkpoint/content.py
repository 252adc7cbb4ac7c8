"""What lies beside the tensors of a checkpoint: trainer.json and config.yaml."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import PretrainConfig, dump_yaml, flatten

FORMAT_VERSION = 2
"""Of trainer.json. 1: without `layout` and `run_id`."""
TRAINER_NAME, CONFIG_NAME = "trainer.json", "config.yaml"


def read_settings(path: Path) -> dict[str, Any]:
    """The flat settings of a config.yaml. Raises ValueError where it is none, OSError where it cannot be read."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no configuration of this project")
    return flatten(settings)


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
        """Raises ValueError where it was written by a newer version or by something else, OSError where there is none."""
        try:
            content = json.loads((checkpoint / TRAINER_NAME).read_text())
            version = int(content["format_version"])
            if version <= FORMAT_VERSION:
                record = cls(**content)
                if type(record.state.get("step")) is not int or not isinstance(record.identity, dict):
                    raise TypeError("it tells neither the step nor what the run is")
                return record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{checkpoint / TRAINER_NAME} was not written by this project ({type(error).__name__}: {error})") from error
        raise ValueError(f"{checkpoint} was written by a newer version of this project ({TRAINER_NAME} format {version})")
