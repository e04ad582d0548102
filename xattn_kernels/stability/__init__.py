"""Tools that keep cross-attention stable in training; the package exports all of them as well."""

from .clipping import AdaptiveClip, clip_gradients
from .initialisers import (
    gates_,
    small_queries_,
    xavier_,
    zero_outputs_,
)
from .layers import attention_statistics
from .monitor import StabilityMonitor
from .parameters import (
    Frozen,
    freeze,
    gate_parameters,
    optimizer_groups,
    xattn_parameters,
)
from .report import StabilityReport, StabilityWarning, Thresholds
from .schedules import (
    AttentionDropout,
    LayerwiseWarmup,
    cross_attention_layers,
    warmup_cosine,
)
from .training import (
    BlindBaseline,
    DatasetMixture,
    Stage,
    alignment_stage,
    blind_baseline,
    generation_stage,
)
from .writers import TensorBoardWriter, WandbWriter

__all__ = [
    "AdaptiveClip",
    "AttentionDropout",
    "BlindBaseline",
    "DatasetMixture",
    "Frozen",
    "LayerwiseWarmup",
    "StabilityMonitor",
    "StabilityReport",
    "StabilityWarning",
    "Stage",
    "TensorBoardWriter",
    "Thresholds",
    "WandbWriter",
    "alignment_stage",
    "attention_statistics",
    "blind_baseline",
    "clip_gradients",
    "cross_attention_layers",
    "freeze",
    "gate_parameters",
    "gates_",
    "generation_stage",
    "optimizer_groups",
    "small_queries_",
    "warmup_cosine",
    "xattn_parameters",
    "xavier_",
    "zero_outputs_",
]
