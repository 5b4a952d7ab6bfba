"""The shapes world: small synthetic images whose content is known.

An image shows one or two objects of some colour, shape, position and size on a background. `render` draws a scene,
`captions` describes it, and `read` recovers its attributes from the pixels alone, or returns None if it cannot. This
measures how well an image follows its caption without any external model.
"""

import itertools
from dataclasses import asdict, dataclass

import numpy as np

COLOURS = {
    "red": (0.87, 0.12, 0.12),
    "yellow": (0.93, 0.83, 0.10),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.12, 0.80, 0.85),
    "blue": (0.12, 0.22, 0.87),
    "purple": (0.72, 0.15, 0.78),
}
SHAPES = ("circle", "square", "triangle")
SUBJECT = ("red", "ring")  # occurs in no image of the data; a trained model can learn it from a few images
SUBJECT_SIZES = (0.2, 0.24)  # half the side of the bounding box
# Bounding-box centres in unit coordinates (x, y), y downwards.
POSITIONS = {
    "center": (0.5, 0.5),
    "top left": (0.29, 0.29),
    "top right": (0.71, 0.29),
    "bottom left": (0.29, 0.71),
    "bottom right": (0.71, 0.71),
}
BACKGROUNDS = {"black": 0.08, "white": 0.92}
SIZES = {"small": (0.13, 0.15), "large": (0.18, 0.205)}  # half the side of the bounding box, in image widths
SIZE_THRESHOLD = 0.165
PAIR_SCALE = 0.8  # two objects are drawn smaller, so that they never touch
POSITION_JITTER = 0.04
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
COMBINATIONS = tuple(itertools.product(COLOURS, SHAPES, POSITIONS, BACKGROUNDS))
# Area as a fraction of the bounding box, and how far the centroid lies below the box's centre (in half sides).
_FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}
_CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}
_PHRASES = (
    "a {colour} {shape} in the {position} on a {background} background",
    "a {size} {colour} {shape} in the {position}, {background} background",
    "{background} background with a {colour} {shape} at the {position}",
    "{colour} {shape}, {position}, on {background}",
    "on {background} there is a {size} {colour} {shape} in the {position}",
    "a {colour} {shape} at the {position} over {background}",
)
# Incomplete captions, like the prompts that people type.
_PARTIAL_PHRASES = (
    "a {colour} {shape}",
    "a {colour} {shape} on a {background} background",
    "a {colour} {shape} in the {position}",
)
SHADE = 0.04  # colours and backgrounds in the data vary by up to this much, up or down
EVEN = 0.04  # `background_of` accepts this much beyond SHADE


@dataclass(frozen=True)
class Object:
    """One object; x, y, r are the bounding box's centre and half side in unit coordinates."""

    colour: str
    shape: str
    position: str
    size: str
    x: float
    y: float
    r: float

    @property
    def label(self) -> int:
        """Index in CLASSES; the subject's index follows the last class."""
        return (*CLASSES, " ".join(SUBJECT)).index(f"{self.colour} {self.shape}")


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Object, ...]

    def as_dict(self) -> dict:
        return asdict(self)


def held_out_combinations(seed: int, fraction: float = 0.1) -> frozenset[tuple[str, str, str, str]]:
    """The (colour, shape, position, background) combinations that never occur in training; a function of the seed."""
    order = np.random.default_rng([seed, 0x5AFE]).permutation(len(COMBINATIONS))
    return frozenset(COMBINATIONS[i] for i in order[: round(fraction * len(COMBINATIONS))])


def random_object(rng: np.random.Generator, combination: tuple[str, str, str, str], shrink: float = 1.0) -> Object:
    colour, shape, position, _ = combination
    size = str(rng.choice(list(SIZES)))
    x, y = POSITIONS[position] + rng.uniform(-POSITION_JITTER, POSITION_JITTER, size=2)
    return Object(colour, shape, position, size, float(x), float(y), float(rng.uniform(*SIZES[size]) * shrink))


def random_scene(rng: np.random.Generator, combinations: list[tuple[str, str, str, str]], objects: int = 1) -> Scene:
    """A scene drawn from the allowed combinations. Two objects share a background and stand in different corners."""
    first = combinations[rng.integers(len(combinations))]
    if objects == 1:
        return Scene(first[3], (random_object(rng, first),))
    corners = [c for c in combinations if c[2] != "center"]
    first = corners[rng.integers(len(corners))]
    others = [c for c in corners if c[2] != first[2] and c[3] == first[3]]
    second = others[rng.integers(len(others))]
    return Scene(first[3], (random_object(rng, first, PAIR_SCALE), random_object(rng, second, PAIR_SCALE)))


