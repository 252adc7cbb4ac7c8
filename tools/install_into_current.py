"""Install the project into the active environment without touching torch, CUDA libraries and what is compiled against them.

pip is asked first what it would do. What it is then told to do is that list, without the protected packages, so that none of
them can change; afterwards they are compared with what they were.
"""

import argparse
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tools.packages import (
    PROJECT,
    ROOT,
    Installed,
    build_requirements,
    canonical,
    changes,
    installed,
    is_protected,
    parse_version,
    pins,
    present_otherwise,
    requirements,
)
from tools.pip_calls import OLDEST, Pip, Resolution, errors
from tools.table import Row, printed, refusals, table
from tools.wheelhouse import Unusable, check, finish, replacing


class Refused(Exception):
    """Nothing was installed, or not all; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """added, replaced: name -> version to install. left_out: protected packages that pip would have added unasked."""

    added: dict[str, str]
    replaced: dict[str, str]
    left_out: dict[str, str]
    untested: dict[str, str]
    """Of both, the ones at another version than the tested one."""

    @property
    def versions(self) -> dict[str, str]:
        return {**self.added, **self.replaced}

    @property
    def wanted(self) -> list[str]:
        return [f"{name}=={version}" for name, version in self.versions.items()]


def main(args: list[str] | None = None) -> int:
    """Exit status 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="make install-into-current", description=__doc__)
    parser.add_argument("--offline", type=Path, metavar="DIR", help="take everything from this folder of `make wheelhouse`")
    parser.add_argument("--wheelhouse", type=Path, metavar="DIR", help="install nothing: collect in DIR what this environment lacks")
    parser.add_argument("--plan", action="store_true", help="show what would be installed, and stop")
    options = parser.parse_args(args)
    # In order with stderr, in a log too.
    sys.stdout.reconfigure(line_buffering=True)
    try:
        _main(options)
    except (Refused, Unusable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _main(options: argparse.Namespace) -> None:
    started = time.monotonic()
    print(f"environment: {sys.prefix} (Python {sys.version.split()[0]})")
    before = installed()
    rows = table(before)
    print(printed(rows))
    problems = refusals(before) + _environment_problems(writes=options.wheelhouse is None and not options.plan)
    if problems:
        raise Refused("\nerror: ".join(problems))
    torch = _python("import torch; print(torch.__version__)", f"torch {before['torch'].version} does not import here")
    _warn(rows)
    if options.offline is not None:
        check(options.offline, needs_torch=False)
    pip = Pip(offline=options.offline)
    print("looking up what is to be installed")
    plan = find_plan(pip, before)
    _show(plan, before)
    if options.plan:
        return
    if options.wheelhouse is not None:
        _collect(pip, plan, options.wheelhouse, before)
        return
    complaints = _complaints(pip)
    # --no-deps: the list is complete, and pip then has no say in the packages that are not on it.
    result = pip.run("install", "--no-deps", *plan.wanted, "-e", str(ROOT), progress=True)
    importlib.invalidate_caches()
    after = installed()
    touched = changes(before, after)
    if touched:
        raise Refused("packages of the environment that were to be left alone have changed: " + "; ".join(touched))
    if result.returncode:
        raise Refused("pip could not install everything:\n  " + "\n  ".join(errors(result.stdout)))
    hidden = [
        f"{name} {after[name].version} in {after[name].location}" for name, new in plan.versions.items() if after[name].version != new
    ]
    imported = _python(
        "import pretrain.run, megatron.core; print(megatron.core.__version__)", "the project was installed, but does not import"
    )
    if parse_version(imported) != parse_version(after["megatron-core"].version):
        hidden.append(f"megatron-core {imported}")
    if hidden:
        raise Refused(f"everything was installed, but Python finds {', '.join(hidden)} first: take its folder out of PYTHONPATH")
    for line in sorted(_complaints(pip) - complaints):
        print(f"warning: what is installed now does not suit another package of this environment: {line}")
    kept = ", ".join(f"{row.name} {row.found}" for row in rows if is_protected(row.name) and row.found != "-")
    print(f"installed in {time.monotonic() - started:.0f} s; untouched: {kept} (imports as {torch})")
    print("start with `python -m pretrain.quickstart`; the other targets of make use an environment of their own (.venv)")


def find_plan(pip: Pip, before: dict[str, Installed]) -> Plan:
    """What is to be installed beside what there is: versions as tested where they fit, else what pip finds.

    Raises Refused, in pip's words, where nothing fits beside the protected packages.
    """
    there = present_otherwise(before)
    required = {name: one for name, one in requirements().items() if name not in there}
    # pip knows no version that is not one by PEP 440, and leaves such a package alone.
    held = {name: package.version for name, package in before.items() if is_protected(name) and parse_version(package.version)}
    # What is here and fits stays as it is, tested or not.
    free = {name for name in before if _fits(name, before)} | _constrained_elsewhere() | held.keys()
    tested = {name: pin for name, pin in pins().items() if name not in free}
    while True:
        constraints = [f"{name}=={pin}" for name, pin in {**held, **tested}.items()]
        resolution = pip.resolve([str(one) for one in required.values()], constraints)
        if resolution.versions is not None:
            break
        blamed = {canonical(name) for name in resolution.blamed} & tested.keys()
        if not blamed and not (tested and _is_conflict(resolution)):
            raise Refused(_no_solution(resolution, held, pip))
        for name in blamed or set(tested):
            del tested[name]
        print(f"  the tested versions of {', '.join(sorted(blamed) or ['all packages'])} do not fit this environment; looking for others")
    versions = {canonical(name): new for name, new in resolution.versions.items()}
    changed = sorted(versions.keys() & held.keys())
    if changed:
        raise Refused("pip would have to change " + ", ".join(f"{name} {held[name]} to {versions[name]}" for name in changed))
    left_out = {name: new for name, new in versions.items() if is_protected(name) and name not in required}
    chosen = {name: new for name, new in versions.items() if name not in left_out and name != PROJECT}
    return Plan(
        added={name: new for name, new in chosen.items() if name not in before},
        replaced={name: new for name, new in chosen.items() if name in before},
        left_out=left_out,
        untested={name: new for name, new in chosen.items() if pins().get(name, new) != new},
    )


def _fits(name: str, before: dict[str, Installed]) -> bool:
    """Installed, and as our own requirements want it: pip then keeps it."""
    need = requirements().get(name)
    here = parse_version(before[name].version) if name in before else None
    return here is not None and (need is None or need.specifier.contains(here, prereleases=True))


def _is_conflict(resolution: Resolution) -> bool:
    return "The conflict is caused by" in resolution.output or "No matching distribution" in resolution.output


def _constrained_elsewhere() -> set[str]:
    """Packages for which the environment has constraints of its own (PIP_CONSTRAINT, as NVIDIA's containers do)."""
    names = set()
    for file in os.environ.get("PIP_CONSTRAINT", "").split():
        if Path(file).is_file():
            matches = (re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line) for line in Path(file).read_text().splitlines())
            names |= {canonical(match[1]) for match in matches if match}
    return names


