"""What a start of this run does, by what lies in its run directory: begin, go on, nothing more, or refuse.

The run asks before it builds anything, on rank 0 (pretrain.run); `python -m pretrain.plan` asks beforehand. Imports no torch.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.manifest import Manifest
from megatron_qsparse.models.config import ModelConfig
from pretrain import rollback
from pretrain.changes import compare
from pretrain.checkpoint.content import CONFIG_NAME, TrainerRecord
from pretrain.checkpoint.directory import CheckpointDirectory, step_of
from pretrain.checkpoint.files import damage
from pretrain.config import PretrainConfig
from pretrain.identity import NUMERICS_VERSION, define, differences
from pretrain.run_directory import STOP_NAME
from pretrain.start import source


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where a run begins."""

    checkpoint: Path | None = None
    """To go on from; None at step 0."""
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where training stood there (TrainerState)."""
    weights: Path | None = None
    """The checkpoint whose weights a run at step 0 takes (checkpoint.start_from); None for new ones."""
    rolled_back: str = ""
    """Says which samples the roll-backs leave out that the checkpoint has not seen; `state` stands behind them."""
    abandoned: list[Path] = dataclasses.field(default_factory=list)
    """Checkpoints that those roll-backs have given up: to be removed before anything is saved."""

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.state.get("step", 0)


def beginning(
    config: PretrainConfig, model: ModelConfig, manifest: Manifest, directory: CheckpointDirectory, say: Callable[[str], None],
    contents: bool = True, progress: Callable[[int], None] = lambda nbytes: None,
) -> Beginning:  # fmt: skip
    """Find it. model: resolved. say: told of changed settings; `directory.warn` of what is unusual.

    contents: compare every byte of the checkpoints that are used with its checksum, not only sizes. progress: told of bytes read.

    Raises ValueError where the checkpoint belongs to another run, naming each difference, where settings have changed that must
    not change unnoticed, where every checkpoint is damaged, and where `resume` asks for something else; OSError where they cannot
    be read.
    """
    if problem := resume_problem(config, directory):
        raise ValueError(problem)
    rollbacks = rollback.read(config.run_directory)
    abandoned = rollback.abandoned(rollbacks, directory)
    path = directory.newest(contents, without=abandoned, progress=progress)
    if path is not None:
        state, rolled_back = rollback.apply(rollbacks, _state(path, config, model, manifest, directory, say))
        return Beginning(checkpoint=path, state=state, rolled_back=rolled_back, abandoned=abandoned)
    if abandoned:
        raise ValueError(
            f"{directory.path} holds only checkpoints that a roll-back has given up ({rollback.NAME}), and those that it went back to are "
            "gone: restore one, or choose another output_dir"
        )
    if milestones := directory.published("milestone"):
        raise ValueError(
            f"{directory.path} holds milestones, the last of step {step_of(milestones[-1])}, but no checkpoint to go on from, and a run "
            "from step 0 would replace them: choose another output_dir (checkpoint.start_from takes a milestone's weights)"
        )
    weights = source(config)
    if weights is not None:
        if problem := damage(weights, contents, progress):
            raise ValueError(f"checkpoint.start_from: {weights} is not a complete checkpoint ({problem})")
        _compare_numerics(weights, TrainerRecord.read(weights), directory)
    return Beginning(weights=weights)


def resume_problem(config: PretrainConfig, directory: CheckpointDirectory) -> str | None:
    """What keeps the run from beginning or going on: the switch STOP; or what `resume` asks for and the run directory does not hold.

    Raises OSError where it cannot be read.
    """
    if (stop := config.run_directory / STOP_NAME).exists():
        return f"{stop} is there, which stops the run: remove it to train on"
    published = config.resume != "auto" and directory.published()
    if config.resume == "never" and published:
        return f"{directory.path} holds checkpoints and resume=never: choose another output_dir, or leave resume out"
    if config.resume == "required" and not published:
        return f"{directory.path} holds no checkpoint and resume=required: correct output_dir, or set resume=auto to begin"
    return None


def _state(
    path: Path, config: PretrainConfig, model: ModelConfig, manifest: Manifest, directory: CheckpointDirectory, say: Callable[[str], None]
) -> dict[str, Any]:
    saved = TrainerRecord.read(path)
    if found := differences(saved.identity, json.loads(json.dumps(define(config, model, manifest)))):
        lines = "\n".join(f"  {line}" for line in found)
        raise ValueError(f"{path} belongs to a different run:\n{lines}\nchoose another output_dir, or restore these settings")
    for line in compare(path / CONFIG_NAME, config):
        say(line)
    _compare_numerics(path, saved, directory)
    return saved.state


def _compare_numerics(path: Path, saved: TrainerRecord, directory: CheckpointDirectory) -> None:
    if saved.numerics_version != NUMERICS_VERSION:
        directory.warn(
            f"{path} was trained with numerics version {saved.numerics_version}, this is {NUMERICS_VERSION}: losses may shift here, "
            "see CHANGELOG.md"
        )
