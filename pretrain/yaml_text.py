"""YAML as files of settings are written: plain scalars mean what they do in the core schema of YAML 1.2.

PyYAML knows 1.1 only, where `off` is false, `0600` is octal, `12:30:00` is 45000 and `1e5` is text.
"""

import re
from typing import Any

import yaml

INTEGER = re.compile(r"[+-]?(0|[1-9](_?[0-9]){0,18})")
NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)
BOOLEANS = ("true", "True", "TRUE", "false", "False", "FALSE")
NULLS = ("null", "Null", "NULL", "~", "")
MERGE = "tag:yaml.org,2002:merge"
"""The key `<<`, whose value is another mapping."""


class Loader(yaml.SafeLoader):
    """Numbers that are not finite stay text: no setting takes them."""

    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either version would read as something else."""

    yaml_implicit_resolvers = {letter: list(found) for letter, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}


def _either(words: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"(?:{'|'.join(map(re.escape, words))})$")


for _tag, _pattern, _first in (
    ("null", _either(NULLS), [*"~nN", ""]),
    ("bool", _either(BOOLEANS), [*"tTfF"]),
    ("int", re.compile(rf"(?:{INTEGER.pattern})$"), [*"+-0123456789"]),
    ("float", re.compile(rf"(?:{NUMBER.pattern})$"), [*"+-.0123456789"]),
    ("merge", _either(("<<",)), ["<"]),
):
    for _class in (Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def load(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, Loader=Loader)


def compose(text: str) -> yaml.Node | None:
    """Raises yaml.YAMLError."""
    return yaml.compose(text, Loader=Loader)


def untagged(node: yaml.Node) -> str:
    """The tag that the node would have by what it looks like."""
    value, plain = (node.value, node.style is None) if isinstance(node, yaml.ScalarNode) else (None, False)
    return Loader("").resolve(type(node), value, (plain, not plain))


def dump(content: Any) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
