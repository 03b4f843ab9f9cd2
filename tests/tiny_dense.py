"""Small pictures whose every pixel has a class and a depth; clips of grey frames."""

import numpy as np
from PIL import Image

NAMES = ("ground", "box", "disc")


def scene(rng, rows=40, columns=48):
    """A picture of a box and a disc, the class of each pixel, and metres."""
    down, across = np.mgrid[:rows, :columns]
    labels = np.zeros((rows, columns), np.uint8)
    top, left = rng.integers(0, rows // 2), rng.integers(0, columns // 2)
    labels[top : top + rows // 2, left : left + columns // 3] = 1
    middle = rng.integers(rows // 4, 3 * rows // 4), rng.integers(8, columns - 8)
    labels[(down - middle[0]) ** 2 + (across - middle[1]) ** 2 < (rows // 4) ** 2] = 2
    colours = np.array([(40, 90, 40), (200, 60, 50), (60, 80, 220)])
    noise = rng.integers(-20, 21, (rows, columns, 3))
    picture = np.clip(colours[labels] + noise, 0, 255).astype(np.uint8)
    metres = np.array([8.0, 2.0, 4.0])[labels]
    return picture, labels, metres


def write_pairs(root, *, train=6, test=3, offset=0, units=None):
    """Folders of masks, their classes from `offset`, or of depths in `units`; root."""
    rng = np.random.default_rng(0)
    for split, count in (("training", train), ("validation", test)):
        kind = "annotations" if units is None else "depths"
        for part in ("images", kind):
            (root / part / split).mkdir(parents=True)
        for number in range(count):
            picture, labels, metres = scene(rng)
            path = root / "images" / split / f"{number:02}.png"
            Image.fromarray(picture).save(path)
            stored = labels + np.uint8(offset)
            if units is not None:
                stored = (metres * units).astype(np.uint16)
            Image.fromarray(stored).save(root / kind / split / f"{number:02}.png")
    if units is None:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return root


def save_grey(path, level, size=16):
    """Writes a picture of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(path)


def write_clips(root, split, clips, *, frames=6, first=1):
    """Clips that become lighter or darker, from some grey on."""
    rng = np.random.default_rng(len(split))
    for name, step in (("darker", -14), ("lighter", 14)):
        for clip in range(clips):
            level = 128 + int(rng.integers(-30, 31)) - step * frames // 2
            for n in range(frames):
                where = root / split / name / f"clip_{clip}"
                save_grey(where / f"frame_{first + n:05}.png", level + n * step)
    (root / "classes.txt").write_text("darker\nlighter\n")
