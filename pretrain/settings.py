"""Whether what somebody wrote fits a setting: names, types and choices, by the fields of the dataclasses.

Values are looked at as they are written, YAML nodes with their lines, so that a mistake is told where it stands. What numbers may
be and what goes together is told by `pretrain.validate`.
"""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from pretrain.yaml_text import BOOLEANS, INTEGER, MERGE, NOT_FINITE, NULLS, NUMBER, compose, untagged


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One sentence, and the line of the file it is about, counted from 1; None for a flag."""

    text: str
    line: int | None = None
    file: Path | None = None

    def __str__(self) -> str:
        return self.text if self.file is None else f"{self.file}{f', line {self.line}' if self.line else ''}: {self.text}"


@cache
def kinds(settings: type) -> dict[str, Any]:
    """Type of each field of a dataclass."""
    return typing.get_type_hints(settings)


@cache
def leaves(settings: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every setting that is not a section."""
    found = {}
    for name, kind in kinds(settings).items():
        found |= leaves(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {f"{prefix}{name}": kind}
    return found


def unknown(name: str, settings: type, more: tuple[str, ...] = ()) -> str:
    """What to say of a name that is no setting. more: names besides those of `settings`."""
    names = {*leaves(settings), *(item.name for item in dataclasses.fields(settings)), *more}
    wanted = name.replace("-", "_")
    close = [known for known in sorted(names) if known.rpartition(".")[2] == wanted.rpartition(".")[2]]
    close = get_close_matches(wanted, close, n=1, cutoff=0) or get_close_matches(wanted, names, n=1, cutoff=0.7)
    if not close:
        # Without its section, and misspelt.
        last = {known.rpartition(".")[2]: known for known in sorted(names)}
        close = [last[found] for found in get_close_matches(wanted.rpartition(".")[2], last, n=1, cutoff=0.75)]
    return f"no setting {shown(name)}{f'; did you mean {close[0]}?' if close else ''} (--help lists all)"


def shown(text: str) -> str:
    """A written value in a message: one line, not too long."""
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if text.isprintable() and text == text.strip() and text else repr(text)


def scalar_mistake(kind: Any, text: str, plain: bool = True) -> str | None:
    """What is wrong with a value that is not a list or mapping, or None. plain: it stands without quotes."""
    optional, kind = _optional(kind)
    if optional and plain and text in NULLS:
        return None
    needed = None
    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        if text not in choices:
            close = get_close_matches(text.lower(), choices, n=1)
            needed = f"choose one of {', '.join(choices)}{f'; did you mean {close[0]}?' if close else ''}"
    elif kind is bool:
        needed = None if text in BOOLEANS else "true or false is needed"
    elif kind is int:
        needed = (
            None if INTEGER.fullmatch(text) else "an integer of at most 19 digits is needed" if text.isdecimal() else "an integer is needed"
        )
    elif kind is float:
        if NOT_FINITE.fullmatch(text) or (NUMBER.fullmatch(text) and not math.isfinite(float(text))):
            needed = "a finite number is needed"
        elif not NUMBER.fullmatch(text):
            needed = "a number is needed"
    elif kind is str:
        if plain and text in NULLS:
            needed = "text is needed: write '' for none"
        elif plain and (text in BOOLEANS or NUMBER.fullmatch(text) or INTEGER.fullmatch(text)):
            needed = f"text is needed: write '{text}', in quotes"
    else:
        needed = f"{_wanted(kind)} is needed"
    return f"{shown(text)}: {needed}{' (or null: unset)' if optional and needed else ''}" if needed else None


def node_mistakes(kind: Any, node: yaml.Node, name: str, settings: type, base: Path) -> Iterator[Mistake]:
    """Everything wrong in a piece of YAML that stands for the setting `name`.

    settings: the dataclass of the whole. base: where the files lie that sections are read from (`train: train.yaml`).
    """
    line = node.start_mark.line + 1
    if node.tag != untagged(node):
        yield Mistake(f"{name or 'the file'} is written with the YAML tag {node.tag}: remove it", line)
        return
    kind = _optional(kind)[1] if not isinstance(node, yaml.ScalarNode) else kind
    if dataclasses.is_dataclass(kind):
        if isinstance(node, yaml.MappingNode):
            yield from _mapping_mistakes(kind, node, name, settings, base)
        elif isinstance(node, yaml.ScalarNode) and node.value and os.path.isfile(base / node.value):
            yield from file_mistakes(kind, base / node.value, name, settings)
        else:
            yield Mistake(f"{name or 'the file'} must be a mapping of settings, such as {_example(kind)}; found {_found(node)}", line)
    elif isinstance(node, yaml.ScalarNode):
        if wrong := scalar_mistake(kind, node.value, plain=node.style is None):
            yield Mistake(f"{name}={wrong}", line)
    elif typing.get_origin(kind) is list and isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from node_mistakes(typing.get_args(kind)[0], item, f"{name}[{i}]", settings, base)
    elif typing.get_origin(kind) is dict and isinstance(node, yaml.MappingNode):
        key_kind, value_kind = typing.get_args(kind)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for twice in sorted({key for key in names if names.count(key) > 1}):
            yield Mistake(f"{name}.{twice} is written twice: remove one", line)
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or (wrong := scalar_mistake(key_kind, key.value, key.style is None)):
                yield Mistake(
                    f"{name}: a name in it is {wrong if isinstance(key, yaml.ScalarNode) else 'no text'}", key.start_mark.line + 1
                )
            else:
                yield from node_mistakes(value_kind, value, f"{name}.{key.value}", settings, base)
    else:
        yield Mistake(f"{name} must be {_wanted(kind)}; found {_found(node)}", line)


def file_mistakes(kind: type, path: Path, name: str, settings: type) -> Iterator[Mistake]:
    """Everything wrong with a YAML file that says the section `name`, or all settings where that is ""."""
    if not os.path.lexists(path):
        yield Mistake("there is no such file: check the path", file=path)
        return
    if not os.path.isfile(path):
        what = "this is a directory: name a YAML file in it" if os.path.isdir(path) else "this is no plain file: name a YAML file"
        yield Mistake(what, file=path)
        return
    try:
        node = compose(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.context, error.problem))) or str(error)
        yield Mistake(f"this is no YAML: {_one_line(what)}", mark.line + 1 if mark else None, path)
        return
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        yield Mistake(f"this is no YAML file that can be read: {_one_line(error)}", file=path)
        return
    if node is None:
        yield Mistake("the file is empty: write settings into it, or leave it out", file=path)
        return
    if not isinstance(node, yaml.MappingNode):
        text = f"the file must hold a mapping of settings, such as {_example(kind)}; found {_found(node)}"
        yield Mistake(text, node.start_mark.line + 1, path)
        return
    for mistake in node_mistakes(kind, node, name, settings, path.parent):
        yield mistake if mistake.file else dataclasses.replace(mistake, file=path)


