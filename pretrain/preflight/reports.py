"""What one process found, as a file in the folder that all nodes see."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.tracking.record import write_json

FORMAT_VERSION = 1


@dataclass(kw_only=True)
class Report:
    """Of one process, which looks after one device; the first of a node looks at what the node has once as well."""

    node: str
    local_rank: int
    device: str = ""
    """Its name."""
    problems: list[str] = field(default_factory=list)
    """What makes the node unfit, whatever the others are like; one sentence each."""
    tflops: float | None = None
    """Of a matrix product, 10^12 FLOP/s."""
    inside_gb_s: float | None = None
    """Bus bandwidth of an all-reduce among the node's own devices, 10^9 bytes/s; None where it has one."""
    between_gb_s: dict[str, float] = field(default_factory=dict)
    """The same of all devices of this node and another, by the other's name."""
    skew_s: float | None = None
    """Of the node's clock against the median."""
    disk_mb_s: float | None = None
    """Writing to the run directory, 10^6 bytes/s."""
    joined: bool = False
    """Whether it came to what is measured together."""
    note: str = ""
    """Why something was not measured."""

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        write_json(folder / f"{self.node}.{self.local_rank}.json", {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})


def read(folder: Path) -> list[Report]:
    """Those that are there and whole. Raises OSError."""
    found = []
    known = {item.name for item in dataclasses.fields(Report)}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if content["format_version"] == FORMAT_VERSION:
                found.append(Report(**{name: value for name, value in content.items() if name in known}))
        except (ValueError, KeyError, TypeError):
            continue
    return found
