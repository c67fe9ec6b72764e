"""The miniatures' world: generated pictures of shapes whose truth is known. Everything is a function of a seed.

A scene is drawn four times as large and reduced, so that edges are smooth; its boxes are measured on the drawn shape,
not guessed from its parameters. Needs numpy and Pillow only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

# What the miniatures were trained on …
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "heart", "moon")
# … and what they never saw, to be taught.
UNSEEN_SHAPES = ("star",)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (245, 225, 50),
    "orange": (245, 140, 30),
    "purple": (130, 50, 170),
    "pink": (250, 150, 190),
    "cyan": (70, 215, 225),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
# Radii as parts of the picture's side; the gaps between them keep the words apart.
SIZES: dict[str, tuple[float, float]] = {"small": (0.16, 0.18), "medium": (0.22, 0.25), "large": (0.3, 0.34)}
# What sizes leave room for so many things.
_SIZES_OF = {1: tuple(SIZES), 2: ("small", "medium"), 3: ("small", "medium"), 4: ("small",)}
TEXTURES = ("plain", "striped", "dotted")
PLACES = ("left", "right", "top", "bottom", "center")
_SUPERSAMPLING = 4
_COLOUR_NOISE = 8


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        shape, colour, size: words of the tables above.
        centre: x and y in 0..1 of the picture.
        radius: half the extent of its outline, in parts of the picture's side.
        angle: degrees, counter-clockwise.
        rgb: the colour as drawn, 0..255.
        outline: corners in the unit circle, y downwards, of a thing whose shape is none of the tables.
    """

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]
    radius: float
    angle: float
    rgb: tuple[int, int, int]
    outline: tuple[tuple[float, float], ...] = ()

    @property
    def place(self) -> str | None:
        """Where it lies, in a word; None between the places."""
        x, y = self.centre
        if abs(x - 0.5) < 0.08 and abs(y - 0.5) < 0.08:
            return "center"
        dx, dy = x - 0.5, y - 0.5
        if max(abs(dx), abs(dy)) < 0.12 or abs(abs(dx) - abs(dy)) < 0.05:
            return None
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "top" if dy < 0 else "bottom"


@dataclass(frozen=True)
class Scene:
    """Objects on a background.

    Attributes:
        things: the objects, from left to right.
        background: a colour's word.
        texture: plain, striped or dotted.
        rgb: the background's colour as drawn, 0..255.
        phase: shifts the texture, 0..1.
    """

    things: tuple[Thing, ...]
    background: str
    texture: str
    rgb: tuple[int, int, int]
    phase: float


@dataclass(frozen=True)
class Picture:
    """A drawn scene.

    Attributes:
        image: RGB, square.
        scene: what was drawn.
        boxes: for each thing, x0, y0, x1, y1 in 0..1: the extent of its drawn pixels.
    """

    image: Image.Image
    scene: Scene
    boxes: tuple[tuple[float, float, float, float], ...]


def random_scene(
    rng: np.random.Generator,
    things: int = 1,
    shapes: Sequence[str] = SHAPES,
    colours: Sequence[str] = tuple(COLOURS),
    textures: Sequence[str] = TEXTURES,
    *,
    sizes: Sequence[str] = (),
) -> Scene:
    """A scene of ``things`` (1 to 4) objects that do not touch, none in the background's colour.

    A third of the backgrounds that may have a texture get one. Without ``sizes`` there are those that leave room.
    """
    background = str(rng.choice(list(colours)))
    texture = str(rng.choice(list(textures))) if rng.random() < 0.5 or "plain" not in textures else "plain"
    others = [colour for colour in colours if colour != background]
    placed: list[Thing] = []
    while len(placed) < things:  # things that leave no room for each other are chosen anew
        loose = [_random_thing(rng, shapes, others, sizes or _SIZES_OF[things]) for _ in range(things)]
        placed = _laid_out(rng, loose)
    placed.sort(key=lambda thing: thing.centre)
    return Scene(tuple(placed), background, texture, _noisy(rng, COLOURS[background]), float(rng.random()))


