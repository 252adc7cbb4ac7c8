"""The command line and the files it names, read into a configuration; every mistake in a sentence, before anything heavy is imported.

Flags win over `--config` files wherever they stand, and later files over earlier ones. What is written is compared with the
dataclasses first (`pretrain.settings`), for messages that name setting, file and line; jsonargparse makes the configuration of it.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml

from pretrain import settings, yaml_text
from pretrain.config import ConfigurationError, PretrainConfig, dump_yaml
from pretrain.settings import Mistake

HELP = ("-h", "--help")
PRINT = "--print_config"


def parse(args: Sequence[str] | None = None, prog: str | None = None, description: str | None = None) -> PretrainConfig:
    """See `pretrain.config.parse`."""
    return to_config(read(_parser(prog, description), args))


def make_parser(prog: str | None = None, description: str | None = None):
    """jsonargparse parser whose keys are the fields of PretrainConfig; to be used by `read`."""
    from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", yaml_text.load, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(prog=prog, description=description, allow_abbrev=False, exit_on_error=False, print_config=None)
    parser.add_argument(PRINT, action="store_true", help="print the whole configuration as YAML, and stop")
    parser.add_argument("--config", action="config", help="YAML file; flags override what it says, and so do later files")
    parser.add_class_arguments(PretrainConfig, nested_key=None)
    return parser


_parser = cache(make_parser)


def read(parser, args: Sequence[str] | None = None, more: Mapping[str, type] | None = None):
    """Instantiated values of the command line. more: types of the arguments that the parser has besides PretrainConfig's fields.

    Raises ConfigurationError with a line for each mistake.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not set(args).intersection(HELP):
        args, mistakes = _checked(args, dict(more or {}))
        if mistakes:
            raise ConfigurationError("\n".join(map(str, mistakes)))
    added = [arg for arg in args if _is_added(_name_of(arg))]
    try:
        values = parser.instantiate(parser.parse_args([arg for arg in args if arg not in (*added, PRINT)]))
    except argparse.ArgumentError as error:
        # Something that only jsonargparse knows of.
        raise ConfigurationError(" ".join(str(error).split())) from error
    # jsonargparse would read them as YAML; a flag is text whatever it looks like.
    for arg in added:
        *sections, mapping, key = _name_of(arg).split(".")
        getattr(reduce(getattr, sections, values), mapping)[key] = arg.partition("=")[2]
    if PRINT in args:
        print(dump_yaml(to_config(values)), end="")
        sys.exit(0)
    return values


def _name_of(arg: str) -> str:
    return arg.removeprefix("--").partition("=")[0]


def _is_added(name: str) -> bool:
    """Whether it is a name that the user adds to a mapping of texts (tracking.tags.NAME)."""
    section = name.rpartition(".")[0]
    return name not in settings.leaves(PretrainConfig) and settings.leaves(PretrainConfig).get(section) == dict[str, str]


def to_config(values) -> PretrainConfig:
    """The configuration among the values of `read`."""
    return PretrainConfig(**{item.name: values[item.name] for item in dataclasses.fields(PretrainConfig)})


def _checked(args: list[str], more: dict[str, type]) -> tuple[list[str], list[Mistake]]:
    """(the same settings as `--name=value`, files first; what is wrong with them)."""
    files, flags, mistakes = [], [], []
    rest = iter(range(len(args)))
    for i in rest:
        name, equals, value = args[i].removeprefix("--").partition("=")
        if not args[i].startswith("--") or not name:
            mistakes.append(Mistake(f"{settings.shown(args[i])} belongs to no setting: write --section.name VALUE"))
            continue
        if args[i] == PRINT:
            flags.append(PRINT)
            continue
        if not equals and i + 1 < len(args) and not args[i + 1].startswith("--"):
            value, equals = args[next(rest)], "="
        kind = _kind(name, more)
        if name == "config":
            found = (
                settings.file_mistakes(PretrainConfig, Path(value), "", PretrainConfig)
                if value
                else [Mistake("--config needs a YAML file")]
            )
            mistakes += found
            files.append(f"--config={value}")
        elif kind is None:
            mistakes.append(Mistake(settings.unknown(name, PretrainConfig, tuple(more))))
        elif not equals:
            mistakes.append(Mistake(f"{name} needs a value: --{name} VALUE"))
        else:
            mistakes += _flag_mistakes(kind, name, value)
            flags.append(f"--{name}={value}")
    return files + flags, mistakes


def _kind(name: str, more: Mapping[str, type]) -> Any:
    """Type of what a flag sets; None where there is no such setting."""
    known = {**settings.leaves(PretrainConfig), **settings.kinds(PretrainConfig), **more, "config": str}
    # Elements can be added to a list, and names to a mapping.
    section, _, last = name.rpartition(".")
    if name.endswith("+") and getattr(known.get(name[:-1]), "__origin__", None) is list:
        return known[name[:-1]]
    if last and getattr(known.get(section), "__origin__", None) is dict:
        return known[section].__args__[1]
    return known.get(name)


def _flag_mistakes(kind: Any, name: str, text: str) -> list[Mistake]:
    if kind is str:
        return []
    if not dataclasses.is_dataclass(kind) and getattr(kind, "__origin__", None) not in (list, dict):
        # Nothing at all unsets nothing: that is `null`.
        wrong = settings.scalar_mistake(kind, text) or ("'': a value is needed" if not text else None)
        return [Mistake(f"{name}={wrong}")] if wrong else []
    try:
        node = yaml_text.compose(text)
    except yaml.YAMLError as error:
        return [Mistake(f"{name}={settings.shown(text)} is no YAML: {getattr(error, 'problem', None) or 'unreadable characters'}")]
    node = node or yaml.ScalarNode("tag:yaml.org,2002:null", "", yaml.Mark(name, 0, 0, 0, None, None))
    if name.endswith("+") and isinstance(node, yaml.MappingNode):
        kind = kind.__args__[0]
    found = settings.node_mistakes(kind, node, name.rstrip("+"), PretrainConfig, Path())
    return [mistake if mistake.file else Mistake(mistake.text) for mistake in found]
