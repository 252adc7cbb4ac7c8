"""What names, paths and commands may be, and whether the run directory can be written."""

import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator

from pretrain.config import PretrainConfig, flatten, to_dict
from pretrain.run_directory import problems as directory_problems

NAME_BYTES, PATH_BYTES = 255, 4095
"""Of a name in a folder and of a path, on Linux."""
MLFLOW_NAME = 500
"""Characters of the name of a run or an experiment."""
MLFLOW_TAG = re.compile(r"[/\w.\- :]{1,250}")
"""A tag with any other name is refused by MLflow, and with it all tags."""


def problems(config: PretrainConfig) -> list[str]:
    """One line for each text that cannot be used as what it is for."""
    return [
        *_unprintable(config), *_path_problems(config), *_name_problems(config), *_tag_problems(config.tracking.tags),
        *_command_problems(config.notify.command),
    ]  # fmt: skip


def usable_path(text: str) -> bool:
    """Whether the file system can be asked for it."""
    return _path_problem(text) is None and text.isprintable()


def _unprintable(config: PretrainConfig) -> Iterator[str]:
    settings = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, tags={}))
    # A preset and the names of projections must be among those that there are.
    for name, value in flatten(to_dict(settings)).items():
        if isinstance(value, str) and not value.isprintable() and name != "model.preset":
            yield f"{name}={value!r} holds characters that cannot be printed, such as a line break: remove them"
        elif isinstance(value, str) and value != value.strip():
            yield f"{name}={value!r} begins or ends with a space: remove it"


def _path_problems(config: PretrainConfig) -> Iterator[str]:
    for name, value in {
        "data.path": config.data.path,
        "output_dir": config.output_dir,
        "checkpoint.start_from": config.checkpoint.start_from,
    }.items():
        if problem := _path_problem(value):
            yield f"{name}={_shortened(value)} {problem}"
    directory = config.run_directory
    if usable_path(str(directory)) and usable_path(config.output_dir):
        yield from directory_problems(directory, "output_dir" if config.output_dir else f"output_dir (unset: {directory})")


def _path_problem(text: str) -> str | None:
    encoded = text.encode(errors="replace")
    if len(encoded) > PATH_BYTES or any(len(part) > NAME_BYTES for part in encoded.split(b"/")):
        return f"is too long: shorten it, since a path has at most {PATH_BYTES} bytes and each name in it {NAME_BYTES}"
    if (text.startswith("~") or "$" in text) and text.isprintable() and not os.path.lexists(text):
        return "is taken as it stands, since only a shell replaces ~ and $VARIABLES: write the whole path"
    return None


def _name_problems(config: PretrainConfig) -> Iterator[str]:
    tracking = config.tracking
    for name, value in (("tracking.run_name", tracking.run_name), ("tracking.experiment", tracking.experiment)):
        if len(value) > MLFLOW_NAME:
            yield f"{name}={_shortened(value)} is too long: shorten it to {MLFLOW_NAME} characters"
    if config.output_dir or not tracking.run_name:
        return
    name = tracking.run_name
    if "/" in name or name in (".", "..") or name.startswith("~") or len(name.encode(errors="replace")) > NAME_BYTES:
        yield (
            f"tracking.run_name={_shortened(name)} cannot name the run directory, runs/<tracking.run_name>: set output_dir, or choose a "
            f"name of at most {NAME_BYTES} bytes without /, .. and ~"
        )


def _tag_problems(tags: dict[str, str]) -> Iterator[str]:
    for name, value in tags.items():
        shown = _shortened(name)
        if not MLFLOW_TAG.fullmatch(name) or not name.isprintable() or os.path.normpath(name) != name or name.startswith((".", "/")):
            yield (
                f"tracking.tags: {shown!r} cannot name a tag in MLflow: use letters, digits, spaces and _ - . : / (not first, last or "
                "twice in a row), at most 250 characters"
            )
        elif not value.replace("\n", "").replace("\t", "").isprintable():
            yield f"tracking.tags.{shown}={_shortened(value)!r} holds characters that cannot be printed: remove them"


def _command_problems(command: str) -> Iterator[str]:
    """The shell reads it without running anything: its mistakes would be found when somebody waits for the message."""
    if not command.strip() or not command.isprintable():
        return
    try:
        shell = subprocess.run(["/bin/sh", "-n", "-c", command], capture_output=True, text=True, errors="replace", timeout=10)
        reason = " ".join(shell.stderr.split()) if shell.returncode else ""
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or str(error)
    if reason:
        yield f"notify.command={_shortened(command)!r} cannot be read by /bin/sh ({_shortened(reason)}): correct it"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
