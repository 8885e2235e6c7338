"""The algebra: tokens, reductions, budgets, methods, recipes and reports."""

from foveate.core.backbone import (
    BackboneContext,
    BackboneKind,
    BackboneMethod,
    backbone_context,
)
from foveate.core.budget import Budget
from foveate.core.card import STAGES, Card, Kind, Stage
from foveate.core.context import (
    SIGNALS,
    AttentionView,
    CacheContext,
    Context,
    DecoderContext,
    EncoderContext,
    EncoderPoint,
    LayerModule,
    ModuleContext,
    ProjectorContext,
)
from foveate.core.dense import DensePrediction
from foveate.core.encoder_attention import EncoderAttentionView
from foveate.core.evidence import Evidence, EvidenceKind, Notebook, merged_groups
from foveate.core.frames import FramePlan, FramesContext
from foveate.core.grid import Grid, Modality, Plane, TokenKind
from foveate.core.joining import join_rows, split_rows
from foveate.core.method import Count, Method, blocks_run, relative_layer
from foveate.core.newlines import NewlinePolicy, with_newlines, with_special
from foveate.core.patches import PatchesContext
from foveate.core.planes import (
    average_cells,
    by_rank_in_planes,
    count_by_plane,
    frames_of,
    merge_by_anchor,
    merge_by_plane,
    take_planes,
)
from foveate.core.presets import PRESETS, Preset
from foveate.core.recipe import Recipe
from foveate.core.reduction import Reduction
from foveate.core.registry import METHODS, get_method, list_methods, register_method
from foveate.core.report import ItemReport, Report, StageReport
from foveate.core.rule import AttentionRule, RuleContext
from foveate.core.search import SearchRange
from foveate.core.selector import PatchSelector, PlaneSelector
from foveate.core.spread import Spread, spread
from foveate.core.step import Step
from foveate.core.storage import CacheStorage
from foveate.core.timeline import TIMED_STAGES, Span, Timeline
from foveate.core.tokens import Tokens

__all__ = [
    "METHODS",
    "PRESETS",
    "SIGNALS",
    "STAGES",
    "TIMED_STAGES",
    "AttentionRule",
    "AttentionView",
    "BackboneContext",
    "BackboneKind",
    "BackboneMethod",
    "Budget",
    "CacheContext",
    "CacheStorage",
    "Card",
    "Context",
    "Count",
    "DecoderContext",
    "DensePrediction",
    "EncoderAttentionView",
    "EncoderContext",
    "EncoderPoint",
    "Evidence",
    "EvidenceKind",
    "FramePlan",
    "FramesContext",
    "Grid",
    "ItemReport",
    "Kind",
    "LayerModule",
    "Method",
    "Modality",
    "ModuleContext",
    "NewlinePolicy",
    "Notebook",
    "PatchSelector",
    "PatchesContext",
    "Plane",
    "PlaneSelector",
    "Preset",
    "ProjectorContext",
    "Recipe",
    "Reduction",
    "Report",
    "RuleContext",
    "SearchRange",
    "Span",
    "Spread",
    "Stage",
    "StageReport",
    "Step",
    "Timeline",
    "TokenKind",
    "Tokens",
    "average_cells",
    "backbone_context",
    "blocks_run",
    "by_rank_in_planes",
    "count_by_plane",
    "frames_of",
    "get_method",
    "join_rows",
    "list_methods",
    "merge_by_anchor",
    "merge_by_plane",
    "merged_groups",
    "register_method",
    "relative_layer",
    "split_rows",
    "spread",
    "take_planes",
    "with_newlines",
    "with_special",
]
