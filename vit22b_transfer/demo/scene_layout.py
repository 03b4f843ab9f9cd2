"""The drawn scene: its configuration, its objects, and its pixels.

Objects stand on a jittered grid, one per cell, never overlapping. A scene is sampled
from a numpy generator that the caller seeds, so it is a pure function of that seed.
"""

import dataclasses
import difflib
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from vit22b_transfer import UserError

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (40, 84, 222),
    "yellow": (243, 206, 30),
    "purple": (158, 60, 200),
    "black": (28, 28, 28),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
SIZES = ("small", "large")
QUESTION_TYPES = ("color", "shape", "size", "count", "exists", "relation", "compare")

_RADIUS = {"small": 0.27, "large": 0.41}  # of a cell; 17 and 26 px across at 64 px
_MAX_JITTER = 0.12  # of a cell
_SUPERSAMPLING = 4
# Bounds on the description length: four objects still fit in a 14-word caption.
_MAX_OBJECTS = 4


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """How hard the scenes are: what may stand in them and what is asked about them.

    `held_out_pairs` are (color, shape) pairs that occur, in pixels or in words, only in
    the compositional test split. Every color and shape must occur in some other pair.
    """

    image_size: int = 64
    grid: int = 2
    min_objects: int = 1
    max_objects: int = 3
    colors: tuple[str, ...] = tuple(COLORS)
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross")
    held_out_pairs: tuple[tuple[str, str], ...] = (
        ("red", "circle"),
        ("green", "square"),
        ("blue", "triangle"),
        ("yellow", "cross"),
    )
    question_types: tuple[str, ...] = QUESTION_TYPES
    questions_per_image: int = 3
    jpeg_quality: int = 95

    def __post_init__(self):
        if self.image_size < 64:
            raise UserError(
                f"image_size is {self.image_size}: scenes need at least 64 pixels "
                "a side to stay readable."
            )
        most = min(self.grid**2, _MAX_OBJECTS)
        if not 1 <= self.min_objects <= self.max_objects <= most:
            raise UserError(
                f"min_objects={self.min_objects}, max_objects={self.max_objects} must "
                f"satisfy 1 <= min_objects <= max_objects <= {most} on a grid of "
                f"{self.grid}x{self.grid} cells (never more than {_MAX_OBJECTS})."
            )
        _check_names("colors", self.colors, COLORS)
        _check_names("shapes", self.shapes, SHAPES)
        _check_names("question_types", self.question_types, QUESTION_TYPES)
        if not 1 <= self.questions_per_image <= min(9, len(self.question_types)):
            raise UserError(
                f"questions_per_image is {self.questions_per_image}; each question of "
                "an image is of another type, so it must lie between 1 and the number "
                f"of question_types, {len(self.question_types)}."
            )
        if self.max_objects < 2 and {"relation", "compare"} & set(self.question_types):
            raise UserError(
                "question_types 'relation' and 'compare' need max_objects >= 2."
            )
        for color, shape in self.held_out_pairs:
            _check_names("held_out_pairs (colors)", (color,), self.colors)
            _check_names("held_out_pairs (shapes)", (shape,), self.shapes)
        for position, kind in enumerate(("color", "shape")):
            seen = {pair[position] for pair in self.ordinary_pairs}
            lost = set((self.colors, self.shapes)[position]) - seen
            if lost:
                raise UserError(
                    f"held_out_pairs leave no training pair with {kind} "
                    f"{sorted(lost)}; hold out fewer pairs."
                )
        if len(self.ordinary_pairs) < self.max_objects + 1:
            raise UserError(
                f"only {len(self.ordinary_pairs)} color-shape pairs remain for "
                f"training; at least {self.max_objects + 1} are needed: add colors or "
                "shapes."
            )

    @property
    def ordinary_pairs(self) -> tuple[tuple[str, str], ...]:
        """All (color, shape) pairs that are not held out."""
        return tuple(
            (color, shape)
            for color in self.colors
            for shape in self.shapes
            if (color, shape) not in self.held_out_pairs
        )


