"""The vocabulary: what memory is for, and when in a training step it was asked for.

Every source (a measured step, a dry run, a snapshot file) and every reporter speaks these words.
"""

from __future__ import annotations

import enum


class Category(str, enum.Enum):
    """What a block of memory is for. The categories of a step add up to what the allocator reports."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER_STATES = "optimizer_states"
    ACTIVATIONS = "activations"
    INPUTS = "inputs"
    TEMPORARIES = "temporaries"
    COMMUNICATION = "communication"
    UNATTRIBUTED = "unattributed"

    __str__ = str.__str__
    __hash__ = str.__hash__


class Phase(str, enum.Enum):
    """Which part of a training run was under way."""

    LOAD = "load"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    ROLLOUT = "rollout"
    EVALUATE = "evaluate"
    SAVE = "save"
    IDLE = "idle"

    __str__ = str.__str__
    __hash__ = str.__hash__


CATEGORIES: tuple[Category, ...] = tuple(Category)
PHASES: tuple[Phase, ...] = tuple(Phase)

CATEGORY_CODE: dict[Category, int] = {category: code for code, category in enumerate(CATEGORIES)}
PHASE_CODE: dict[Phase, int] = {phase: code for code, phase in enumerate(PHASES)}

ROLE_SEPARATOR = "/"

BUCKETS = "buckets"
"""What gradients are reduced in: a role of communication."""


def role(category: Category, detail: str) -> str:
    """A refinement of a category, as it stands in a record: ``weights/frozen``."""
    return category + ROLE_SEPARATOR + detail
