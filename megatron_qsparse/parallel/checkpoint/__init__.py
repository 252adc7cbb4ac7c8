"""The sharded state of a ZeroEngine on disk: weights, fp32 master weights, both Adam moments, the step count, generator states.

The format is that of megatron.core.dist_checkpointing: every tensor carries its place in the global one, so that it is read
back at another tensor-, pipeline-, expert- or data-parallel size and at another ZeRO stage. ZeRO's flat partitions never reach
the disk: each parameter's state is put together on the one data-parallel rank that writes it, and taken apart when it is read.

    STATE_DIRECTORY/
        __RANK_0.distcp   what a rank wrote: `KEY` working weights, `optimizer.{fp32,exp_avg,exp_avg_sq}.KEY`, `rng.RANK`
        .metadata         which part of which tensor lies where (torch.distributed.checkpoint)
        common.pt         format version, Adam's step count, seed and layout that wrote it, whether only weights are there
        metadata.json     name of the format, for dist_checkpointing.load

Files: places.py (where a parameter belongs), spread.py (what ZeRO keeps where), adam.py, rng.py, snapshot.py (the copy that a
save writes), writing.py, saver.py (in the background), reading.py, loading.py.
"""

from megatron_qsparse.parallel.checkpoint.loading import load, load_weights
from megatron_qsparse.parallel.checkpoint.saver import Output, SaveError, Saver, save
from megatron_qsparse.parallel.checkpoint.writing import FileRecord

__all__ = ["FileRecord", "Output", "SaveError", "Saver", "load", "load_weights", "save"]