def _check_names(field, names, known):
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(
                f"unknown name {name!r} in {field}; known are {', '.join(known)}.{hint}"
            )
    if not names or len(set(names)) != len(names):
        raise UserError(f"{field} must be distinct and not empty, got {names}.")


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object; `x`, `y` are its centre and `radius` its extent, in pixels."""

    color: str
    shape: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    rotation: float

    @property
    def pair(self) -> tuple[str, str]:
        """The object's (color, shape), unique within a scene."""
        return (self.color, self.shape)

    @property
    def name(self) -> str:
        """The object's color and shape in words."""
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in reading order (by row, then column) on a plain background."""

    image_size: int
    grid: int
    background: tuple[int, int, int]
    objects: tuple[SceneObject, ...]

    def is_beyond(self, one: SceneObject, other: SceneObject, direction: str) -> bool:
        """Whether `one` is clearly left of, right of, above or below `other`.

        Clearly: by more than half a grid cell, which jitter can neither make nor undo.
        """
        margin = 0.5 * self.image_size / self.grid
        shift = {
            "left of": other.x - one.x,
            "right of": one.x - other.x,
            "above": other.y - one.y,
            "below": one.y - other.y,
        }
        return shift[direction] > margin


def sample_scene(
    rng: np.random.Generator, config: SceneConfig, *, held_out: bool
) -> Scene:
    """A random scene; with `held_out`, at least one object has a held-out pair."""
    pairs = _sample_pairs(rng, config, held_out=held_out)
    cells = rng.permutation(config.grid**2)[: len(pairs)]
    objects = [
        _place(rng, config, pair, int(cell))
        for pair, cell in zip(pairs, cells, strict=True)
    ]
    objects.sort(key=lambda o: (o.row, o.column))
    level = int(rng.integers(222, 248))
    tint = rng.integers(-6, 7, size=3)
    red, green, blue = (int(level + t) for t in tint)
    return Scene(config.image_size, config.grid, (red, green, blue), tuple(objects))


def _sample_pairs(rng, config, *, held_out):
    count = int(rng.integers(config.min_objects, config.max_objects + 1))
    pairs = list(config.ordinary_pairs)
    first = pairs[rng.integers(len(pairs))]
    if held_out:
        first = config.held_out_pairs[rng.integers(len(config.held_out_pairs))]
        pairs += config.held_out_pairs
    # Half of the scenes repeat one shape or color, so that counts above 1 are common.
    theme = rng.integers(4)
    if theme < 2:
        alike = [pair for pair in pairs if pair[theme] == first[theme]]
        pairs = alike if len(alike) >= count else pairs
    rest = [pair for pair in pairs if pair != first]
    chosen = rng.permutation(len(rest))[: count - 1]
    return [first, *(rest[i] for i in chosen)]


def _place(rng, config, pair, cell):
    row, column = divmod(cell, config.grid)
    side = config.image_size / config.grid
    size = SIZES[rng.integers(2)]
    radius = _RADIUS[size]
    slack = min(0.5 - radius, _MAX_JITTER)
    jitter_x, jitter_y = rng.uniform(-slack, slack, size=2)
    return SceneObject(
        color=pair[0],
        shape=pair[1],
        size=size,
        row=row,
        column=column,
        x=float((column + 0.5 + jitter_x) * side),
        y=float((row + 0.5 + jitter_y) * side),
        radius=radius * side,
        rotation=float(rng.uniform(-0.2, 0.2)),
    )


def draw(scene: Scene) -> UInt8[np.ndarray, "side side 3"]:
    """The scene's pixels, antialiased by supersampling."""
    side = scene.image_size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(image)
    for thing in scene.objects:
        x, y = thing.x * _SUPERSAMPLING, thing.y * _SUPERSAMPLING
        radius = thing.radius * _SUPERSAMPLING
        fill = COLORS[thing.color]
        if thing.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            pen.polygon(_outline(thing.shape, x, y, radius, thing.rotation), fill=fill)
    return np.asarray(image.reduce(_SUPERSAMPLING))


def _outline(shape, x, y, radius, rotation):
    """Corner points of a polygon that fits in the circle of `radius` around (x, y)."""
    if shape == "cross":
        # Twelve corners; the outer ones lie on the circle.
        arm, half = 0.94, 0.33
        quarter = [(half, -arm), (half, -half), (arm, -half)]
        points = []
        for turn in range(4):
            for px, py in quarter:
                for _ in range(turn):
                    px, py = -py, px
                points.append((px, py))
    else:
        corners, inner = {
            "square": (4, None),
            "triangle": (3, None),
            "star": (5, 0.42),
        }[shape]
        # A square stands on a side, the others on their base with one corner on top.
        start = -math.pi / 4 if shape == "square" else -math.pi / 2
        points = []
        for corner in range(corners):
            angle = start + 2 * math.pi * corner / corners
            points.append((math.cos(angle), math.sin(angle)))
            if inner is not None:
                angle += math.pi / corners
                points.append((inner * math.cos(angle), inner * math.sin(angle)))
    cos, sin = math.cos(rotation), math.sin(rotation)
    return [
        (x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos))
        for px, py in points
    ]
