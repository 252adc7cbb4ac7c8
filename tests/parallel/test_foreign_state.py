"""A state that somebody else has written is read without running what it names."""

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_qsparse.parallel.metadata import METADATA_NAME, read_contents, read_metadata
from pretrain.checkpoint.tensors import read_tensors
from pretrain.yaml_text import Loader
from tests import malice
from tests.parallel.helpers import gather, layout
from tests.parallel.training import Case, make_engine, take_step

CASE = Case(precision="bf16")
PLACES = {"metadata": malice.in_metadata, "tensors": malice.in_tensors, "common": malice.in_common}


def _save(rank: int, state: Path) -> dict[str, torch.Tensor]:
    from megatron_qsparse.parallel import checkpoint

    state.mkdir()
    with layout() as parallel:
        engine = make_engine(CASE, parallel)
        take_step(engine, 0)
        checkpoint.save(engine, state)
        return gather(engine.model)


@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A state of one process, and its weights."""
    state = tmp_path_factory.mktemp("foreign") / "state"
    return state, pool.run(_save, 1, state)[0]


@pytest.fixture
def state(whole, tmp_path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(whole[0], tmp_path / "state"))


def _try(rank: int, states: list[Path]) -> list[list[str]]:
    """What loading says of each, as a whole, as weights of an engine and as weights of a model."""
    from megatron_qsparse.parallel import checkpoint

    with layout() as parallel:
        engine, found = make_engine(CASE, parallel), []
        for state in states:
            found.append([])
            for read in (checkpoint.load, checkpoint.load_weights, lambda engine, state: checkpoint.load_weights(engine.model, state)):
                try:
                    read(engine, state)
                except ValueError as error:
                    found[-1].append(str(error))
    return found


def test_no_road_into_a_state_runs_code(pool, whole, tmp_path):
    canary, states, named = tmp_path / "canary", [], []
    for place, harm in PLACES.items():
        for name, (attack, refused) in malice.attacks(canary).items():
            state = Path(shutil.copytree(whole[0], tmp_path / f"{place} {name}"))
            harm(state, attack)
            states.append(state)
            named.append((state / {"metadata": ".metadata", "tensors": "__0_0.distcp", "common": "common.pt"}[place], refused))
    for (file, refused), errors in zip(named, pool.run(_try, 1, states)[0], strict=True):
        assert len(errors) == 3, file
        assert all(str(file) in error and refused in error and "nothing of it was run" in error for error in errors), errors
    assert not canary.exists()
    # The attack is a real one: torch's own reader falls for it.
    FileSystemReader(str(tmp_path / "metadata getattr")).read_metadata()
    assert canary.exists()


def test_comparing_states_runs_no_code_either(whole, state, tmp_path):
    name = "embedding.word_embeddings.weight"
    assert torch.equal(read_tensors(whole[0].parent)[name], whole[1][name])
    attack, refused = malice.attacks(tmp_path / "canary")["getattr"]
    malice.in_metadata(state, attack)
    with pytest.raises(ValueError, match=refused):
        read_tensors(state.parent)
    assert not (tmp_path / "canary").exists()


def test_what_is_stored_otherwise_than_the_contents_say_is_refused_in_words(pool, whole, tmp_path):
    def without_places(metadata: Metadata) -> None:
        metadata.storage_data = {}

    states = [Path(shutil.copytree(whole[0], tmp_path / name)) for name in ("shape", "places", "cut", "object")]
    malice.in_tensors(states[0], torch.zeros(3))
    malice.in_tensors(states[3], {"no": "tensor"})
    malice.rewrite_metadata(states[1], without_places)
    (states[2] / "__0_0.distcp").write_bytes((states[2] / "__0_0.distcp").read_bytes()[:100])
    found = pool.run(_try, 1, states)[0]
    for state, file, errors in zip(states, ("__0_0.distcp", METADATA_NAME, "__0_0.distcp", "__0_0.distcp"), found, strict=True):
        assert len(errors) == 3 and all(error.startswith(f"{state / file} cannot be read (") for error in errors), errors


def test_what_describes_a_state_wrongly_is_refused_in_words(pool, whole, tmp_path):
    def common(**changes: object):
        return lambda state: torch.save(torch.load(state / "common.pt") | changes, state / "common.pt")

    harms = {
        "version": (common(format_version="x"), "tells neither a format version nor Adam's step count"),
        "step": (common(adam_step=None), "tells neither a format version nor Adam's step count"),
        "key": (lambda state: (state / "metadata.json").write_text('{"other": 1}'), "its metadata.json cannot be read"),
        "json": (lambda state: (state / "metadata.json").write_text("{"), "its metadata.json cannot be read"),
    }
    states = []
    for name, (harm, _) in harms.items():
        states.append(Path(shutil.copytree(whole[0], tmp_path / name)))
        harm(states[-1])
    # The generators of a layout that is not told start anew.
    states.append(Path(shutil.copytree(whole[0], tmp_path / "layout")))
    common(layout={"world_size": 1})(states[-1])
    *told, fine = pool.run(_try, 1, states)[0]
    for (_, words), found in zip(harms.values(), told, strict=True):
        assert len(found) == 3 and all(words in text for text in found), (words, found)
    assert fine == []


def _load_pickled_generators(rank: int, state: Path) -> dict:
    from megatron_qsparse.parallel import checkpoint

    with layout() as parallel:
        engine = make_engine(CASE, parallel)
        return {"restored": checkpoint.load(engine, state), "weights": gather(engine.model)}


def test_generators_that_the_format_before_has_pickled_are_left_aside(pool, whole, state, tmp_path):
    canary = tmp_path / "canary"
    attack, _ = malice.attacks(canary)["plain"]
    content = malice.saved([attack])
    (state / "__0_1.distcp").write_bytes(content)

    def pickled(metadata: Metadata) -> None:
        del metadata.state_dict_metadata["rng.0"]
        metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != "rng.0"}
        metadata.state_dict_metadata["rng/shard_0_1"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("rng/shard_0_1")] = _StorageInfo("__0_1.distcp", 0, len(content))

    malice.rewrite_metadata(state, pickled)
    torch.save(torch.load(state / "common.pt") | {"format_version": 2}, state / "common.pt")
    [found] = pool.run(_load_pickled_generators, 1, state)
    assert found["restored"] is False and not canary.exists()
    assert all(torch.equal(found["weights"][name], weight) for name, weight in whole[1].items())


def test_the_contents_are_those_that_torch_reads(state):
    torchs, ours = FileSystemReader(str(state)).read_metadata(), read_metadata(state)
    assert (ours.state_dict_metadata, ours.storage_data, ours.version) == (torchs.state_dict_metadata, torchs.storage_data, torchs.version)
    assert read_contents(state).objects == () and read_contents(state).tensors["rng.0"].dtype == "uint8"


def _elsewhere(metadata: Metadata) -> None:
    metadata.storage_data = {index: replace(info, relative_path="../secret") for index, info in metadata.storage_data.items()}


CHANGES = {
    "a file outside": (_elsewhere, "'../secret' is no file in the directory of the state"),
    "another object": (lambda metadata: metadata.state_dict_metadata.update(x=metadata.storage_meta), "StorageMeta in place of"),
    "no number": (lambda metadata: setattr(metadata, "storage_data", {1: 2}), "int in place of MetadataIndex"),
    "no dict": (lambda metadata: setattr(metadata, "state_dict_metadata", [1]), "list in place of dict"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_contents_that_are_not_in_order_are_refused(change, state):
    harm, words = CHANGES[change]
    malice.rewrite_metadata(state, harm)
    with pytest.raises(ValueError, match=words) as caught:
        read_contents(state)
    assert str(state / METADATA_NAME) in str(caught.value)


# BUILD of a class itself would change it for the whole process; the others are damage.
BUILD_A_CLASS = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}(X\x08\x00\x00\x00__init__I1\nub."


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", pickle.dumps(3), pickle.dumps(Metadata)[:-5], BUILD_A_CLASS])
def test_what_is_no_table_of_contents_is_refused(content, state):
    (state / METADATA_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="is no table of contents of a state"):
        read_contents(state)


UNSAFE = re.compile(
    r"pickle\.loads?\(|torch\.load\((?!.*weights_only=True)|yaml\.(unsafe_|full_)?load\(|allow_pickle=True|read_metadata\(\)|FileSystemReader\("
)
"""What would run code of whoever wrote a file."""


def test_nothing_that_is_shipped_reads_files_otherwise():
    root = Path(__file__).parents[2]
    sources = [path for package in ("megatron_qsparse", "pretrain", "data_tools") for path in (root / package).rglob("*.py")]
    lines = [(path, line) for path in sources for line in path.read_text().splitlines() if UNSAFE.search(line)]
    # Those that are our own readers'.
    ours = {"self._metadata = self._files.read_metadata()", "return yaml.load(text, Loader=Loader)"}
    assert {line.strip() for _, line in lines} == ours and len(lines) == 2 and len(sources) > 100
    assert issubclass(Loader, yaml.SafeLoader) and Loader.yaml_constructors is yaml.SafeLoader.yaml_constructors
