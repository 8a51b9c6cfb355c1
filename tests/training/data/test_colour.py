"""Whatever colour space a file is in, its picture is the same sRGB; what the fast decoder may have is exactly that."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.training.data.scenes import encoded, scene
from training.data.clean import CleanConfig, Tools, judge
from training.data.colour import is_srgb
from training.data.decode import Facts, decode, decode_jpeg, facts_of, open_header
from training.data.normalise import JpegStore, OriginalStore, normalise

WHITE = (255, 255, 255)


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC version 2 profile of these tags."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), **tags}
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += padded
    device = b"prtr" if space == b"CMYK" else b"mntr"
    head = bytes(4) + b"\x02\x10\0\0" + device + space + connection + bytes(12) + b"acsp" + bytes(28)
    head += fixed(0.9642, 1, 0.8249) + bytes(48)
    return struct.pack(">I", 128 + len(table) + len(body)) + head + table + body


def gamma(power: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(power * 256)) + bytes(2)


def rgb_profile(order: str = "rgb", power: float = 2.2) -> bytes:
    """sRGB's primaries, in any order of channels."""
    primaries = {"r": (0.4360, 0.2225, 0.0139), "g": (0.3851, 0.7169, 0.0971), "b": (0.1431, 0.0606, 0.7141)}
    tags = {
        f"{name}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(*primaries[part])
        for name, part in zip("rgb", order, strict=True)
    }
    return profile(b"RGB ", b"XYZ ", {**tags, **{f"{name}TRC".encode(): gamma(power) for name in "rgb"}})


def grey_profile(power: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"kTRC": gamma(power)})


def cmyk_profile() -> bytes:
    """A press whose cyan is a strong red, and whose other inks are black."""
    table = b""
    for corner in range(16):
        cyan, others = corner >> 3, corner & 7
        table += bytes((0, 128, 128) if others else (128, 220, 180) if cyan else (255, 128, 128))
    ramp = bytes(range(256))
    identity = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile(
        b"CMYK", b"Lab ", {b"A2B0": b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + table + ramp * 3}
    )


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def colour(data: bytes, background: tuple[int, int, int] = WHITE, at: tuple[int, int] = (10, 10)) -> tuple[int, ...]:
    pixel = decode(data, background).getpixel(at)
    assert isinstance(pixel, tuple)
    return pixel


def facts(data: bytes) -> Facts:
    return facts_of(open_header(data))


def test_a_profile_that_is_srgb_changes_nothing() -> None:
    picture = scene(64, 64)
    data = encoded(picture, icc_profile=SRGB)
    assert np.array_equal(np.asarray(decode(data, WHITE)), np.asarray(picture))
    assert is_srgb(SRGB, "RGB")
    assert not is_srgb(rgb_profile("bgr"), "RGB")
    assert not is_srgb(rgb_profile(power=1.8), "RGB")


