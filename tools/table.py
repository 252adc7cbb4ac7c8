"""Versions found against versions tested, and what cannot work."""

import sys
from dataclasses import dataclass

from pip._vendor.packaging.requirements import Requirement

from tools.packages import STACKS, Installed, canonical, is_protected, parse_version, pins, requirements

ALWAYS = ("torch", "triton", "transformer-engine", "numpy", *STACKS)
"""Rows that the table has whether installed or not."""


@dataclass(frozen=True)
class Row:
    """verdict: ok, untested, too old, too new, not here, or to be installed."""

    name: str
    found: str
    tested: str
    verdict: str


def verdict(found: str, tested: str | None, required: Requirement | None) -> str:
    """found, tested: versions; a label after + in `found` (2.13.0+cpu) does not make it another version."""
    here, there = parse_version(found), parse_version(tested) if tested else None
    if here is None:
        return "untested"
    # A container's torch is often a pre-release by its version (2.9.0a0+...).
    if required is not None and not required.specifier.contains(here, prereleases=True):
        return "too old" if there is None or here < there else "too new"
    return "ok" if there is not None and here.public == there.public else "untested"


def table(found: dict[str, Installed]) -> list[Row]:
    """One row for Python, what is in `ALWAYS`, and every other protected package that is installed (CUDA libraries aside)."""
    tested, required = pins(), requirements()
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    rows = [Row("python", sys.version.split()[0], python, "ok")]
    others = sorted(name for name in found if is_protected(name) and not name.startswith(("nvidia-", "cuda-")))
    for name in dict.fromkeys([*ALWAYS, *others]):
        pin = tested.get(name)
        # Triton is tested as torch's companion; where nothing asks for it, its pin says nothing.
        if name in found:
            rows.append(Row(name, found[name].version, pin or "-", verdict(found[name].version, pin, required.get(name))))
        else:
            rows.append(Row(name, "-", pin or "-", "to be installed" if name in required else "not here"))
    return rows


def printed(rows: list[Row]) -> str:
    cells = [("package", "found", "tested", ""), *((row.name, row.found, row.tested, row.verdict) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        "  ".join([*(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip() for line in cells
    )


def refusals(found: dict[str, Installed]) -> list[str]:
    """What of the environment keeps the project from running and may not be replaced here; each with its remedy."""
    required, problems = requirements(), []
    if "torch" not in found:
        problems.append(
            "there is no torch in this environment: activate the one that has it (a container's own, a module, conda), name its "
            "interpreter with PYTHON=/path/to/python, or let `make install` make an environment with a torch of its own"
        )
    for name, package in found.items():
        need = required.get(name)
        here = parse_version(package.version)
        if need is None or here is None or need.specifier.contains(here, prereleases=True):
            continue
        # A virtual environment on top of the system's packages gets its own; torch and what is compiled against it must be one.
        if name in STACKS and package.inside:
            problems.append(
                f"{name} {package.version} is installed here, {_wanted(need)} is needed: it is not replaced, as other code of this "
                "environment may need it. Install into a virtual environment on top of it: `python -m venv --system-site-packages "
                "DIR; source DIR/bin/activate; make install-into-current`; or, where nothing else uses it, take it out with "
                f"`python -m pip uninstall {name}`"
            )
        elif is_protected(name):
            problems.append(
                f"{name} {package.version} is installed here, {_wanted(need)} is needed, and it is not touched: use a container or module "
                "with another version, or let `make install` make an environment with its own"
            )
    return problems


def _wanted(need: Requirement) -> str:
    return f"{canonical(need.name)} {need.specifier}".strip()