def _coverage(shape: str, x: float, y: float, r: float, size: int, oversample: int = 4) -> np.ndarray:
    """Anti-aliased mask (size, size) in [0, 1] of a shape in a bounding box in unit coordinates."""
    grid = (np.arange(size * oversample) + 0.5) / (size * oversample)
    u, v = (grid[None, :] - x) / r, (grid[:, None] - y) / r
    if shape == "circle":
        inside = u**2 + v**2 <= 1
    elif shape == "square":
        inside = (np.abs(u) <= 1) & (np.abs(v) <= 1)
    elif shape == "ring":
        inside = (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.3)
    else:  # apex up: the half width grows from 0 at v = -1 to 1 at v = 1
        inside = (np.abs(v) <= 1) & (np.abs(u) <= (v + 1) / 2)
    return inside.reshape(size, oversample, size, oversample).mean(axis=(1, 3), dtype=np.float32)


def render(scene: Scene, size: int = 32, rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene: image (size, size, 3) uint8 and label map (size, size) uint8 (0 background, class index + 1). rng: if
    given, background and colours vary slightly, as in the training data."""

    def shade(n: int) -> np.ndarray:
        return rng.uniform(-SHADE, SHADE, size=n) if rng else np.zeros(n)

    image = np.broadcast_to(BACKGROUNDS[scene.background] + shade(1), (size, size, 3)).astype(np.float32)
    labels = np.zeros((size, size), np.uint8)
    for o in scene.objects:
        mask = _coverage(o.shape, o.x, o.y, o.r, size)
        colour = np.clip(np.array(COLOURS[o.colour]) + shade(3), 0, 1).astype(np.float32)
        image = image + mask[..., None] * (colour - image)
        labels[mask > 0.5] = o.label + 1
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), labels


def captions(scene: Scene) -> list[str]:
    """All complete phrasings of the scene, in a fixed order. A third of them mention the size."""
    if len(scene.objects) == 1:
        o = scene.objects[0]
        return [p.format(**asdict(o), background=scene.background) for p in _PHRASES]
    parts = [f"a {o.colour} {o.shape} in the {o.position}" for o in scene.objects]
    sized = [f"a {o.size} {o.colour} {o.shape} at the {o.position}" for o in scene.objects]
    ground = f"on a {scene.background} background"
    return [
        f"{parts[0]} and {parts[1]} {ground}",
        f"{sized[0]} and {sized[1]} {ground}",
        f"{ground}: {parts[1]} with {parts[0]}",
    ]


def partial_captions(scene: Scene) -> list[str]:
    """Phrasings of a one-object scene that name the colour and shape and at most one more attribute."""
    return [p.format(**asdict(scene.objects[0]), background=scene.background) for p in _PARTIAL_PHRASES]


def boxes(scene: Scene) -> list[list[float]]:
    """[x, y, w, h, class index] per object, in unit coordinates; x and y are the top left corner."""
    return [[o.x - o.r, o.y - o.r, 2 * o.r, 2 * o.r, o.label] for o in scene.objects]


def _neighbours(pixels: np.ndarray) -> list[np.ndarray]:
    """The values above, below, left and right of each pixel, four arrays (H, W); 0 beyond the edges."""
    padded = np.pad(pixels, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected components of a boolean mask (H, W), largest first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, np.maximum.reduce([labels, *_neighbours(labels)]), 0)
        if (spread == labels).all():
            break
        labels = spread
    components = [labels == value for value in np.unique(labels[labels > 0])]
    return sorted(components, key=lambda m: -m.sum())


def _read_object(image: np.ndarray, distance: np.ndarray, region: np.ndarray, scale: float) -> Object | None:
    size = image.shape[0]
    strong = region & (distance > 0.8 * distance[region].max())
    colour_value = np.median(image[strong], axis=0)
    gaps = sorted((float(np.linalg.norm(colour_value - np.array(rgb))), name) for name, rgb in COLOURS.items())
    if gaps[0][0] > 0.3 or gaps[1][0] - gaps[0][0] < 0.1:
        return None
    alpha = np.clip(distance / np.median(distance[strong]), 0, 1) * region
    area = alpha.sum() / size**2
    centre = (np.arange(size) + 0.5) / size
    x, y = (alpha.sum(0) * centre).sum() / alpha.sum(), (alpha.sum(1) * centre).sum() / alpha.sum()
    fits = []
    for shape in SHAPES:
        r = float(np.sqrt(area / (4 * _FILL[shape])))
        top = y - _CENTROID[shape] * r
        template = _coverage(shape, x, top, r, size)
        overlap = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
        fits.append((float(overlap), shape, top, r))
    fits.sort(reverse=True)
    (overlap, shape, y, r), second = fits[0], fits[1][0]
    if overlap < 0.75 or overlap - second < 0.02:
        return None
    away = {name: np.hypot(x - ax, y - ay) for name, (ax, ay) in POSITIONS.items()}
    position = min(away, key=away.get)
    if away[position] > 0.13:
        return None
    return Object(
        gaps[0][1], shape, position, "small" if r < SIZE_THRESHOLD * scale else "large", float(x), float(y), r
    )


def read(image: np.ndarray, objects: int = 1) -> Scene | None:
    """Reads an image (H, W, 3) uint8 back into a Scene; returns None if it is unreadable.

    Unreadable: an uneven or undefined background, a number of objects other than `objects`, a colour far from all
    colours of the palette, an outline that fits no shape (soft intersection over union with the best template under
    0.75, or no clear winner), a position far from all named positions.
    """
    image = image.astype(np.float32) / 255
    frame, ground = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), _ground(image)
    if (np.abs(frame - ground).max(axis=1) < 0.15).mean() < 0.9 or np.ptp(ground) > 0.2:
        return None
    gaps = {name: abs(float(ground.mean()) - value) for name, value in BACKGROUNDS.items()}
    background = min(gaps, key=gaps.get)
    if gaps[background] > 0.25:
        return None
    distance = np.abs(image - ground).max(axis=2)
    if distance.max() < 0.3:
        return None
    scale = 1.0 if objects == 1 else PAIR_SCALE
    least = 0.3 * (2 * SIZES["small"][0] * scale) ** 2 * image.shape[0] ** 2  # a triangle's area with some tolerance
    regions = _components(distance > 0.3 * distance.max())
    solid = [m for m in regions if m.sum() >= least]
    if len(solid) != objects or sum(m.sum() for m in regions) > 1.15 * sum(m.sum() for m in solid):
        return None
    grown = [
        np.logical_or.reduce([region, *_neighbours(region)]) for region in solid
    ]  # the anti-aliased edge belongs to the object
    objects_read = [_read_object(image, distance, region, scale) for region in grown]
    return None if None in objects_read else Scene(background, tuple(objects_read))


def _ground(image: np.ndarray) -> np.ndarray:
    """The median colour (3,) of an image's border pixels."""
    return np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)


