"""Pictures and the boxes on them, from a file to a square of pixels."""

import io
import math
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from formats.files import read_at
from support.errors import BadInput

MEAN_COLOUR = (122, 116, 104)  # CLIP's mean in bytes: what pads a picture to a square
CROP_SCALE = (0.5, 1.0)  # share of the area that a random crop keeps
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # of Pillow's; one runs Ghostscript
PIXELS = 89_000_000  # an image that claims more is a bomb or a mistake
RATIO = 200  # of the longer side to the shorter, at most: of what is longer no model sees a thing
PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # other modes are copied up to four times
ORIENTATION = 0x0112  # the EXIF tag
WHOLE = (0.0, 0.0, 1.0, 1.0)

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow warns where we refuse


@dataclass
class Peeked:
    """A picture of which the header alone has been read."""

    image: Image.Image  # as it is stored
    turned: int  # its EXIF orientation, 1 to 8 where it has one
    where: str  # for messages

    @property
    def size(self):
        """(width, height) as the photographer held it."""
        width, height = self.image.size
        return (height, width) if self.turned in range(5, 9) else (width, height)


@contextmanager
def pillow(where):
    """Pillow, fed a stranger's bytes, raises almost anything; here and only here it becomes the reader's sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        raise BadInput(
            f"{where}: cannot be read as an image ({type(e).__name__}: {e}); "
            "fetch it again or leave it out"
        ) from e


def peek(ref, where=""):
    """(path, offset, size), size -1 for a whole file -> Peeked."""
    file, offset, size = ref
    if isinstance(file, bytes):  # it came with its record
        file = io.BytesIO(file)
    elif size >= 0:
        file = io.BytesIO(read_at(file, offset, size))
    else:
        where = f"{where}: image {file}" if where else file
        if not os.path.isfile(file):
            raise BadInput(f"{where}: is no file; mend the record, or `images` of its source")
    with pillow(where):
        image = Image.open(file, formats=KINDS)
        plain = image.mode in PLAIN and not image.has_transparency_data
        most = PIXELS if plain else PIXELS // 4
        if image.width * image.height > most:
            raise BadInput(f"{where}: has over {most} pixels; shrink it")
        longer, shorter = max(image.size), min(image.size)
        if longer > RATIO * shorter:
            raise BadInput(
                f"{where}: is {image.width} x {image.height}, more than {RATIO} times as long as wide; "
                "leave it out, or cut it"
            )
        if image.mode == "F" or (image.format == "TIFF" and image.mode == "I"):
            raise BadInput(
                f"{where}: has 32 bits a pixel, of which nobody knows what is white; "
                "save it with 8 or 16"
            )
        return Peeked(image, orientation(image), where)


def orientation(image):
    """How a picture was held, as EXIF has it: 1 to 8, or whatever a camera wrote."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole picture to look behind it
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1  # a broken EXIF block is common, and the picture is fine


def upright(peeked, need=None):
    """Peeked -> an RGB image: first frame, as the photographer held it, alpha over white, 16 bits scaled to 8.

    `need`: pixels per side that will be used; a JPEG twice as large is decoded at 1/2, 1/4 or 1/8, nearly for free."""
    image = peeked.image
    with pillow(peeked.where):
        if need and image.format == "JPEG":
            image.draft(None, (2 * need, 2 * need))
        if peeked.turned in range(2, 9):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # Pillow's own conversion would clip to white
            pixels = np.asarray(image).astype(np.int64) >> 8
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def to_square(image, side, region=WHOLE):
    """`region` (fractions) of an RGB image, stretched bicubically over side x side -> uint8 (S,S,3)."""
    if max(image.size) > 8 * side:  # what follows may be a square of the longer side
        scale = 4 * side / max(image.size)
        smaller = [max(1, round(v * scale)) for v in image.size]
        image = image.resize(smaller, Image.Resampling.BICUBIC, reducing_gap=2)
    box = np.multiply(region, image.size * 2).tolist()  # in pixels
    if min(region) < 0 or max(region) > 1:
        left, top, right, bottom = map(round, box)
        canvas = Image.new("RGB", (right - left, bottom - top), MEAN_COLOUR)
        canvas.paste(image, (-left, -top))
        image, box = canvas, None
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))


def padded_region(size):
    """The square around the whole image; what of it lies outside is filled with the mean colour."""
    w, h = size
    side = max(size)
    x, y = -((side - w) // 2), -((side - h) // 2)
    return x / w, y / h, (x + side) / w, (y + side) / h


def random_region(size, rng):
    """What RandomResizedCrop keeps (torchvision's rule, aspect 3/4 to 4/3), as fractions of the image."""
    w, h = size
    for _ in range(10):
        area = w * h * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_w = math.sqrt(area * ratio)
        crop_h = math.sqrt(area / ratio)
        if crop_w <= w and crop_h <= h:
            x = rng.uniform(0, w - crop_w)
            y = rng.uniform(0, h - crop_h)
            return x / w, y / h, min(1.0, (x + crop_w) / w), min(1.0, (y + crop_h) / h)
    return WHOLE


def fractions(box, size, where):
    """A pixel box of an annotation, checked, as fractions of its image. A pixel beyond the edge is rounding."""
    w, h = size
    sides = (w, h, w, h)
    try:
        inside = np.clip(box, 0, sides)
        x1, y1, x2, y2 = inside
        sound = x1 < x2 and y1 < y2 and abs(inside - box).max() <= 1  # NaN is in no order
    except (TypeError, ValueError):  # not four, or not numbers
        sound = False
    if not sound:
        raise BadInput(
            f"{where}: bbox {box} is not [x1, y1, x2, y2] in pixels of its {w} x {h} image; "
            "mend or remove it"
        )
    return tuple((inside / sides).tolist())


def not_corners(boxes):
    """What (box, size of its picture) seem to be in the place of [x1, y1, x2, y2] in pixels; None: nothing else."""
    if boxes and all(max(box) <= 1 and min(size) > 2 for box, size in boxes):
        return "fractions of their pictures; write pixels"
    corners = sizes = bool(boxes)
    for (a, b, c, d), (width, height) in boxes:
        corners &= a < c <= width + 1 and b < d <= height + 1
        sizes &= c > 0 and d > 0 and a + c <= width + 1 and b + d <= height + 1
    if sizes and not corners:
        return "[x, y, width, height]; write x + width and y + height in place of width and height"
    return None


def move_box(box, region):
    """Fractions of an image -> fractions of the square that shows `region` of it (see to_square)."""
    x1, y1, x2, y2 = region
    moved = (np.array(box) - (x1, y1, x1, y1)) / (x2 - x1, y2 - y1, x2 - x1, y2 - y1)
    left, top, right, bottom = moved.clip(0, 1).tolist()
    if left >= right or top >= bottom:
        raise BadInput(f"box {tuple(box)} is cropped away; boxes need whole images")
    return left, top, right, bottom
