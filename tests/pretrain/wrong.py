"""For every field what is wrong for it. No torch in here.

A new field fails `test_wrong_configs` until it is in one of these tables.
"""

import json
import math
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

from pretrain.config import ConfigurationError, PretrainConfig, parse
from pretrain.settings import leaves
from pretrain.validate import validate
from pretrain.validation.ranges import RANGES, Range

LEAVES = leaves(PretrainConfig)


class Raw(str):
    """A value as it is written in YAML and after a flag; everything else is written in quotes where it must be."""


@dataclass(frozen=True)
class Case:
    """changes: dotted name -> value. named: what the message must hold."""

    changes: dict[str, Any]
    named: tuple[str, ...]
    world_size: int = 1


def base(shards: str) -> dict[str, Any]:
    """A small model on a CPU; nothing is written."""
    return {
        "data.path": shards, "data.sequence_length": 32, "train.global_batch_size": 4, "tracking.enabled": False,
        "model.num_layers": 2, "model.hidden_size": 64, "model.ffn_hidden_size": 128, "model.num_attention_heads": 4,
    }  # fmt: skip


def outcome(case: Case, shards: str, folder: Path, in_file: bool) -> str:
    """ "" where the configuration is accepted, else the message; anything but ConfigurationError escapes. in_file: not as flags."""
    settings = {
        name: str(folder / value) if isinstance(value, InFolder) else value for name, value in {**base(shards), **case.changes}.items()
    }
    if in_file:
        (folder / "run.yaml").write_text(as_yaml(settings))
        args = ["--config", str(folder / "run.yaml")]
    else:
        args = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    try:
        validate(parse(args), case.world_size)
    except ConfigurationError as error:
        return str(error)
    return ""


class InFolder(str):
    """A name in the test's folder, where `prepare` has put files."""


def prepare(folder: Path) -> None:
    (folder / "file").write_text("")
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("nowhere")
    for name, manifest in {"theirs": '{"shards": 3}', "torn": '{"format_version": 1, "shards": [{"name'}.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(manifest)


def as_yaml(settings: dict[str, Any]) -> str:
    sections: dict[str, list[str]] = {}
    for name, value in settings.items():
        section, _, last = name.rpartition(".")
        sections.setdefault(section, []).append(f"{last}: {value if isinstance(value, Raw) else json.dumps(value)}")
    lines = sections.pop("", [])
    for section, inner in sections.items():
        lines += [f"{section}:", *(f"  {line}" for line in inner)]
    return "\n".join(lines) + "\n"


NOT_PRINTABLE = ["a\nb", "a\0b", "a\x7fb", "\u2028"]
TEXTS: dict[str, list[str]] = {
    "model.preset": ["7bb", "", "TINY", "tiny "],
    "data.path": [
        "",
        "no/such/place",
        InFolder("file"),
        InFolder("empty"),
        InFolder("theirs"),
        InFolder("torn"),
        "~/no/such/shards",
        "$NOWHERE/shards",
        "x" * 256,
        "x/" * 2100,
        " x",
    ],
    "checkpoint.start_from": ["no/such/run", InFolder("file"), InFolder("empty"), "~/no/such/run", "$NOWHERE/run", "x" * 256, "x "],
    "tracking.experiment": ["", "  ", "x" * 501],
    "tracking.run_name": ["a/b", "..", ".", "/", "~a", "x" * 256, "x" * 501, "\u00e4" * 128, " a"],
    "tracking.uri": ["./mlruns", "file:///tmp/mlruns", "ftp://host", "sqlite://", "sqlite:///no/such/folder/mlflow.db", "htp://host"],
    "output_dir": [InFolder("file"), InFolder("file/below"), InFolder("link"), "~/runs", "$NOWHERE/a", "x" * 256, "a\tb"],
    "notify.command": ["echo 'a", "a | | b", "if true", "x" * 140_000, " true"],
    "allow_change": ["train.stpes", "nothing", "model", "model.hidden_size", "qsparse,train.steps", "data.sequence_length", "trian"],
}
"""Wrong contents of each text, besides what cannot be printed."""
WITH = {"tracking.uri": {"tracking.enabled": True}}
"""Settings without which a field is not used."""
ANYTHING_GOES: dict[str, str] = {}
"""Text fields that no text is wrong for, and why."""
OTHERS: dict[str, list[Any]] = {
    "zero.stage": [-1, 0, 4, 10**9],
    "tracking.system_metrics_interval_s": [0, -1.0, 1e6, math.nan, math.inf],
    "tracking.drain_timeout_s": [-0.5, 1e6, math.nan, math.inf],
    "tracking.tags": [
        *map(Raw, ("3", "abc", "[]", "[a]", "null", "{a: 1}", "{a: null}", "{a: [b]}", "{1: b}", "{a: {b: c}}", "{a: b, a: c}")),
        {"": "b"}, {"a=b": "c"}, {"../a": "b"}, {"a//b": "c"}, {"x" * 251: "b"}, {"a": "b\0"}, {"a\n": "b"},
    ],
    "qsparse.recipe": [
        *map(Raw, ("3", "abc", "{}", "null", "[1]", "[null]", "[[]]", "[{keep: 0.5}]", "[{match: 3, keep: 0.5}]")),
        *map(Raw, ("[{match: '*', kep: 1}]", "[{match: '*', keep: all}]", "[{match: '*', keep: .nan}]", "[{match: '*', bitnet: 3}]")),
        Raw("[{match: '*', keep: 0.5, keep: 1}]"),
        *([{"match": match, "keep": 0.5}] for match in ("", "layer.0.*", "layers.2.*", "*.shared_down")),
        *([{"match": "*", "keep": keep}] for keep in (0, -0.5, 1.5, 1e30)),
        [{"match": "*"}], [{"match": "*", "keep": 0.5}, {"match": "*.down", "keep": 1.0}],
    ],
}  # fmt: skip
"""Fields whose wrong values follow from no range and no list of choices."""
MORE: dict[str, list[Any]] = {
    "format_version": [2], "model.num_experts": [1], "model.moe_router_topk": [1, 3], "schedule.warmup_steps": [1001],
    "model.vocab_size": [100],
}  # fmt: skip
"""Inside of the range and wrong all the same."""