def _random_thing(
    rng: np.random.Generator, shapes: Sequence[str], colours: Sequence[str], sizes: Sequence[str]
) -> Thing:
    """A thing in the middle of the picture."""
    size = str(rng.choice(list(sizes)))
    radius = float(rng.uniform(*SIZES[size]))
    colour = str(rng.choice(list(colours)))
    angle = float(rng.uniform(-8, 8))
    return Thing(str(rng.choice(list(shapes))), colour, size, (0.5, 0.5), radius, angle, _noisy(rng, COLOURS[colour]))


def _laid_out(rng: np.random.Generator, loose: Sequence[Thing], tries: int = 12) -> list[Thing]:
    """The things at random places where they do not touch: as many of the first ones as found room."""
    placed: list[Thing] = []
    for thing in loose:
        for _ in range(tries):
            there = _moved(rng, thing)
            if all(_apart(there, other) for other in placed):
                placed.append(there)
                break
        else:
            break
    return placed


def _moved(rng: np.random.Generator, thing: Thing) -> Thing:
    reach = thing.radius + 0.03
    x, y = rng.uniform(reach, 1 - reach, 2)
    return replace(thing, centre=(float(x), float(y)))


def _apart(one: Thing, other: Thing) -> bool:
    return math.dist(one.centre, other.centre) > 1.08 * (one.radius + other.radius)


def _noisy(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(value + rng.integers(-_COLOUR_NOISE, _COLOUR_NOISE + 1), 0, 255)) for value in rgb)
    return red, green, blue


def draw(scene: Scene, side: int = 64) -> Picture:
    """Draw a scene as a picture of ``side`` × ``side`` pixels."""
    large = side * _SUPERSAMPLING
    canvas = Image.new("RGB", (large, large), scene.rgb)
    _draw_texture(canvas, scene)
    boxes = []
    for thing in scene.things:
        mask = shape_mask(thing, large)
        canvas.paste(thing.rgb, (0, 0), mask)
        left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
        boxes.append((left / large, top / large, right / large, bottom / large))
    return Picture(canvas.reduce(_SUPERSAMPLING), scene, tuple(boxes))


def _draw_texture(canvas: Image.Image, scene: Scene) -> None:
    side = canvas.width
    red, green, blue = scene.rgb
    # Dark colours get lighter marks, light ones darker marks.
    lighter = red + green + blue < 200
    shade = (min(red + 60, 255), min(green + 60, 255), min(blue + 60, 255))
    shade = shade if lighter else (int(red * 0.75), int(green * 0.75), int(blue * 0.75))
    pen = ImageDraw.Draw(canvas)
    period = side / 4
    if scene.texture == "striped":
        for index in range(-1, 5):
            start = (index + scene.phase) * period
            pen.rectangle((start, 0, start + period / 2, side), fill=shade)
    elif scene.texture == "dotted":
        for row in range(-1, 5):
            for column in range(-1, 5):
                x, y = (column + scene.phase) * period, (row + scene.phase) * period
                pen.ellipse((x - period / 4, y - period / 4, x + period / 4, y + period / 4), fill=shade)


def shape_mask(thing: Thing, side: int) -> Image.Image:
    """Where the thing is: an ``L`` picture of 0 and 255."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    x, y, radius = thing.centre[0] * side, thing.centre[1] * side, thing.radius * side
    outline = thing.outline or outline_of(thing.shape)
    if outline:
        pen.polygon([_placed(point, thing, side) for point in outline], fill=255)
        return mask
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    if thing.shape == "ring":
        inner = 0.55 * radius
        pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    elif thing.shape == "moon":
        x, y = _placed((0.5, -0.25), thing, side)
        inner = 0.8 * radius
        pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    return mask


def _placed(point: tuple[float, float], thing: Thing, side: int) -> tuple[float, float]:
    turn = math.radians(-thing.angle)
    x, y = point
    turned = (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn))
    return (thing.centre[0] + turned[0] * thing.radius) * side, (thing.centre[1] + turned[1] * thing.radius) * side


def outline_of(shape: str) -> list[tuple[float, float]]:
    """A shape's corners in the unit circle, y downwards; empty for those made of circles."""
    match shape:
        case "square":
            return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
        case "triangle":
            return [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]
        case "diamond":
            return [(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)]
        case "cross":
            arm = 0.33
            quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
            return [turned for turns in range(4) for turned in (_quarter_turns(point, turns) for point in quarter)]
        case "heart":
            return [_heart(2 * math.pi * step / 48) for step in range(48)]
        case "star":
            return [
                (radius * math.sin(math.pi * step / 5), -radius * math.cos(math.pi * step / 5))
                for step in range(10)
                for radius in (0.42 if step % 2 else 1.0,)
            ]
        case "circle" | "ring" | "moon":
            return []
    message = f"the world has no shape called {shape!r}"
    raise ValueError(message)


