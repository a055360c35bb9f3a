"""What the studio's tests share: looking at pictures, whichever way they come."""

import base64
import io

import numpy as np
from PIL import Image

from pipeline.__main__ import main

GREEN = 1
"""Class of the toy images."""


def silent(share):
    """Told how much of a draw is done."""
    assert 0 < share <= 1


def array(pixels):
    """uint8 [h, w, C] from a picture [C, h, w]."""
    return pixels.permute(1, 2, 0).numpy()


def pixels_of(uri):
    """uint8 [h, w, C] from a picture that stands in a page."""
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def sampled(finished, out, *items):
    """Pictures uint8 [h, w, 3] by file name, as ``octaves sample`` writes them."""
    assert main(["sample", str(finished / "tiny.yaml"), f"run={finished}/run", f"out={out}", *items]) == 0
    return {path.name: np.array(Image.open(path)) for path in out.iterdir() if path.name != "grid.png"}
