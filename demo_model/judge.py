"""Says what a picture shows, by colours and shapes: no model is asked.

The hour is read off the sky. Every pixel is then called by the nearest of the colours that the hour
allows, and the tree and the thing in the sky are recognised by how well their outlines cover those
of the drawn ones.
"""
import functools
import random

import numpy as np

from . import scenes
from .scenes import CHOICES, HOURS, SIZE, Scene

SKY_ROWS, TREE_ROWS, WALL_ROWS, GROUND_ROWS = (
    slice(0, 40),
    slice(34, 82),
    slice(70, 83),
    slice(108, 124),
)
FOLIAGE = list(scenes.FOLIAGE.values())
OTHERS = [scenes.TRUNK, scenes.CHIMNEY, scenes.ROOF, scenes.DOOR]
UNLIT = [*scenes.RAINBOW, scenes.GLOW, scenes.GLASS]
RECOGNISED = 0.5  # share of two outlines that both cover


def choices_in(picture: np.ndarray) -> dict[str, str | None]:
    """The value of each choice, None where nothing is recognised. picture: uint8 (SIZE, SIZE,
    3)."""
    hour = _hour(picture)
    wall, side = _house(picture, hour)
    ground = np.median(picture[GROUND_ROWS].reshape(-1, 3), 0)
    return {
        "wall": wall, "side": side, "tree": _best(_tree_mask(picture, hour), "tree"),
        "ground": _nearest(ground,
                           {name: _lit(colour, hour) for name, colour in scenes.GROUNDS.items()}),
        "hour": hour, "body": _body(picture, hour)
    }


def right(picture: np.ndarray, asked: dict[str, str]) -> dict[str, bool]:
    """For each choice that was asked for, whether the picture shows it."""
    shown = choices_in(picture)
    return {name: shown[name] == value for name, value in asked.items()}


def outlines(picture: np.ndarray) -> float:
    """How much of a picture is thin dark lines: what the first LoRA adds."""
    grey, by = picture.astype(np.float32).mean(-1), 4
    across = np.minimum(grey[by:-by, 2 * by:], grey[by:-by, :-2 * by]) - grey[by:-by, by:-by]
    down = np.minimum(grey[2 * by:, by:-by], grey[:-2 * by, by:-by]) - grey[by:-by, by:-by]
    return float(np.maximum(across, down).clip(0).mean())


def pumpkins(picture: np.ndarray) -> float:
    """How many pixels of the foreground have the colour of pumpkins: what the second LoRA adds."""
    hour = _hour(picture)
    colours = [
        _lit(colour, hour)
        for colour in (scenes.PUMPKIN, *scenes.GROUNDS.values(), scenes.STALK, scenes.INK)
    ]
    return float((_labels(picture[GROUND_ROWS, 32:96], np.array(colours)) == 0).sum())


def _lit(colour: tuple, hour: str) -> np.ndarray:
    return np.array(colour) * HOURS[hour][2]


def _nearest(colour, candidates: dict) -> str:
    return min(candidates, key=lambda name: np.square(colour - np.array(candidates[name])).sum())


def _labels(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Index of the nearest colour for each pixel. pixels: (H, W, 3). colours: (n, 3) or, one set a
    row, (H, n, 3)."""
    colours = colours[:, None] if colours.ndim == 3 else colours
    return np.square(pixels[..., None, :].astype(np.float32) - colours).sum(-1).argmin(-1)


def _hour(picture: np.ndarray) -> str:
    return _nearest(np.median(picture[:4].reshape(-1, 3), 0),
                    {hour: colours[0] for hour, colours in HOURS.items()})


@functools.lru_cache
def _sky(hour: str) -> np.ndarray:
    return np.asarray(scenes.sky(hour).reduce(scenes.FINER))[:, 0].astype(np.float32)  # (SIZE, 3)


def _palette(rows: slice, hour: str, colours) -> np.ndarray:
    """For each row the colour of the sky, then the others."""
    sky = _sky(hour)[rows][:, None]
    return np.concatenate(
        [sky, np.broadcast_to(np.array(colours, np.float32), (len(sky), len(colours), 3))], 1)


def _house(picture: np.ndarray, hour: str) -> tuple[str | None, str | None]:
    walls = [_lit(colour, hour) for colour in scenes.WALLS.values()]
    colours = [*walls, *(_lit(colour, hour) for colour in FOLIAGE + OTHERS), *UNLIT]
    labels = _labels(picture[WALL_ROWS], _palette(WALL_ROWS, hour, colours))
    areas = [(labels == 1 + index).sum() for index in range(len(walls))]
    best = int(np.argmax(areas))
    if areas[best] < 120:
        return None, None
    middle = np.nonzero(labels == 1 + best)[1].mean()
    return tuple(scenes.WALLS)[best], "left" if middle < SIZE / 2 else "right"


def _tree_mask(picture: np.ndarray, hour: str) -> np.ndarray:
    foliage = [_lit(colour, hour) for colour in FOLIAGE]
    others = [_lit(colour, hour) for colour in OTHERS + list(scenes.WALLS.values())]
    return np.isin(_labels(picture[TREE_ROWS], _palette(TREE_ROWS, hour, foliage + others + UNLIT)),
                   (1, 2, 3))


def _sky_mask(picture: np.ndarray, hour: str) -> np.ndarray:
    return np.abs(picture[SKY_ROWS] - _sky(hour)[SKY_ROWS][:, None]).max(-1) > 36


def _centred(mask: np.ndarray) -> np.ndarray | None:
    """The mask with its middle in the middle."""
    rows, columns = np.nonzero(mask)
    if len(rows) < 60:
        return None
    shift = mask.shape[0] // 2 - round(rows.mean()), mask.shape[1] // 2 - round(columns.mean())
    return np.roll(mask, shift, (0, 1))


def _body(picture: np.ndarray, hour: str) -> str | None:
    """What is in the sky. Only a sun is yellow through and through, and a sun is nothing else."""
    mask = _sky_mask(picture, hour)
    pixels = picture[SKY_ROWS][mask].astype(int)
    yellow = len(pixels) and np.median(pixels[:, 0] - pixels[:, 2]) > 110
    return _best(mask, "body", ("sun", "rainbow") if yellow else ("moon", "cloud", "rainbow"))


def _best(mask: np.ndarray, field: str, among: tuple[str, ...] | None = None) -> str | None:
    mask = _centred(mask)
    if mask is None:
        return None
    shares = {name: max((mask & drawn).sum() / (mask | drawn).sum() for drawn in masks)
              for name, masks in _templates(field).items() if among is None or name in among}
    best = max(shares, key=shares.get)
    return best if shares[best] >= RECOGNISED else None


@functools.lru_cache
def _templates(field: str) -> dict[str, list[np.ndarray]]:
    """Masks of a few drawings of each value of a choice."""
    plain = {"wall": "white", "side": "left", "tree": "pine", "ground": "sand", "hour": "noon",
             "body": "sun"}
    mask = _tree_mask if field == "tree" else _sky_mask
    return {
        value: [
            _centred(mask(scenes.draw(Scene(**plain | {field: value}), random.Random(seed)),
                          "noon")) for seed in range(8)
        ] for value in CHOICES[field]
    }