def wrong_values(name: str) -> list[Any]:
    """What is wrong for this field, in whichever configuration; types apart. Fails for a field that nothing is known about."""
    kind = _inner(LEAVES[name])
    if name in OTHERS:
        return OTHERS[name]
    if kind in (int, float):
        assert name in RANGES, f"{name}: give it a range in pretrain/validation/ranges.py"
        return [*_outside(RANGES[name], kind), *MORE.get(name, [])]
    if kind is str:
        assert name in TEXTS or name in ANYTHING_GOES, f"{name}: say in TEXTS which texts are wrong for it"
        return [*TEXTS.get(name, []), *NOT_PRINTABLE]
    if typing.get_origin(kind) is Literal:
        return [Raw(text) for text in ("nonsense", "'*'", typing.get_args(kind)[0].upper(), typing.get_args(kind)[0] + "s", "1", "[]")]
    assert kind is bool, f"{name}: say in OTHERS what is wrong for it"
    return []


def wrong_types(name: str) -> list[Raw]:
    """Written values that are no value of the field's type."""
    kind = LEAVES[name]
    texts = {
        int: ["!!float 5", "!x 5", "abc", "1.5", "1e3", "true", "[1]", "{a: 1}", "nan", "0x10", "1,000", "1" * 30],
        float: ["0600", "abc", "true", "[1]", "{a: 1}", "nan", ".nan", "inf", "-.inf", "1e999", "1,5", "0.1f"],
        bool: ["yes", "off", "tRuE", "maybe", "1", "0", "[true]", "tru", "2.0"],
        str: ["!x a", "5", "1.5", "true", "null", "[a]", "{a: b}", "1e-3"],
    }.get(_inner(kind), [])
    return [Raw(text) for text in [*texts, *([] if kind is not _inner(kind) or kind is str or not texts else ["null", "~"])]]


def single_cases() -> list[tuple[Case, bool]]:
    """Each wrong value of each field, in a file or as a flag in turns."""
    cases = []
    for name, kind in LEAVES.items():
        for i, value in enumerate([*wrong_values(name), *wrong_types(name)]):
            # Any flag is text; and no argument of a program holds a NUL.
            only_in_file = (isinstance(value, Raw) and kind is str) or "\0" in str(value)
            cases.append((Case({**WITH.get(name, {}), name: value}, (name,)), only_in_file or i % 2 == 1))
    return cases


def _outside(allowed: Range, kind: type) -> list[Any]:
    if kind is int:
        return [allowed.low - 1, -(10**12), allowed.high + 1]
    edges = [allowed.low if allowed.open_low else allowed.low - 1e-3, allowed.high if allowed.open_high else allowed.high * 1.01]
    return [*edges, -1e30, math.nan, -math.inf]


def _inner(kind: Any) -> Any:
    """int | None -> int"""
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    return arguments[0] if type(None) in typing.get_args(kind) else kind


def any_single() -> st.SearchStrategy[Case]:
    """Any wrong value of any field, numbers anywhere outside of their range."""

    def of(name: str) -> st.SearchStrategy[Any]:
        kind, known = _inner(LEAVES[name]), st.sampled_from([*wrong_values(name), *wrong_types(name)])
        if name not in RANGES:
            return known
        low, high = RANGES[name].low, RANGES[name].high
        if kind is int:
            return st.one_of(known, st.integers(max_value=low - 1), st.integers(min_value=high + 1))
        return st.one_of(known, st.floats(max_value=low, exclude_max=True), st.floats(min_value=high, exclude_min=True))

    return st.sampled_from(sorted(LEAVES)).flatmap(
        lambda name: of(name).map(lambda value: Case({**WITH.get(name, {}), name: value}, (name,)))
    )


def main(shards: str, folder: str) -> None:
    """Print, as JSON, what each single wrong value is told, and whether torch came in."""
    prepare(Path(folder))
    told = []
    for case, in_file in single_cases():
        try:
            told.append(outcome(case, shards, Path(folder), in_file))
        except BaseException as error:
            told.append(f"{type(error).__name__} escaped: {error}")
    heavy = sorted({"torch", "megatron", "deepspeed", "mlflow"} & set(sys.modules))
    print(json.dumps({"told": told, "imported": heavy}))


if __name__ == "__main__":
    main(*sys.argv[1:])