def _no_solution(resolution: Resolution, held: dict[str, str], pip: Pip) -> str:
    reasons = "\n  ".join(resolution.reasons)
    if not _is_conflict(resolution):
        return f"pip could not find out what to install:\n  {reasons}"
    named = [f"{name} {version}" for name, version in held.items() if re.search(rf"\b{re.escape(name)}\b", reasons)]
    if named:
        remedy = (
            f"pip would have to change {', '.join(named)}, which is left alone. Use an environment with other versions, or `make install`"
        )
    elif pip.offline is not None:
        remedy = f"{pip.offline} lacks it: make a wheelhouse in an environment like this one with `make wheelhouse FOR=current`"
    else:
        remedy = "mend the environment (`python -m pip check` names what is at odds), or let `make install` make one of its own"
    return f"nothing was installed: what is needed does not fit what is here:\n  {reasons}\n{remedy}"


def _environment_problems(writes: bool) -> list[str]:
    """What keeps pip from working here. writes: whether something is to be installed."""
    venv = "make a virtual environment on top of it: `python -m venv --system-site-packages DIR; source DIR/bin/activate`, then again"
    problems = []
    pip = importlib.metadata.version("pip")
    if tuple(int(part) for part in re.findall(r"\d+", pip)[:2]) < OLDEST:
        problems.append(
            f"pip {pip} is too old, {OLDEST[0]}.{OLDEST[1]} is needed: `python -m pip install --upgrade pip`, in a container too"
        )
    if not writes:
        return problems
    managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and managed.exists() and not _may_break_system_packages():
        problems.append(f"{sys.prefix} is marked as another installer's ({managed}): {venv}")
    packages = Path(sysconfig.get_path("purelib"))
    # A system's folder may not have been made yet.
    if not os.access(next(folder for folder in (packages, *packages.parents) if folder.exists()), os.W_OK):
        problems.append(f"{packages} cannot be written to (a read-only container, or another user's environment): {venv}")
    if not os.access(ROOT, os.W_OK):
        problems.append(f"{ROOT} cannot be written to, and the project is installed as it lies there: copy it to a folder of yours")
    return problems


def _may_break_system_packages() -> bool:
    listed = Pip().run("config", "list").stdout
    return bool(re.search(r"break-system-packages='(1|true|yes|on)'", listed, re.I))


def _warn(rows: list[Row]) -> None:
    untested = [f"{row.name} {row.found}" for row in rows if row.verdict == "untested"]
    if untested:
        print(
            f"warning: not tested with this project: {', '.join(untested)}; it may work: `python -m pretrain.quickstart --steps 20` tells"
        )


def _show(plan: Plan, before: dict[str, Installed]) -> None:
    print(f"to be added: {len(plan.added)} packages" + (f" ({', '.join(sorted(plan.added))})" if plan.added else ""))
    for name, version in sorted(plan.replaced.items()):
        print(f"to be {'replaced' if before[name].inside else 'hidden'}: {name} {before[name].version} by {version}")
    for name, version in sorted(plan.left_out.items()):
        print(f"left out: {name} {version}, which a package asks for and this environment does without")
    if plan.untested:
        print(
            "at other versions than tested: " + ", ".join(f"{name} {version} ({pins()[name]})" for name, version in plan.untested.items())
        )


def _collect(pip: Pip, plan: Plan, folder: Path, before: dict[str, Installed]) -> None:
    with replacing(folder) as partial:
        print(f"collecting wheels in {folder}")
        wanted = [*plan.wanted, *build_requirements()]
        result = pip.run("wheel", "--no-deps", "--wheel-dir", str(partial), *wanted, progress=True)
        if result.returncode:
            raise Refused("pip could not collect everything:\n  " + "\n  ".join(errors(result.stdout)))
        finish(partial, beside={name: package.version for name, package in before.items() if is_protected(name)}, shown=folder)


def _complaints(pip: Pip) -> set[str]:
    return {line for line in pip.run("check").stdout.splitlines() if "No broken requirements" not in line}


def _python(code: str, failure: str) -> str:
    """stdout of the code in a fresh interpreter outside of this folder. Raises Refused."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise Refused(f"{failure}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""


if __name__ == "__main__":
    sys.exit(main())
