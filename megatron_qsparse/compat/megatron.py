"""What differs between the versions of Megatron-Core that this project runs with."""

import functools
from collections.abc import Callable

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec


def mlp_spec(submodules: MLPSubmodules) -> ModuleSpec | Callable:
    """A layer's plain MLP. 0.16 takes a ModuleSpec; 0.19 a callable, and rewrites a ModuleSpec with a warning for every layer
    (transformer_layer.py line 421 in 0.19.2).
    """
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)
