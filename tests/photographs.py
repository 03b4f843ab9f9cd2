"""Photographs of every odd kind, from those that scikit-image ships, as files.

Only the files of that package are read; it is never imported.
"""

import importlib.util
import os
import pathlib

import numpy as np
from PIL import Image


def _samples():
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the photographs of scikit-image are missing: pip install -e '.[test]'"
        )
    return pathlib.Path(os.path.dirname(spec.origin)) / "data"


def _transparent(image):
    """Less and less of it to the right, none of it in a corner."""
    width, height = image.size
    alpha = np.tile(np.linspace(255, 0, width).astype(np.uint8), (height, 1))
    alpha[: height // 3, : width // 3] = 0
    image = image.convert("RGB")
    image.putalpha(Image.fromarray(alpha))
    return image


def write(folder):
    """Name -> path of each photograph, written into the folder."""
    samples = _samples()

    def opened(name):
        return Image.open(samples / name)

    cat, coffee, grey = (opened(f"{x}.png") for x in ("chelsea", "coffee", "camera"))
    made = {
        "square.png": opened("astronaut.png"),
        "wide.jpg": opened("rocket.jpg"),
        "tall.png": cat.transpose(Image.Transpose.ROTATE_90),
        "strip.png": coffee.crop((0, 150, 600, 213)),
        "odd.png": coffee.crop((3, 5, 336, 256)),
        "grey.png": grey.crop((0, 0, 512, 301)),
        "alpha.png": _transparent(cat),
        "logo.png": opened("logo.png"),
        "palette.gif": cat.quantize(64),
        "cmyk.jpg": coffee.convert("CMYK"),
        "tiny.png": cat.resize((61, 40)),
        "huge.jpg": opened("retina.jpg").crop((0, 100, 1411, 1100)),
    }
    paths = {}
    for name, image in made.items():
        paths[name] = os.path.join(folder, name)
        image.save(paths[name])
    return paths