def _mapping_mistakes(kind: type, node: yaml.MappingNode, name: str, settings: type, base: Path) -> Iterator[Mistake]:
    fields, seen = kinds(kind), {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == MERGE:
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for item in merged:
                if item is node:
                    yield Mistake(f"{name or 'the file'} is merged into itself: remove the line", line)
                else:
                    yield from node_mistakes(kind, item, name, settings, base)
            seen |= {inner.value: None for item in merged if isinstance(item, yaml.MappingNode) for inner, _ in item.value}
            continue
        written = key.value if isinstance(key, yaml.ScalarNode) else _found(key)
        full = f"{name}.{written}" if name else written
        if seen.get(written):
            yield Mistake(f"{full} is written twice, in lines {seen[written]} and {line}: remove one", line)
        seen[written] = line
        if written in fields:
            yield from node_mistakes(fields[written], value, full, settings, base)
        elif name and name not in {item.name for item in dataclasses.fields(settings)}:
            # In an element of a list: no setting of its own.
            yield Mistake(f"{name} has no field {shown(written)}: choose from {', '.join(fields)}", line)
        elif full in leaves(settings):
            section, _, field = full.rpartition(".")
            yield Mistake(f"{full} is written with dots: write `{field}: ...` below `{section}:`", line)
        else:
            yield Mistake(unknown(full, settings), line)
    for item in dataclasses.fields(kind):
        if item.default is item.default_factory is dataclasses.MISSING and item.name not in seen:
            yield Mistake(f"{name}.{item.name} is missing: add it", node.start_mark.line + 1)


def _optional(kind: Any) -> tuple[bool, Any]:
    """int | None -> (True, int)"""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (inner,) = (argument for argument in typing.get_args(kind) if argument is not type(None))
        return True, inner
    return False, kind


def _wanted(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {', '.join(kinds(kind))}"
    match typing.get_origin(kind):
        case typing.Literal:
            return f"one of {', '.join(typing.get_args(kind))}"
        case container if container is list:
            return f"a list, each element {_wanted(typing.get_args(kind)[0])}"
        case container if container is dict:
            return "a mapping of names to texts"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]


def _example(kind: type) -> str:
    """One line of YAML."""
    name, inner = next(iter(kinds(kind).items()))
    return f"`{name}: {{{next(iter(kinds(inner)))}: ...}}`" if dataclasses.is_dataclass(inner) else f"`{{{name}: ...}}`"


def _found(node: yaml.Node) -> str:
    match node:
        case yaml.ScalarNode():
            return "nothing" if node.style is None and node.value in NULLS else shown(node.value)
        case yaml.SequenceNode():
            return "a list"
    return "a mapping"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
