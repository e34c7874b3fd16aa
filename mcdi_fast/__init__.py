"""mcdi_fast: neural-network weights by local consistency diffusion."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcdi_fast.bank import TrajectoryBank
    from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig
    from mcdi_fast.diffusion import make_schedule, sample_chain
    from mcdi_fast.errors import McdiError
    from mcdi_fast.generated import GeneratedWeights
    from mcdi_fast.generator import WeightGenerator
    from mcdi_fast.meta import fit
    from mcdi_fast.sampler import Sampler, StaticSampler
    from mcdi_fast.weights import WeightLayout

__all__ = [
    "DenoiserConfig",
    "DiffusionConfig",
    "GeneratedWeights",
    "McdiError",
    "MetaConfig",
    "Sampler",
    "StaticSampler",
    "TrajectoryBank",
    "WeightGenerator",
    "WeightLayout",
    "fit",
    "make_schedule",
    "sample_chain",
]

_HOMES = {
    "bank": ("TrajectoryBank",),
    "config": ("DenoiserConfig", "DiffusionConfig", "MetaConfig"),
    "diffusion": ("make_schedule", "sample_chain"),
    "errors": ("McdiError",),
    "generated": ("GeneratedWeights",),
    "generator": ("WeightGenerator",),
    "meta": ("fit",),
    "sampler": ("Sampler", "StaticSampler"),
    "weights": ("WeightLayout",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that commands can set OpenMP up before torch loads it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
