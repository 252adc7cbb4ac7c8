"""shipped.json: how far the journals of a run directory have come into which MLflow run.

Losing the file is harmless: shipping starts over, and MLflow drops what it has.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.tracking.journal import RESERVED_KEYS, decode_line, iterate_lines
from pretrain.tracking.record import RunRecord, write_json

METRICS_NAME = "metrics.jsonl"
SYSTEM_NAME = "system.jsonl"
STATE_NAME = "shipped.json"
STATE_VERSION = 1


@dataclass
class ShippingState:
    """The content of shipped.json."""

    uri: str = ""
    run_id: str = ""
    session: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    description: str = ""
    status: str = ""
    artifacts: list[str] = field(default_factory=list)
    """Names of those that have arrived."""
    format_version: int = STATE_VERSION

    @classmethod
    def load(cls, run_directory: Path) -> ShippingState:
        """The state on disk; a fresh one when there is none that can be read (shipping again changes nothing)."""
        try:
            state = cls(**json.loads((run_directory / STATE_NAME).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()
        return state if state.format_version == STATE_VERSION else cls()

    def save(self, run_directory: Path) -> None:
        """Replace RUN_DIR/shipped.json atomically."""
        write_json(run_directory / STATE_NAME, asdict(self))

    def enter_session(self, record: RunRecord) -> None:
        """Go back to where a resume cut the journal since this state was written."""
        cuts = record.journal_bytes_at_resume[self.session :]
        if METRICS_NAME in self.offsets:
            self.offsets[METRICS_NAME] = min([self.offsets[METRICS_NAME], *cuts])
        self.session = len(record.journal_bytes_at_resume)

    def has_everything(self, record: RunRecord, run_directory: Path) -> bool:
        """Whether a store has confirmed all that the run directory holds, the status included."""
        return (
            self.status == record.status
            and self.description == record.description_digest()
            and len(self.artifacts) == len(record.artifacts)
            and unshipped_points(run_directory) == 0
        )


def unshipped_points(run_directory: Path) -> int:
    """How many points of the journals no store has confirmed yet."""
    state = ShippingState.load(run_directory)
    try:
        state.enter_session(RunRecord.load(run_directory))
    except FileNotFoundError:
        pass
    return sum(count_points(run_directory / name, state.offsets.get(name, 0)) for name in (METRICS_NAME, SYSTEM_NAME))


def count_points(path: Path, offset: int = 0) -> int:
    """Points (metrics, not lines) in a journal from a byte offset on; damaged lines count as none."""
    total = 0
    for line, _ in iterate_lines(path, offset):
        try:
            total += len(decode_line(line)) - len(RESERVED_KEYS)
        except ValueError:
            continue
    return total
