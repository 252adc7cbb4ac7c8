"""report.md, to attach to an issue, and report.json."""

import importlib.metadata
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.acceptance.compare import Figure
from pretrain.tracking.environment import collect_environment
from pretrain.tracking.record import write_json

FORMAT_VERSION = 1
PACKAGES = ("torch", "megatron-core", "deepspeed", "transformer-engine", "triton")


@dataclass
class Result:
    """Of one case."""

    name: str
    processes: int
    figures: list[Figure] = field(default_factory=list)
    problem: str = ""
    """Why it was not compared, or did not do what it should."""
    seconds: float | None = None
    log: str = ""
    note: str = ""

    @property
    def worst(self) -> str:
        """The figure that is farthest beyond what is allowed."""
        figure = max(self.figures, key=lambda figure: figure.value / figure.limit)
        return f"{figure.what}: {figure.value:.2g}"

    @property
    def fits(self) -> bool:
        return not self.problem and all(figure.fits for figure in self.figures)


def surroundings(nodes: int, processes: int) -> dict[str, str]:
    """What the report is about: torch is imported for the names of devices."""
    import torch

    cuda = torch.cuda.is_available()
    found = {
        "devices": collect_environment()["devices"],
        "nodes": str(nodes),
        "processes of a node": str(processes),
        "communication": f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if cuda else "gloo",
        "CUDA": str(torch.version.cuda) if cuda else "none",
    }
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if _is_installed(name)]
    code = collect_environment()
    found |= {
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "commit": code.get("git.commit", "unknown") + (" and changes" if code.get("git.dirty") == "true" else ""),
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
    }
    return found


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write(folder: Path, about: dict[str, str], results: Sequence[Result], left_out: Sequence[tuple[str, str]]) -> str:
    """Returns the text of report.md."""
    content = {
        "format_version": FORMAT_VERSION, "about": about, "left_out": [list(item) for item in left_out],
        "cases": [asdict(result) | {"fits": result.fits} for result in results],
    }  # fmt: skip
    write_json(folder / "report.json", content)
    text = _markdown(about, results, left_out)
    (folder / "report.md").write_text(text)
    return text


def _markdown(about: dict[str, str], results: Sequence[Result], left_out: Sequence[tuple[str, str]]) -> str:
    bad = [result.name for result in results if not result.fits]
    verdict = f"**{len(bad)} of {len(results)} cases do not fit:** {'; '.join(bad)}" if bad else f"**All {len(results)} cases fit.**"
    lines = ["# Acceptance of megatron-qsparse", "", verdict, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in about.items()]
    lines += ["", "| case | processes | difference | measured | allowed | | s |", "|---|---|---|---|---|---|---|"]
    for result in results:
        seconds = "" if result.seconds is None else f"{result.seconds:.0f}"
        rows = [
            (figure.what, f"{figure.value:.2g}", f"{figure.limit:.2g}", "fits" if figure.fits else "**no**") for figure in result.figures
        ]
        if result.problem:
            rows = [(result.problem.replace("|", "\\|"), "", "", f"**no** ({result.log})")]
        for number, row in enumerate(rows or [("", "", "", "ran")]):
            name = f"{result.name} ({result.note})" if result.note else result.name
            first = (name, str(result.processes)) if number == 0 else ("", "")
            lines.append("| " + " | ".join((*first, *row, seconds if number == 0 else "")) + " |")
    if left_out:
        lines += ["", "Not run:", *(f"- {name}: {reason}" for name, reason in left_out)]
    device = f"{about['devices']}, {about['communication']}"
    row = (device, about["nodes"], "acceptance, failed" if bad else "acceptance", about["versions"], about["date"])
    lines += ["", 'For the table "Verified on" of the README:', "", f"`| {' | '.join(row)} |`", ""]
    return "\n".join(lines)
