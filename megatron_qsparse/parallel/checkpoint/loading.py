"""Reads a stored state into an engine of any layout, parameter by parameter."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_qsparse.parallel.checkpoint import rng
from megatron_qsparse.parallel.checkpoint.adam import create_adam_state
from megatron_qsparse.parallel.checkpoint.places import Place, places
from megatron_qsparse.parallel.checkpoint.reading import Reader
from megatron_qsparse.parallel.checkpoint.snapshot import layout
from megatron_qsparse.parallel.checkpoint.spread import STATES, WEIGHT, Spread, part_of, spreads
from megatron_qsparse.parallel.zero import ZeroEngine


@torch.no_grad()
def load(engine: ZeroEngine, directory: Path) -> bool:
    """Read everything that `save` wrote, at whatever layout. Collective.

    Returns whether the random number generators go on where they were: True at the layout that saved (its ZeRO stage apart) and on
    its kind of device, False where they start anew from the seed and the step, as they do after the format before, which pickled
    them. Raises ValueError where the state is newer than
    this code, of another model, or holds weights only.
    """
    reader = _open(directory)
    if reader.weights_only:
        raise ValueError(f"{directory} holds weights only: a run can start from them (load_weights), but not be resumed")
    found = places(engine.model)
    _refuse(_of_all_ranks(_problems(reader, found, ("", *(f"optimizer.{kind}." for kind in STATES)))))
    _release(engine)
    create_adam_state(engine, reader.common["adam_step"])
    _load_buffers(reader, found)
    for spread in spreads(engine, found):
        _load_weight(engine, reader, spread)
        for kind in STATES:
            _load_state(engine, reader, spread, kind)
    engine.weights_changed()
    return _load_generators(engine, reader)


@torch.no_grad()
def load_weights(target: ZeroEngine | nn.Module, directory: Path) -> None:
    """Read the weights alone, of a milestone or of a whole state: for evaluation (a model) or to start a run from (an engine).

    An engine's master weights become these weights, its moments zero and its step count 0. Collective for an engine; into a
    model each rank reads for itself, so that some may and others need not. Stored weights of another precision are converted. Raises
    ValueError where they are of another model, or newer than this code.
    """
    reader = _open(directory) if isinstance(target, ZeroEngine) else Reader(directory)
    model = target.model if isinstance(target, ZeroEngine) else target
    found = places(model)
    problems = _problems(reader, found, ("",))
    _refuse(_of_all_ranks(problems) if isinstance(target, ZeroEngine) else problems)
    _load_buffers(reader, found)
    if not isinstance(target, ZeroEngine):
        for place in found:
            if place.is_parameter:
                place.tensor.data.copy_(reader.read(place, place.tensor.dtype))
        return
    _release(target)
    create_adam_state(target, step=0)
    for spread in spreads(target, found):
        _load_weight(target, reader, spread)
        for kind in STATES:
            part = part_of(target, spread, kind)
            part.copy_(_own_weights(target, spread)) if kind == "fp32" else part.zero_()
    target.weights_changed()


def _open(directory: Path) -> Reader:
    """Collective: where one rank cannot open the state, say for want of a mount, all raise, with that rank's reason."""
    reader, reason = None, []
    try:
        reader = Reader(directory)
    except (ValueError, OSError) as error:
        reason.append(str(error))
    _refuse(_of_all_ranks(reason))
    return reader


def _problems(reader: Reader, found: Iterable[Place], prefixes: Iterable[str]) -> list[str]:
    return [
        problem for place in found for prefix in (prefixes if place.is_parameter else ("",)) for problem in reader.problems(place, prefix)
    ]


def _of_all_ranks(problems: list[str]) -> list[str]:
    """What any rank misses every rank must raise, before they wait for each other's tensors."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, problems)
    return [problem for rank in ranks for problem in rank]


def _refuse(problems: list[str]) -> None:
    different = sorted(set(problems))
    if different:
        more = f"\n... and {len(different) - 10} more" if len(different) > 10 else ""
        raise ValueError("\n".join(different[:10]) + more)


def _release(engine: ZeroEngine) -> None:
    """Stage 3 keeps small parameters whole between steps: without that copy, the next forward gathers what is written here."""
    if engine.stage == 3:
        engine.optimizer.empty_partition_cache()


def _load_buffers(reader: Reader, found: Iterable[Place]) -> None:
    for place in found:
        if not place.is_parameter:
            place.tensor.copy_(reader.read(place, place.tensor.dtype))


def _load_weight(engine: ZeroEngine, reader: Reader, spread: Spread) -> None:
    param = spread.place.tensor
    whole = reader.read(spread.place, param.dtype) if spread.is_writer else None
    if engine.stage == 3:
        spread.scatter(None if whole is None else whole.view(-1), part_of(engine, spread, WEIGHT))
        return
    if whole is not None:
        param.data.copy_(whole)
    spread.broadcast(param.data)


def _load_state(engine: ZeroEngine, reader: Reader, spread: Spread, kind: str) -> None:
    """A function of its own, so that a tensor is gone before the next one is read."""
    whole = reader.read(spread.place, torch.float32, f"optimizer.{kind}.").view(-1) if spread.is_writer else None
    spread.scatter(whole, part_of(engine, spread, kind))


def _own_weights(engine: ZeroEngine, spread: Spread) -> torch.Tensor:
    """This rank's span of the weight, flat."""
    if engine.stage == 3:
        return part_of(engine, spread, WEIGHT)
    start, length = spread.span
    return spread.place.tensor.data.view(-1).narrow(0, start, length)


def _load_generators(engine: ZeroEngine, reader: Reader) -> bool:
    saved, here = reader.common.get("layout"), layout(engine)
    same = isinstance(saved, dict) and all(saved.get(name) == here[name] for name in here if name != "zero_stage")
    restored, problem = False, []
    if same:
        try:
            # None of a rank that format 2 has pickled.
            states = reader.read_bytes(rng.key(dist.get_rank()))
            restored = states is not None and rng.restore(states, engine.device)
        except ValueError as error:
            problem.append(f"{reader.directory}: {error}")
    _refuse(_of_all_ranks(problem))
    if restored:
        return True
    rng.start_anew(reader.common.get("seed", 0), reader.common["adam_step"])
    return False
