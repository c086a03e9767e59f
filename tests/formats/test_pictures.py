"""formats/pictures.py: every kind of picture to the pixel, and boxes on them."""

import io
import os
import re
import resource

import numpy as np
import pytest
from PIL import Image
from small import ASK, TOKENIZER, data_of, noise, picture, refusal, source, write

from formats.pictures import (
    MEAN_COLOUR,
    WHOLE,
    fractions,
    move_box,
    padded_region,
    peek,
    random_region,
    to_square,
    upright,
)
from support.errors import BadInput

BICUBIC = Image.Resampling.BICUBIC
POINT = '[{"img_name": "a.png", "bbox": [4, 8, 16, 24], "sentences": [{"sent": "it"}]}]'


def opened(path, need=None):
    return upright(peek((str(path), 0, -1)), need)


def numbers(image):
    return np.asarray(image).astype(int)


def tiff(kind):
    out = io.BytesIO()
    Image.fromarray(np.ones((6, 8), kind)).save(out, "TIFF")
    return out.getvalue()


def turned(image, turn, path):
    """Saved with an EXIF block that says how it was held."""
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(path, exif=exif, quality=100)


def test_every_kind_of_picture_becomes_the_rgb_that_a_viewer_shows(tmp_path):
    red = (200, 40, 20)
    size = (8, 6)
    flat = Image.new("RGB", size, red)
    deep = Image.fromarray(np.full((6, 8), 90 * 257, np.uint16))
    half = Image.new("RGBA", size, (*red, 102))  # 40% of red over white
    moving = {"save_all": True, "append_images": [Image.new("RGB", size, "blue")]}
    for name, image, how, colour in (
        ("grey.png", Image.new("L", size, 90), {}, 90),
        ("deep.png", deep, {}, 90),
        ("cmyk.jpg", flat.convert("CMYK"), {"quality": 100}, red),
        ("half.png", half, {}, (233, 169, 161)),
        ("clear.png", flat.quantize(4), {"transparency": 0}, 255),
        ("moving.gif", flat, moving, red),
    ):
        image.save(tmp_path / name, **how)
        found = opened(tmp_path / name)
        assert found.mode == "RGB"
        assert np.abs(numbers(found) - colour).max() <= 8, name


@pytest.mark.parametrize("turn", range(9))
def test_exif_orientation_is_undone_and_the_upright_size_is_known_from_the_header(tmp_path, turn):
    undone_by = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's transpositions
    wanted = stored = Image.new("RGB", (64, 32))
    stored.paste("white", (0, 0, 16, 16))
    turned(stored, turn, tmp_path / "t.jpg")
    if turn in undone_by:
        wanted = stored.transpose(undone_by[turn])
    found = peek((str(tmp_path / "t.jpg"), 0, -1))
    assert found.size == wanted.size
    assert np.abs(numbers(upright(found)) - wanted).max() < 12


def test_a_box_on_a_turned_picture_is_one_on_what_a_viewer_shows(tmp_path):
    stored = Image.new("RGB", (64, 32))
    stored.paste("white", (8, 16, 24, 28))  # a viewer turns it by a quarter, to (4, 8, 16, 24)
    write(tmp_path / "a.json", POINT)
    turned(stored, 6, tmp_path / "a.png")
    data = data_of(tmp_path, source("refcoco", images="."), image_size=64)
    _, targets, [pixels] = data.sample(data.sources[0], 0, 0)
    assert TOKENIZER.decode(targets) == "<box>(0.12,0.12),(0.50,0.38)</box>"
    assert Image.fromarray(pixels[..., 0] > 127).getbbox() == (8, 8, 32, 24)
    [item] = data.samples()
    assert item.size == (32, 64)


def test_a_jpeg_far_larger_than_needed_is_decoded_small_and_looks_the_same(tmp_path):
    path = tmp_path / "big.jpg"
    Image.linear_gradient("L").resize((1600, 1200)).save(path, quality=95)
    small, full = opened(path, 224), opened(path)
    assert small.size == (800, 600) and full.size == (1600, 1200)
    difference = to_square(small, 224).astype(int) - to_square(full, 224)
    assert np.abs(difference).max() <= 3


@pytest.mark.parametrize("size, corner", [((50, 30), (0, 10)), ((30, 50), (10, 0))])
def test_squashing_is_pillows_own_bicubic_and_padding_centres(size, corner):
    image = noise(size)
    assert (to_square(image, 16) == numbers(image.resize((16, 16), BICUBIC))).all()
    padded = Image.new("RGB", (50, 50), MEAN_COLOUR)
    padded.paste(image, corner)
    found = to_square(image, 16, padded_region(size))
    assert (found == numbers(padded.resize((16, 16), BICUBIC))).all()


def test_a_long_screenshot_is_padded_to_its_square_within_300_megabytes(tmp_path):
    page = Image.new("RGB", (1280, 20_000))
    page.paste("white", (0, 10_000, 1280, 20_000))
    page.save(tmp_path / "page.png")
    held = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before = held()
    found = peek((str(tmp_path / "page.png"), 0, -1))
    square = to_square(upright(found, 448), 448, padded_region(found.size))
    assert held() - before < 300
    assert (square[:, :200] == MEAN_COLOUR).all()
    assert (square[:220, 224] == 0).all() and (square[228:, 224] == 255).all()


def test_random_crops_keep_half_of_the_picture_or_more_and_nearly_its_shape():
    rng = np.random.default_rng(0)
    regions = np.array([random_region((64, 48), rng) for _ in range(300)])
    assert regions.min() >= 0 and regions.max() <= 1
    widths, heights = (regions[:, 2:] - regions[:, :2]).T
    areas, shapes = widths * heights, widths / heights * 64 / 48
    assert 0.49 < areas.min() < 0.55 and 0.9 < areas.max()
    assert 0.74 < shapes.min() and shapes.max() < 1.34


@pytest.mark.parametrize("size", [(320, 200), (200, 320)])
def test_a_box_lands_on_the_same_coloured_pixels_after_every_transform(size):
    box = (60, 50, 130, 180)
    image = Image.new("RGB", size)
    image.paste("white", box)
    box = fractions(box, size, "here")
    for region in (WHOLE, padded_region(size), (0.1, 0.3, 0.9, 0.8), (0.25, 0, 0.35, 1)):
        square = to_square(image, 128, region)
        found = Image.fromarray(square[..., 0] > 180).getbbox()
        assert np.abs(found - np.multiply(move_box(box, region), 128)).max() <= 1.5
    with pytest.raises(BadInput, match="cropped away"):
        move_box(box, (0, 0, 0.18, 1))


@pytest.mark.parametrize(
    "content, says",
    [
        (b"404 not found", "cannot be read as an image"),
        (picture(size=(99, 99))[:150], "cannot be read as an image .*truncated"),
        (picture(size=(1, 65_500)), "is 1 x 65500, more than 200 times as long as wide"),
        (tiff(np.float32), "has 32 bits a pixel"),
        (tiff(np.int32), "has 32 bits a pixel"),
        (b"Pf\n1 1\n-1.0\n" + bytes(4), "has 32 bits a pixel"),
    ],
)
def test_what_is_no_picture_is_refused_by_record_and_file(tmp_path, content, says):
    write(tmp_path / "im/a.png", content)
    write(tmp_path / "a.json", [ASK])
    assert re.search(f"record 0: image .*a.png: {says}", refusal(tmp_path, source("vqa")))


def test_a_folder_and_a_pipe_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(BadInput, match=f"{path}: is no file"):
            opened(path)
