"""Calling pip: offline or not, with a line of progress for each package, and its refusals in words."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

OLDEST = (22, 3)
"""Of pip: the first whose --dry-run --report is what is read here."""
_PROGRESS = re.compile(r"^\s*(Collecting|Processing|Downloading|Saved|Building wheel for|Installing collected)")
_FOLDERS = re.compile(r"(file:/)?/\S*/")


@dataclass(frozen=True)
class Pip:
    """pip of one interpreter. offline: a folder of wheels; then no index is asked and no configuration of pip's is read."""

    python: str = sys.executable
    offline: Path | None = None

    def run(self, *args: str, progress: bool = False) -> subprocess.CompletedProcess:
        """args: a subcommand of pip's and its options. stdout of the result is both streams."""
        command = [self.python, "-m", "pip", *args]
        # The metadata beside the sources, left by an earlier installation, is not of this environment.
        environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONSAFEPATH="1")
        if self.offline is not None:
            command += ["--no-index", "--find-links", str(self.offline.absolute())]
            for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
                environment.pop(name, None)
            environment["PIP_CONFIG_FILE"] = os.devnull
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        lines, count = [], 0
        for line in process.stdout:
            lines.append(line)
            if progress and _PROGRESS.match(line):
                count += 1
                print(f"  {count:3}  {_FOLDERS.sub('', line.strip()):.70}", flush=True)
        return subprocess.CompletedProcess(command, process.wait(), "".join(lines), "")

    def resolve(self, wanted: list[str], constraints: list[str]) -> "Resolution":
        """What `pip install` of these would add or replace, found out without doing it."""
        with tempfile.TemporaryDirectory() as folder:
            report, listed = Path(folder) / "report.json", Path(folder) / "constraints.txt"
            listed.write_text("\n".join(constraints) + "\n")
            arguments = ["install", "--dry-run", "--report", str(report), "-c", str(listed), *wanted]
            result = self.run(*arguments, progress=True)
            if result.returncode:
                return Resolution(None, result.stdout)
            entries = json.loads(report.read_text())["install"]
        return Resolution({entry["metadata"]["name"]: entry["metadata"]["version"] for entry in entries}, result.stdout)


@dataclass(frozen=True)
class Resolution:
    """versions: by name as its author writes it; None where there is no solution."""

    versions: dict[str, str] | None
    output: str

    @property
    def reasons(self) -> list[str]:
        """pip's own lines on why there is none."""
        _, _, conflict = self.output.partition("The conflict is caused by:\n")
        if conflict:
            lines = conflict.split("\n\n")[0].splitlines()
            return [re.sub(r"^The user requested \(constraint\) (\S+?)==(\S+)", r"\1 is held at \2", line.strip()) for line in lines]
        return errors(self.output)

    @property
    def blamed(self) -> set[str]:
        """Packages that a conflict names as cause, or that are to be had in no version that was asked for; names as pip writes them."""
        found = re.findall(
            r"^\s+(?:The user requested \(constraint\) )?([A-Za-z0-9._-]+?)(?:\[\S*\])?(?:==\S+| \S+ depends on .*)$", self.output, re.M
        )
        return {*found, *re.findall(r"No matching distribution found for ([A-Za-z0-9._-]+)", self.output)}


def errors(output: str) -> list[str]:
    """The lines of pip's that say what went wrong, or its last ones."""
    lines = [line for line in output.splitlines() if line.strip()]
    told = [re.sub(r"^\s*(ERROR|error): ", "", line) for line in lines if re.match(r"\s*(ERROR|error): ", line)]
    # Of an error in pip itself the last line of its traceback.
    return [line if line != "Exception:" else lines[-1].strip() for line in told] or [line.strip() for line in lines[-5:]]
