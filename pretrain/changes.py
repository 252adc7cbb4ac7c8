"""How the settings of a run that goes on differ from those it was saved with, and which of these differences are allowed.

What defines the network and the data is compared by `identity` and never differs. Where and how often the run computes, saves and
logs is free. Everything else changes what is trained from here on and must be asked for: `allow_change`.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pretrain.checkpoint.content import read_settings
from pretrain.config import PretrainConfig, flatten, to_dict
from pretrain.settings import leaves

IDENTITY = (
    "model.", "qsparse.", "bitnet.", "train.seed", "train.global_batch_size", "train.precision", "data.sequence_length",
    "data.window_shards",
)  # fmt: skip
"""Compared by what they resolve to."""
FREE = (
    "parallel.", "zero.", "data.path", "data.workers", "train.micro_batch_size", "train.deterministic", "train.recompute",
    "train.check_codes", "train.max_skipped_steps", "train.log_interval", "train.hang_timeout_s", "train.straggler_factor",
    "validation.", "checkpoint.", "tracking.", "notify.", "output_dir", "device",
)  # fmt: skip
"""Layout, intervals, places. data.path may move: the manifest's digest is compared. Not what decides which samples a roll-back leaves
out."""
ABSENT = "(absent)"
OF_THE_START = ("resume", "allow_change", "format_version")
"""Said to this start of the run, or of the file."""


def compare(saved: Path, config: PretrainConfig) -> list[str]:
    """One line for each setting that differs from the checkpoint's config.yaml. Raises ValueError naming those that are not allowed."""
    before, now = _before(saved), flatten(to_dict(config))
    # Tags come and go.
    compared = [name for name in now | before if name not in OF_THE_START and not name.startswith(IDENTITY) and _is_setting(name)]
    changed = [name for name in compared if now.get(name) != before.get(name)]
    lines = {name: f"{name}: {before.get(name, ABSENT)} in the checkpoint, {now.get(name, ABSENT)} now" for name in changed}
    refused = [name for name in changed if not name.startswith(FREE) and not _is_allowed(name, config.allow_change)]
    if refused:
        told = "\n".join(f"  {lines[name]}" for name in refused)
        raise ValueError(
            f"{saved.parent} was trained with other settings:\n{told}\nrestore them, or change them on purpose with --allow_change "
            f"{','.join(refused)}"
        )
    return [f"changed: {line}" for line in lines.values()]


def none(saved: Path, config: PretrainConfig) -> bool:
    """Whether a run with this config.yaml would be trained as this one is: only layout, intervals and places may differ."""
    before, now = _before(saved), flatten(to_dict(config))
    return all(before.get(name) == now[name] for name in now if not name.startswith((*FREE, *OF_THE_START)))


def _is_setting(name: str) -> bool:
    """Not what a file of an older version says that there is no more."""
    return name in leaves(PretrainConfig) or name.rpartition(".")[0] in leaves(PretrainConfig)


def _before(saved: Path) -> dict[str, Any]:
    """Flat. A setting that the file does not know came later: its default means what was done before."""
    return flatten(to_dict(PretrainConfig())) | read_settings(saved)


def problems(config: PretrainConfig) -> list[str]:
    """What cannot work in `allow_change`."""
    names, found = flatten(to_dict(config)), []
    if not config.allow_change.isprintable():
        # Told by pretrain.validation.texts.
        return found
    if config.allow_change and config.resume == "never":
        found.append(f"allow_change={config.allow_change} has no effect with resume=never: leave one of them out")
    for name in _named(config.allow_change):
        meant = [field for field in names if _covers(name, field)]
        if not meant:
            close = get_close_matches(name, [*names, *(field.partition(".")[0] for field in names)], n=1)
            hint = f"; did you mean {close[0]}?" if close else ": correct it"
            found.append(f"allow_change={config.allow_change}: there is no setting {name}{hint}")
        elif all(field.startswith(IDENTITY) for field in meant):
            found.append(f"allow_change={config.allow_change}: {name} is part of what the run is and never changes: leave it out, or "
                         "start another run (checkpoint.start_from takes weights)")  # fmt: skip
        elif all(field.startswith(FREE) or field in OF_THE_START for field in meant):
            found.append(f"allow_change={config.allow_change}: {name} may change at any start: leave it out")
    return found


def _is_allowed(field: str, allowed: str) -> bool:
    return any(_covers(name, field) for name in _named(allowed))


def _named(allowed: str) -> list[str]:
    return [name.strip() for name in allowed.split(",") if name.strip()]


def _covers(name: str, field: str) -> bool:
    """A section stands for all its fields."""
    return field == name or field.startswith(f"{name}.")
