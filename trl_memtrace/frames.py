"""Who owns a block when nobody can be asked: told by stacks, annotations and lifetimes. Pure numpy, no torch.

A measured step has owners; a snapshot file has none. But every torch optimizer steps through one wrapper in
``torch/optim/optimizer.py``, autograd's engine has functions of its own, and what was there before the history and
never went away is what is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .attribution import Books, Span
from .categories import CATEGORY_CODE, PHASE_CODE, PHASES, Category, Phase, role
from .ledger import NEVER, BoolArray, Int64Array
from .recorders.snapshot import DeviceHistory

_OPTIMIZER, _ENGINE, _FORWARD, _LOAD, _CHECKPOINT, _PYTHON, _WORKSPACE, _ZERO = (1 << bit for bit in range(8))
_WORKSPACES = ("getCurrentCUDABlasHandle", "getNewWorkspace", "getCUDABlasLtWorkspace", "getNewCUDABlasLtWorkspace")
_LOADERS = frozenset(
    ("_apply", "load_state_dict", "from_pretrained", "_load_pretrained_model", "_load_state_dict_into_meta_model")
)
_LIBRARIES = ("site-packages/", "dist-packages/", "/lib/python", "<frozen", "<string>")


@dataclass(frozen=True, slots=True)
class CallSite:
    """A line of code, and what the memory that it asked for came to at the peak."""

    where: str
    function: str
    category: Category
    bytes: int
    blocks: int


def attribute_by_frames(history: DeviceHistory, annotations: Sequence[Any] = ()) -> Books:
    """Tag every block of a snapshot's history.

    Rules, first match wins:

    1. Made for cuBLAS to work in: a temporary, though it stays.
    2. There before the history, and never gone: weights. Gone within it: a gradient where ``zero_grad`` let it go,
       optimizer state where an optimizer's step did (it put another in its place), an activation where a backward did,
       else unattributed.
    3. Born in an optimizer's step: optimizer state where it outlives the step, else a temporary.
    4. Born in the backward: a recomputed activation where checkpointing runs a forward again; a gradient where it
       outlives the backward; else a temporary.
    5. Born elsewhere, and alive when a backward began: weights where it outlives every backward and was made by
       loading, or by nobody's forward; else an activation.
    6. Gone by the end: a temporary of its phase.
    7. Never gone: weights where it was made by loading, an activation where it was made in a forward, else
    unattributed.

    Args:
        history: one device's history.
        annotations: the file's ``external_annotations``: they name the optimizer's steps where stacks do not.
    """
    ledger = history.ledger
    events = len(ledger.time_ns)
    masks = _stack_masks(history.frames)
    zeroing, stepping = (
        _annotated(annotations, history.time_us, "Optimizer.zero_grad"),
        _annotated(annotations, history.time_us, "Optimizer.step"),
    )
    phase = _phases(masks, stepping)
    spans = _spans(phase, events)

    born, died = ledger.born, ledger.died
    before = born == 0
    gone = died != NEVER
    maker = np.clip(born - 1, 0, max(events - 1, 0))
    ender = np.clip(np.where(gone, died, 1) - 1, 0, max(events - 1, 0))
    idle = PHASE_CODE[Phase.IDLE]
    born_phase = np.where(before, idle, phase[maker]) if events else np.full(len(born), idle)
    died_phase = np.where(gone, phase[ender], idle) if events else np.full(len(born), idle)
    born_mask = np.where(before, 0, masks[maker]) if events else np.zeros(len(born), np.int64)
    died_zeroing = gone & (zeroing | ((masks & _ZERO) != 0))[ender] if events else np.zeros(len(born), np.bool_)

    ends = _span_ends(spans, born)
    starts = np.array([span.start for span in spans if span.phase is Phase.BACKWARD], np.int64)
    finish = max((span.end for span in spans if span.phase is Phase.BACKWARD), default=-1)
    next_backward = np.append(starts, NEVER)[np.searchsorted(starts, born, side="left")]
    through_backward = (next_backward != NEVER) & (died > next_backward)

    category = np.full(len(born), CATEGORY_CODE[Category.UNATTRIBUTED], np.int64)
    detail = np.full(len(born), "during_step", dtype=object)
    detail[before] = "before_step"

    def put(where: BoolArray, what: Category, how: str) -> None:
        free = where & (category == CATEGORY_CODE[Category.UNATTRIBUTED])
        category[free] = CATEGORY_CODE[what]
        detail[free] = how

    in_optimizer = ~before & (born_phase == PHASE_CODE[Phase.OPTIMIZER])
    in_backward = ~before & (born_phase == PHASE_CODE[Phase.BACKWARD])
    elsewhere = ~before & ~in_optimizer & ~in_backward
    loading = elsewhere & ((born_mask & _LOAD) != 0) & ((born_mask & _FORWARD) == 0)
    kept = ~gone & (finish >= 0) & (born <= finish)
    outside_forward = elsewhere & ((born_mask & _FORWARD) == 0) & ((born_mask & _PYTHON) != 0)
    put((born_mask & _WORKSPACE) != 0, Category.TEMPORARIES, "workspace")
    put(before & ~gone, Category.WEIGHTS, "before_step")
    put(before & died_zeroing, Category.GRADIENTS, "before_step")
    put(before & gone & (died_phase == PHASE_CODE[Phase.OPTIMIZER]), Category.OPTIMIZER_STATES, "before_step")
    put(before & gone & (died_phase == PHASE_CODE[Phase.BACKWARD]), Category.ACTIVATIONS, "before_step")
    put(in_optimizer & (died > ends), Category.OPTIMIZER_STATES, "state")
    put(in_optimizer, Category.TEMPORARIES, Phase.OPTIMIZER.value)
    put(in_backward & ((born_mask & _CHECKPOINT) != 0) & gone, Category.ACTIVATIONS, "recomputed")
    put(in_backward & (died > ends), Category.GRADIENTS, "gradient")
    put(in_backward, Category.TEMPORARIES, Phase.BACKWARD.value)
    put(loading & ~gone, Category.WEIGHTS, "loaded")
    put(kept & outside_forward & through_backward, Category.WEIGHTS, "made")
    put(elsewhere & through_backward, Category.ACTIVATIONS, "other")
    put(elsewhere & ~gone & ((born_mask & _FORWARD) != 0), Category.ACTIVATIONS, "other")
    for each in PHASES:
        put(elsewhere & gone & (born_phase == PHASE_CODE[each]), Category.TEMPORARIES, each.value)

    names: dict[str, int] = {}
    role_code = np.array(
        [
            names.setdefault(role(list(Category)[code], how), len(names))
            for code, how in zip(category.tolist(), detail.tolist(), strict=True)
        ],
        np.int64,
    )
    nowhere = np.zeros(len(born), np.int64)
    return Books(ledger, spans, category, role_code, nowhere, tuple(names), ("",))


def call_sites(history: DeviceHistory, books: Books, instant: int, *, user_only: bool = False) -> list[CallSite]:
    """The lines of code that asked for what is alive at an instant, the largest first.

    Args:
        history: where the stacks are.
        books: the tags.
        instant: when.
        user_only: the innermost line outside installed libraries, in place of the innermost line of Python.
    """
    ledger = books.ledger
    alive = np.flatnonzero(ledger.alive(instant) & (ledger.born > 0))
    sizes: Counter[tuple[str, str, int]] = Counter()
    blocks: Counter[tuple[str, str, int]] = Counter()
    known: dict[int, tuple[str, str]] = {}
    for block in alive.tolist():
        stack = history.frames[int(ledger.born[block]) - 1]
        site = known.get(id(stack))
        if site is None:
            site = known[id(stack)] = _site(stack, user_only)
        key = (*site, int(books.category[block]))
        sizes[key] += int(ledger.size[block])
        blocks[key] += 1
    categories = list(Category)
    return [
        CallSite(where, function, categories[code], size, blocks[where, function, code])
        for (where, function, code), size in sizes.most_common()
    ]


def _site(stack: Sequence[Any], user_only: bool) -> tuple[str, str]:
    python = [frame for frame in stack if isinstance(frame, dict) and str(frame.get("filename", "")).endswith(".py")]
    if user_only:
        python = [frame for frame in python if not any(part in str(frame["filename"]) for part in _LIBRARIES)]
    if python:
        frame = python[0]
        return f"{frame['filename']}:{frame.get('line', 0)}", str(frame.get("name", "?"))
    engine = any(_frame_mask(frame) & _ENGINE for frame in stack)
    return ("(autograd engine)" if engine else "(no Python frame)"), ""


def _stack_masks(frames: Sequence[Sequence[Any]]) -> Int64Array:
    """What each event's stack says, as bits."""
    of_frame: dict[int, int] = {}
    of_stack: dict[int, int] = {}
    masks = np.zeros(len(frames), np.int64)
    for index, stack in enumerate(frames):
        key = id(stack)
        mask = of_stack.get(key)
        if mask is None:
            mask = 0
            for frame in stack:
                bits = of_frame.get(id(frame))
                if bits is None:
                    bits = of_frame[id(frame)] = _frame_mask(frame)
                mask |= bits
            of_stack[key] = mask
        masks[index] = mask
    return masks