def random_outline(rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """An outline without a name: three to eleven corners, every other time rounded; it touches the unit circle."""
    corners = int(rng.integers(3, 12))
    angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * math.pi / corners + rng.uniform(
        0, 2 * math.pi
    )
    radii = rng.uniform(0.3, 1.0, corners)
    if rng.random() < 0.5:
        turn = np.linspace(0, 2 * math.pi, 49)[:-1]
        waves = range(1, 6)
        swing = [rng.normal(0, 0.3) * np.cos(wave * turn + rng.uniform(0, 2 * math.pi)) for wave in waves]
        angles, radii = turn, np.maximum(1 + np.sum(swing, axis=0), 0.2)
    radii = radii / radii.max()
    return tuple((float(x), float(y)) for x, y in zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


def _quarter_turns(point: tuple[float, float], turns: int) -> tuple[float, float]:
    for _ in range(turns):
        point = (-point[1], point[0])
    return point


def _heart(t: float) -> tuple[float, float]:
    """The usual heart curve, 16 sin³ t against 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t, fitted to the unit circle."""
    x = 16 * math.sin(t) ** 3
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return x / 16.5, -(y + 2.5) / 16.5


def phrase(thing: Thing) -> str:
    """Such as: a small red circle. Medium things have no word of size."""
    words = [thing.colour, thing.shape] if thing.size == "medium" else [thing.size, thing.colour, thing.shape]
    return f"{article(words[0])} {' '.join(words)}"


def article(word: str) -> str:
    """The word "an" before a vowel, else "a"."""
    return "an" if word[0] in "aeiou" else "a"


def background_phrase(scene: Scene) -> str:
    """Such as: a striped blue background."""
    words = [scene.background] if scene.texture == "plain" else [scene.texture, scene.background]
    return f"{article(words[0])} {' '.join(words)} background"


def caption(scene: Scene) -> str:
    """The full truth in a sentence, things from left to right."""
    phrases = [phrase(thing) for thing in scene.things]
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return f"An image of {listed} on {background_phrase(scene)}."


def full_prompt(scene: Scene) -> str:
    """A prompt that asks for all that a scene of one thing shows but its place."""
    return f"{phrase(scene.things[0])} on {background_phrase(scene)}"


def prompt(scene: Scene, rng: np.random.Generator) -> str:
    """How somebody might ask for a scene of one thing: every qualifier may be left out, the shape hardly ever is."""
    thing = scene.things[0]
    words = [thing.shape if rng.random() < 0.97 else "shape"]
    if rng.random() < 0.8:
        words.insert(0, thing.colour)
    if rng.random() < 0.5:
        words.insert(0, thing.size)
    parts = [f"{article(words[0])} {' '.join(words)}"]
    if thing.place and rng.random() < 0.3:
        parts.append(f"in the {thing.place}" if thing.place == "center" else f"at the {thing.place}")
    if rng.random() < 0.85:
        backdrop = [] if scene.texture == "plain" else [scene.texture]
        if rng.random() < 0.95:
            backdrop.append(scene.background)
        first = backdrop[0] if backdrop else "background"
        parts.append(" ".join(["on", article(first), *backdrop, "background"]))
    return " ".join(parts)
