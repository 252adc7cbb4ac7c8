"""DIR/NODE.json: what a node has found out, written again whenever it begins something: where one ends without a word, its file says
what it was at."""

import dataclasses
import json
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

FORMAT_VERSION = 1


@dataclass(kw_only=True)
class Report:
    """Of one node."""

    node: str
    start: str
    """Which start of which job: a file of an earlier one is none. See `this_start`."""
    timeout_s: float
    """After which the node ends, whatever it is at."""
    doing: str = "starting"
    done: bool = False
    """Whether it came to its end in order."""
    seconds: float = 0.0
    """Since it began."""
    problems: list[str] = field(default_factory=list)
    """What it found wrong with itself, a sentence each."""
    device: str = ""
    """Name of the first one."""
    tflops: dict[str, float] = field(default_factory=dict)
    """Device, such as "GPU 3" -> TFLOP/s of a matrix product."""
    disks: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Path -> free bytes, MB/s of the probe file."""
    manifest: str = ""
    """Digest."""
    in_node_gbps: float | None = None
    """Bus bandwidth of an all-reduce among its devices, GB/s; None for a single one."""
    pairs: dict[str, float] = field(default_factory=dict)
    """Other node -> bus bandwidth of an all-reduce among the devices of both, GB/s; 0 where it failed."""
    failures: dict[str, str] = field(default_factory=dict)
    """Other node -> why that failed."""
    unreached: str = ""
    """Why it did not meet the others at the first node."""
    members: list[str] = field(default_factory=list)
    """Who took part in the joint checks, by the first node."""
    clock_s: float | None = None
    """This node's clock minus the first node's."""

    def write(self, folder: Path) -> None:
        """Replace the file as a whole. Raises OSError."""
        path = path_of(folder, self.node)
        beside = path.with_name(f".{path.name}")
        with beside.open("w") as file:
            json.dump({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    @classmethod
    def read(cls, folder: Path, node: str) -> "Report":
        """Raises FileNotFoundError, OSError; ValueError, in words, where the file is no report of this node."""
        content = json.loads(path_of(folder, node).read_text())
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise ValueError("it has another format")
        if set(content) != {"format_version", *(item.name for item in dataclasses.fields(cls))} or content["node"] != node:
            raise ValueError("its fields are not those of a report")
        del content["format_version"]
        for item in dataclasses.fields(cls):
            kind = typing.get_origin(item.type) or item.type
            if kind in (list, dict, str, bool) and not isinstance(content[item.name], kind):
                raise ValueError(f"its field {item.name} is no {kind.__name__}")
        return cls(**content)


def path_of(folder: Path, node: str) -> Path:
    return folder / f"{node}.json"


def this_start() -> str:
    """Slurm's job and how often it was started before; "" outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""
