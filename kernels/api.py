"""Every kernel and its reference under one name, for scripts that use them all."""

from mcdi_fast.kernels.consistency_loss import consistency_loss, consistency_loss_ref
from mcdi_fast.kernels.denoiser import Broadcast, task_linear, task_linear_ref
from mcdi_fast.kernels.head_trajectory import head_trajectory, head_trajectory_ref
from mcdi_fast.kernels.inner_loop import InnerLoop, inner_loop_triton, inner_loop_triton_ref
from mcdi_fast.kernels.inner_update import reptile_delta, reptile_delta_ref, sgd_step_, sgd_step_ref
from mcdi_fast.kernels.meta_step import MetaStep
from mcdi_fast.kernels.noising import noising, noising_ref, noising_tables
from mcdi_fast.kernels.normal_noise import normal_noise, normal_noise_ref
from mcdi_fast.kernels.outer_update import outer_update_, outer_update_ref
from mcdi_fast.kernels.sam_adam import adam_step_, adam_step_ref, sam_ascent, sam_ascent_ref
from mcdi_fast.kernels.sample_chain import ChainWeights, pack_weights, sample_chain, sample_chain_ref

__all__ = [
    "Broadcast",
    "ChainWeights",
    "InnerLoop",
    "MetaStep",
    "adam_step_",
    "adam_step_ref",
    "consistency_loss",
    "consistency_loss_ref",
    "head_trajectory",
    "head_trajectory_ref",
    "inner_loop_triton",
    "inner_loop_triton_ref",
    "noising",
    "noising_ref",
    "noising_tables",
    "normal_noise",
    "normal_noise_ref",
    "outer_update_",
    "outer_update_ref",
    "pack_weights",
    "reptile_delta",
    "reptile_delta_ref",
    "sam_ascent",
    "sam_ascent_ref",
    "sample_chain",
    "sample_chain_ref",
    "sgd_step_",
    "sgd_step_ref",
    "task_linear",
    "task_linear_ref",
]