def test_colours_become_srgb() -> None:
    red = Image.new("RGB", (20, 20), (200, 30, 30))
    for kind in ("PNG", "WEBP", "JPEG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        shown = colour(encoded(red, kind, icc_profile=rgb_profile("bgr"), **options))
        assert shown[2] > 190, kind
        assert shown[0] < 60, kind
    linear = colour(encoded(Image.new("RGB", (20, 20), (55, 55, 55)), icc_profile=rgb_profile(power=1)))
    assert max(abs(part - 128) for part in linear) <= 2  # 55/255 of the light is what sRGB writes as 128


def test_palettes_and_grey_follow_their_profiles() -> None:
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([200, 30, 30, 0, 0, 0])
    assert colour(encoded(palette, icc_profile=rgb_profile("bgr")))[2] > 190
    grey = Image.new("L", (20, 20), 55)
    assert abs(colour(encoded(grey, icc_profile=grey_profile(1)))[0] - 128) <= 2
    assert abs(colour(encoded(grey, icc_profile=rgb_profile(power=1)))[0] - 128) <= 2  # an editor's RGB profile
    assert abs(colour(encoded(grey, "JPEG", quality=95, icc_profile=grey_profile(1)))[0] - 128) <= 3
    deep = Image.fromarray(np.full((20, 20), 55 * 257, np.uint16))
    assert abs(colour(encoded(deep, icc_profile=grey_profile(1)))[0] - 128) <= 2


def test_inks_follow_the_profile_of_their_press() -> None:
    cyan = Image.new("CMYK", (24, 24), (255, 0, 0, 0))
    assert colour(encoded(cyan, "JPEG", quality=95))[0] < 20
    red, green, _ = colour(encoded(cyan, "JPEG", quality=95, icc_profile=cmyk_profile()))
    assert red > 180
    assert green < 60
    paper = encoded(Image.new("CMYK", (24, 24), (0, 0, 0, 0)), "JPEG", quality=95, icc_profile=cmyk_profile())
    assert min(colour(paper)) > 245


def test_colours_are_converted_before_they_are_laid_over_the_background() -> None:
    half = Image.new("RGBA", (20, 20), (200, 0, 0, 128))
    red, _, blue = colour(encoded(half, icc_profile=rgb_profile("bgr")), background=(240, 0, 0))
    assert abs(red - 120) <= 2  # the background is sRGB already
    assert abs(blue - 100) <= 4
    keyed = Image.new("P", (20, 20), 1)
    keyed.putpalette([200, 30, 30, 0, 0, 0])
    assert colour(encoded(keyed, icc_profile=rgb_profile("bgr"), transparency=1), background=(1, 2, 3)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("broken", "note"),
    [
        (b"no profile at all", "damaged"),
        (rgb_profile()[:150], "damaged"),
        (SRGB[:40] + bytes(20) + SRGB[60:], ""),
        (cmyk_profile(), "is for CMYK, not RGB"),
        (grey_profile(1), "is for GRAY, not RGB"),
        (bytes(5_000_000), "damaged"),
    ],
)
def test_a_broken_profile_is_passed_over_with_a_note(broken: bytes, note: str) -> None:
    picture = scene(64, 64)
    data = encoded(picture, "WEBP", lossless=True, icc_profile=broken)
    assert np.array_equal(np.asarray(decode(data, WHITE)), np.asarray(picture))
    judged = judge(data, {}, CleanConfig(), Tools.of(CleanConfig()))
    assert judged.finding is None
    assert judged.facts is not None
    assert note in judged.facts.note


def jpegs() -> dict[str, tuple[bytes, bool]]:
    """JPEGs, and whether the fast decoder may have them."""
    picture = scene(203, 155)
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    return {
        "plain": (encoded(picture, "JPEG", quality=85), True),
        "4:4:4": (encoded(picture, "JPEG", quality=85, subsampling=0), True),
        "4:2:2": (encoded(picture, "JPEG", quality=60, subsampling=1), True),
        "progressive": (encoded(picture, "JPEG", progressive=True), True),
        "grey": (encoded(picture.convert("L"), "JPEG"), True),
        "rgb": (encoded(picture, "JPEG", keep_rgb=True), True),
        "upright": (encoded(picture, "JPEG", exif=upright), True),
        "srgb": (encoded(picture, "JPEG", icc_profile=SRGB), True),
        "damaged profile": (encoded(picture, "JPEG", icc_profile=b"nothing"), True),
        "mpo": (encoded(picture, "MPO", save_all=True, append_images=[picture]), True),
        "turned": (encoded(picture, "JPEG", exif=turned), False),
        "other primaries": (encoded(picture, "JPEG", icc_profile=rgb_profile("bgr")), False),
        "grey profile": (encoded(picture.convert("L"), "JPEG", icc_profile=grey_profile(1)), False),
        "inks": (encoded(picture.convert("CMYK"), "JPEG"), False),
    }


@pytest.mark.parametrize("name", jpegs())
def test_the_fast_decoder_may_have_what_it_shows_rightly(name: str) -> None:
    data, direct = jpegs()[name]
    assert facts(data).direct == direct
    shown = decode(data, WHITE)
    assert (facts(data).width, facts(data).height) == shown.size
    if direct:
        fast = decode_jpeg(data, grey=False).convert("RGB")
        assert np.array_equal(np.asarray(fast), np.asarray(shown))


@pytest.mark.parametrize("name", jpegs())
def test_cleaning_sees_the_picture_that_decoding_shows(name: str) -> None:
    data, _ = jpegs()[name]
    config, tools = CleanConfig(), Tools.of(CleanConfig())
    seen = judge(data, {}, config, tools)
    shown = judge(encoded(decode(data, WHITE)), {}, config, tools)
    assert seen.finding is None
    assert seen.measures.thumbnail == shown.measures.thumbnail
    assert seen.measures.phash == shown.measures.phash
    assert seen.measures.sharpness == pytest.approx(shown.measures.sharpness, rel=1e-3)


def test_pictures_are_stored_as_they_came() -> None:
    data = encoded(scene(64, 64).convert("RGBA"))
    stored, same = normalise(data, facts(data), OriginalStore(), WHITE)
    assert stored is data
    assert same == facts(data)


@pytest.mark.parametrize("name", jpegs())
def test_pictures_stored_as_jpeg_need_the_fast_decoder_only(name: str) -> None:
    data, direct = jpegs()[name]
    stored, now = normalise(data, facts(data), JpegStore(), WHITE)
    assert (stored is data) == direct
    assert now.direct
    assert now == facts(stored)
    assert not open_header(stored).info.get("icc_profile") or direct
    difference = np.asarray(decode(stored, WHITE), int) - np.asarray(decode(data, WHITE), int)
    assert np.abs(difference).mean() < 3


def test_what_is_larger_than_wanted_is_stored_smaller() -> None:
    data = encoded(scene(203, 155).convert("RGBA"), "PNG")
    stored, now = normalise(data, facts(data), JpegStore(max_side_px=64), WHITE)
    assert (now.width, now.height, now.kind) == (84, 64, "jpg")
    assert decode(stored, WHITE).size == (84, 64)
    plain = encoded(scene(203, 155), "JPEG")
    assert normalise(plain, facts(plain), JpegStore(max_side_px=155), WHITE)[0] is plain
    assert normalise(plain, facts(plain), JpegStore(max_side_px=154), WHITE)[1].height == 154
    again, _ = normalise(data, facts(data), JpegStore(max_side_px=64), WHITE)
    assert again == stored  # builds are repeated byte for byte


def test_hidden_colours_and_the_background_end_in_the_stored_jpeg() -> None:
    picture = scene(64, 64).convert("RGBA")
    picture.putalpha(0)
    stored, _ = normalise(encoded(picture), facts(encoded(picture)), JpegStore(), (10, 200, 30))
    with Image.open(io.BytesIO(stored)) as shown:
        assert np.abs(np.asarray(shown, int) - (10, 200, 30)).max() <= 3
