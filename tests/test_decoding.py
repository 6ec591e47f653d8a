import io

import numpy as np
import pytest
from conftest import photograph
from PIL import Image

from latent_ae.data import UnreadableImage, decode_image


def stored(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


@pytest.fixture(scope="module")
def cat():
    return photograph("chelsea")


def test_rgb_is_untouched(cat):
    assert np.array_equal(decode_image(stored(cat)), cat)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "YCbCr", "HSV", "1", "LA", "RGBA"])
def test_every_mode_looks_like_itself(cat, mode):
    given = cat.convert(mode)
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    value = given if mode == "HSV" else stored(given, kind)
    read = decode_image(value)
    assert read.mode == "RGB"
    # Luminance is what all of these keep; `1` is dithered, so look from afar.
    shrink = {"size": (40, 30), "resample": Image.Resampling.BOX}
    a, b = (picture.convert("L").resize(**shrink) for picture in (read, cat))
    assert difference(a, b) < 6


def test_cmyk_jpeg_is_not_inverted(cat):
    assert difference(decode_image(stored(cat.convert("CMYK"), "JPEG", quality=95)), cat) < 6


def test_16_bit_grey_is_scaled_not_clipped(cat):
    grey = np.asarray(cat.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    read = np.asarray(decode_image(stored(deep)))
    assert np.array_equal(read, np.stack([grey] * 3, -1))


def test_transparency_lies_over_white(cat):
    clear = cat.convert("RGBA")
    clear.putalpha(0)
    assert (np.asarray(decode_image(stored(clear))) == 255).all()
    keyed = Image.new("RGB", (4, 4), "red")  # one colour of an RGB picture may be the clear one
    assert (np.asarray(decode_image(stored(keyed, transparency=(255, 0, 0)))) == 255).all()
    palette = cat.quantize(64)
    palette.info["transparency"] = 0
    read = np.asarray(decode_image(stored(palette, transparency=0)))
    hidden = np.asarray(palette) == 0
    assert hidden.any()
    assert (read[hidden] == 255).all()


def test_exif_orientation_is_applied(cat):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned; viewers rotate by 270°
    read = decode_image(stored(cat, exif=exif.tobytes()))
    assert read.size == cat.size[::-1]
    assert np.array_equal(read, cat.transpose(Image.Transpose.ROTATE_270))


def test_what_cannot_be_read_right_is_refused(cat):
    whole = stored(cat, "JPEG")["bytes"]
    for value in (
        {"bytes": whole[: len(whole) // 2], "path": None},
        {"bytes": b"no picture", "path": None},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "/nowhere.png"},
        stored(Image.fromarray(np.linspace(-1, 9, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
    ):
        with pytest.raises(UnreadableImage, match=r"."):
            decode_image(value)