def _frame_mask(frame: Any) -> int:
    if not isinstance(frame, Mapping):
        return 0
    name, file = str(frame.get("name", "")), str(frame.get("filename", "")).replace("\\", "/")
    if not file.endswith(".py"):
        if any(workspace in name for workspace in _WORKSPACES):
            return _WORKSPACE
        return _ENGINE if "torch::autograd::Engine::" in name or "PythonEngine::" in name else 0
    mask = _PYTHON
    if file.endswith("torch/optim/optimizer.py") and name == "wrapper":
        mask |= _OPTIMIZER
    elif file.endswith("torch/utils/checkpoint.py"):
        mask |= _CHECKPOINT
    elif file.endswith("torch/nn/modules/module.py") and name in ("_call_impl", "_wrapped_call_impl"):
        mask |= _FORWARD
    if name == "zero_grad" and "torch/" in file:
        mask |= _ZERO
    if name in _LOADERS:
        mask |= _LOAD
    return mask


def _phases(masks: Int64Array, stepping: BoolArray) -> Int64Array:
    """The phase of every event. On CUDA autograd's thread has no Python stack: where others have one, an empty one is
    its."""
    code = np.full(len(masks), PHASE_CODE[Phase.IDLE], np.int64)
    code[(masks & _FORWARD) != 0] = PHASE_CODE[Phase.FORWARD]
    code[((masks & _LOAD) != 0) & ((masks & _FORWARD) == 0)] = PHASE_CODE[Phase.LOAD]
    engine = (masks & _ENGINE) != 0
    if masks.any():
        engine |= masks == 0
    code[engine] = PHASE_CODE[Phase.BACKWARD]
    code[((masks & _OPTIMIZER) != 0) | stepping] = PHASE_CODE[Phase.OPTIMIZER]
    return code