def background_of(image: np.ndarray) -> str | None:
    """The name of the background of an image (H, W, 3) uint8 if the background is colourless and as bright as one in
    the data, else None. `read` is more lenient: it accepts a brightness that is off by up to 0.25."""
    ground = _ground(image.astype(np.float32) / 255)
    for name, value in BACKGROUNDS.items():
        if np.abs(ground - value).max() <= SHADE + EVEN:
            return name
    return None


def fidelity(image: np.ndarray, shape: str) -> float:
    """How closely the object in an image (H, W, 3) uint8 matches the ideal outline of a shape: the soft intersection
    over union of its coverage (0 to 1 per pixel, from colour) with the shape drawn at the best-fitting position and
    size; 0 for an empty image."""
    image = image.astype(np.float32) / 255
    distance = np.abs(image - _ground(image)).max(axis=2)
    if distance.max() < 0.3:
        return 0.0
    alpha = np.clip(distance / np.median(distance[distance > 0.8 * distance.max()]), 0, 1)
    alpha[alpha < 0.12] = 0  # variations of the background are not part of the shape
    centre = (np.arange(len(image)) + 0.5) / len(image)
    x, y = (alpha.sum(0) * centre).sum() / alpha.sum(), (alpha.sum(1) * centre).sum() / alpha.sum()
    r = float(np.sqrt(alpha.mean() / (4 * _FILL[shape])))
    best, place = 0.0, (x, y - _CENTROID[shape] * r, r)
    for reach in (0.12, 0.05, 0.02):  # in half sides; each round searches around the previous best
        moves = np.array(list(itertools.product((-1, 0, 1), repeat=3))) * reach * place[2]
        for candidate in place + moves:
            template = _coverage(shape, *candidate, len(image))
            overlap = float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
            if overlap > best:
                best, place = overlap, tuple(candidate)
    return best


def read_labels(image: np.ndarray, objects: int = 1) -> np.ndarray | None:
    """The label map (H, W) uint8 of an image (0 background, class index + 1), or None if `read` cannot read it. A
    pixel belongs to an object if its colour is nearer to the object's than to the background's."""
    scene = read(image, objects)
    if scene is None:
        return None
    labels = np.zeros(image.shape[:2], np.uint8)
    pixels = image.astype(np.float32) / 255
    ground = np.full(3, BACKGROUNDS[scene.background], np.float32)
    centre = (np.arange(len(image)) + 0.5) / len(image)
    near_x = np.abs(centre[None, :, None] - [o.x for o in scene.objects])
    near_y = np.abs(centre[:, None, None] - [o.y for o in scene.objects])
    owner = np.maximum(near_x, near_y).argmin(axis=2)
    for k, o in enumerate(scene.objects):
        colour = np.array(COLOURS[o.colour], np.float32)
        inside = np.linalg.norm(pixels - colour, axis=2) < np.linalg.norm(pixels - ground, axis=2)
        labels[inside & (owner == k)] = o.label + 1
    return labels
