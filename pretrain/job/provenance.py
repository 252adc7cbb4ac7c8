"""RUN_DIR/slurm/JOB.RESTART/: what this start of the run ran in. Environment and packages here; nodes by slurm/lib.sh beside it."""

import importlib.metadata
import os
import re
from pathlib import Path

ENVIRONMENT_NAME, PACKAGES_NAME = "environment.txt", "packages.txt"
SECRET = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE|AUTH|COOKIE", re.IGNORECASE)
"""Names of variables whose values are nobody's business."""
IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
"""User and password in an address."""


def write(folder: Path) -> None:
    """Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENVIRONMENT_NAME).write_text("".join(f"{line}\n" for line in environment(os.environ)), errors="surrogateescape")
    (folder / PACKAGES_NAME).write_text("".join(f"{line}\n" for line in packages()))


def environment(variables: os._Environ | dict[str, str]) -> list[str]:
    """`NAME=value`, sorted, secrets left out."""
    shown = {name: "(not shown)" if SECRET.search(name) else IN_URL.sub("(not shown)", value) for name, value in variables.items()}
    return [f"{name}={value}".replace("\n", "\\n") for name, value in sorted(shown.items())]


def packages() -> list[str]:
    """`name==version`, sorted, as `pip freeze` lists them."""
    found = {(item.metadata["Name"] or "?").lower(): item.version for item in importlib.metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items())]