def _annotated(annotations: Sequence[Any], time_us: Int64Array, name: str) -> BoolArray:
    """Which events fall into an annotated range whose name begins so."""
    inside = np.zeros(len(time_us), np.bool_)
    started: dict[str, list[int]] = {}
    for row in annotations if isinstance(annotations, (list, tuple)) else ():
        if not isinstance(row, dict) or type(row.get("time_us")) is not int:
            continue
        title = str(row.get("name", ""))
        if not title.startswith(name):
            continue
        if row.get("stage") == "START":
            started.setdefault(title, []).append(row["time_us"])
        elif row.get("stage") == "END" and started.get(title):
            inside |= (time_us >= started[title].pop()) & (time_us <= row["time_us"])
    return inside


def _spans(phase: Int64Array, events: int) -> tuple[Span, ...]:
    """Stretches of equal phase, as instants."""
    if not events:
        return (Span(Phase.IDLE, 0, 0),)
    starts = np.flatnonzero(np.diff(phase, prepend=-1))
    ends = np.append(starts[1:], events)
    return tuple(
        Span(PHASES[int(phase[start])], int(start), int(end)) for start, end in zip(starts, ends, strict=True)
    )


def _span_ends(spans: Sequence[Span], born: Int64Array) -> Int64Array:
    """The end of the stretch that each block was born in."""
    starts = np.array([span.start for span in spans], np.int64)
    ends = np.array([span.end for span in spans], np.int64)
    return ends[np.maximum(np.searchsorted(starts, born, side="left") - 1, 0)]
