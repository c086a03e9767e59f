"""Pictures and the boxes on them, from a file to a square of pixels."""

import io
import math
import os
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from formats.files import read_at
from support.errors import BadInput

MEAN_COLOUR = (122, 116, 104)  # CLIP's mean in bytes: what pads a picture to a square

CROP_SCALE = (0.5, 1.0)  # share of the area that a random crop keeps

KINDS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
)  # Pillow has more; one runs Ghostscript

PIXELS = 89_000_000  # an image that claims more is a bomb or a mistake

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow warns where we refuse


def fractions(box, size, where):
    """A pixel box of an annotation, checked, as fractions of its image. A pixel beyond the edge is rounding."""
    if len(box) != 4 or not all(
        type(v) in (int, float) and abs(v) < 1e9 for v in box
    ):  # NaN is not < 1e9
        raise BadInput(f"{where}: bbox {box} is not four finite numbers; mend or remove it")
    (x1, y1, x2, y2), (w, h) = box, size
    if not (x1 < x2 and y1 < y2):
        raise BadInput(f"{where}: bbox {box} is degenerate; it must be [x1, y1, x2, y2]")
    if min(x1, y1) < -1 or x2 > w + 1 or y2 > h + 1 or min(x2, y2) <= 0 or x1 >= w or y1 >= h:
        raise BadInput(
            f"{where}: bbox {box} is outside its {w} x {h} image; mend it ([x1, y1, x2, y2] in pixels)"
        )
    return max(x1, 0) / w, max(y1, 0) / h, min(x2, w) / w, min(y2, h) / h


def move_box(box, region):
    """Fractions of an image -> fractions of the square that shows `region` of it (see to_square)."""
    x, y, w, h = region[0], region[1], region[2] - region[0], region[3] - region[1]
    moved = (box[0] - x) / w, (box[1] - y) / h, (box[2] - x) / w, (box[3] - y) / h
    x1, y1, x2, y2 = (min(1.0, max(0.0, v)) for v in moved)
    if x1 >= x2 or y1 >= y2:
        raise BadInput(f"box {tuple(box)} is cropped away; boxes need whole images")
    return x1, y1, x2, y2


@contextmanager
def pillow(where):
    """Pillow, fed a stranger's bytes, raises almost anything; here and only here it becomes the reader's sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        why = " ".join((getattr(e, "strerror", None) or str(e) or type(e).__name__).split())
        raise BadInput(
            f"{where}: cannot be read as an image ({why}); fetch it again or leave it out"
        ) from e


def peek(ref, where=""):
    """(path, offset, size) -> (image, its upright size). Reads the header alone."""
    path, offset, size = ref
    where = f"{where}: image {path}" if size < 0 else where
    with pillow(where):
        if size < 0 and not os.path.isfile(path):
            raise BadInput(f"{where}: is no file; mend or remove the record")
        image = Image.open(
            path if size < 0 else io.BytesIO(read_at(path, offset, size)), formats=KINDS
        )
        plain = (
            image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr")
            and "transparency" not in image.info
        )
        most = (
            PIXELS if plain else PIXELS // 4
        )  # the others take up to four copies on their way to RGB
        if image.width * image.height > most:
            raise BadInput(f"{where}: has over {most} pixels; shrink it")
        exif = (
            image.format != "PNG" or "exif" in image.info
        )  # a PNG without would be decoded for the asking
        try:
            turn = image.getexif().get(0x0112, 1) if exif else 1
        except Exception:
            turn = 1  # a broken EXIF block is common, and the picture is fine
        image.where, image.turn = where, turn if turn in range(1, 9) else 1
        return image, image.size[::-1] if image.turn >= 5 else image.size


def upright(image, need=None):
    """A peeked image -> RGB: first frame, as the photographer held it, alpha over white, 16 bits scaled to 8.
    `need`: pixels per side that will be used; a JPEG twice as large is decoded at 1/2, 1/4 or 1/8, nearly for free."""
    with pillow(getattr(image, "where", "the image")):
        if need and image.format == "JPEG":
            image.draft(None, (2 * need, 2 * need))
        if getattr(image, "turn", 1) > 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # Pillow's own conversion would clip to white
            image = Image.fromarray(
                (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            )
        elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


WHOLE = (0.0, 0.0, 1.0, 1.0)


def random_region(size, rng):
    """What RandomResizedCrop keeps (torchvision's rule, aspect 3/4 to 4/3), as fractions of the image."""
    w, h = size
    for _ in range(10):
        area, ratio = (
            w * h * rng.uniform(*CROP_SCALE),
            math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))),
        )
        cw, ch = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if cw <= w and ch <= h:
            x, y = rng.uniform(0, w - cw), rng.uniform(0, h - ch)
            return x / w, y / h, min(1.0, (x + cw) / w), min(1.0, (y + ch) / h)
    return WHOLE


def padded_region(size):
    """The square around the whole image; what of it lies outside is filled with the mean colour."""
    (w, h), side = size, max(size)
    x, y = -((side - w) // 2), -((side - h) // 2)
    return x / w, y / h, (x + side) / w, (y + side) / h


def to_square(image, side, region=WHOLE):
    """`region` (fractions) of an RGB image, stretched bicubically over side x side -> uint8 (S,S,3)."""
    w, h = image.size
    box = [region[0] * w, region[1] * h, region[2] * w, region[3] * h]
    if min(region) < 0 or max(region) > 1:
        x, y, right, bottom = map(round, box)
        canvas = Image.new("RGB", (right - x, bottom - y), MEAN_COLOUR)
        canvas.paste(image, (-x, -y))
        image, box = canvas, None
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))
