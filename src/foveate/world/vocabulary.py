"""The words of the world: what sprites can be, where they can be, which questions exist."""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart")
#: Name -> RGB. Far apart from each other and from the dull backgrounds.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "green": (30, 168, 62),
    "blue": (36, 66, 232),
    "yellow": (240, 222, 36),
    "purple": (142, 40, 190),
    "orange": (242, 128, 18),
    "cyan": (40, 208, 222),
    "white": (244, 244, 244),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "big")
DIGITS = tuple("0123456789")
WORDS = ("cat", "dog", "sun", "map", "key", "box", "jet", "fly", "ice", "owl", "web", "zip")
#: Regions by row and column of a 3 x 3 grid.
REGIONS = (
    ("top-left", "top", "top-right"),
    ("left", "center", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
TIMES = ("early", "middle", "late")
COUNTS = ("1", "2", "3", "4", "5")
#: Task -> what it asks for, and what a reduction may destroy of it.
TASKS: dict[str, str] = {
    "what": "color or shape of the only such object",
    "where": "region of an object that stays in place",
    "count": "how many small objects of one shape there are",
    "direction": "which way an object moves",
    "order": "which of two visitors comes first",
    "when": "whether a visitor comes early, in the middle or late",
    "reading": "a digit or a short word on a sign: fine detail",
    "needle": "what is visible for one or two frames only",
    "change": "what appears for good, or disappears",
    "moving": "whether an object moves or stays in place",
}
#: Tasks that one frame, or the question alone, cannot answer better than by guessing.
TEMPORAL_TASKS = ("direction", "order", "when", "needle", "change", "moving")
