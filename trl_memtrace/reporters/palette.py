"""Colours and patterns of the categories, alike in every figure and bar.

Okabe and Ito's colours, which people of any colour vision tell apart; a pattern beside each, so that a print in grey
does too. What is unattributed is grey.
"""

from __future__ import annotations

from ..categories import Category

COLOURS: dict[Category, str] = {
    Category.WEIGHTS: "#0072b2",
    Category.GRADIENTS: "#d55e00",
    Category.OPTIMIZER_STATES: "#cc79a7",
    Category.ACTIVATIONS: "#009e73",
    Category.INPUTS: "#56b4e9",
    Category.TEMPORARIES: "#e69f00",
    Category.COMMUNICATION: "#f0e442",
    Category.UNATTRIBUTED: "#8b939c",
}

PATTERNS: dict[Category, str] = {
    Category.WEIGHTS: "",
    Category.GRADIENTS: "/",
    Category.OPTIMIZER_STATES: "|",
    Category.ACTIVATIONS: "",
    Category.INPUTS: "-",
    Category.TEMPORARIES: "\\",
    Category.COMMUNICATION: "+",
    Category.UNATTRIBUTED: "x",
}
"""In plotly's words; the solid ones, weights and activations, differ in lightness and are never neighbours."""

PATTERN_INK = "rgba(255,255,255,0.38)"

_ANGLES = {"/": (135,), "\\": (45,), "|": (90,), "-": (0,), "+": (0, 90), "x": (45, 135)}


def lighter(colour: str, share: float) -> str:
    """A colour with some white in it: ``lighter("#000000", 0.5)`` is ``"#808080"``."""
    channels = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * share):02x}" for channel in channels)


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on a colour (by WCAG's relative luminance)."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#111111"


def category_css() -> str:
    """A class for every category, ``.weights`` and so on: its colour and its pattern as a background."""
    return "\n".join(_rule(category) for category in Category)


def _rule(category: Category) -> str:
    stripes = ",".join(
        f"repeating-linear-gradient({angle}deg,{PATTERN_INK} 0 1.5px,transparent 1.5px 6px)"
        for angle in _ANGLES.get(PATTERNS[category], ())
    )
    return f".{category.value}{{background:{stripes + ' ' if stripes else ''}{COLOURS[category]}}}"
