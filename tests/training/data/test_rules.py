"""Rules about one picture: what each drops, and what it lets pass, with pictures as they come in files."""

import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.training.data.scenes import chunk, encoded, scene, with_chunk
from training.data.clean import CleanConfig, Judgement, Tools, judge
from training.data.clean.content import ContentConfig
from training.data.clean.decoding import DecodingConfig
from training.data.clean.frames import frames_of
from training.data.clean.size import SizeConfig
from training.data.decode import open_header

TOOLS = Tools.of(CleanConfig())


def verdict(data: bytes, config: CleanConfig | None = None, background: tuple[int, int, int] = (255, 255, 255)) -> str:
    """The rule that drops it, or ``""``."""
    judged = judged_by(data, config, background)
    return judged.finding.rule if judged.finding else ""


def judged_by(data: bytes, config: CleanConfig | None, background: tuple[int, int, int] = (255, 255, 255)) -> Judgement:
    return judge(data, {"caption": "a scene"}, config or CleanConfig(), TOOLS, background)


def test_banners_are_dropped_and_panoramas_stay() -> None:
    assert verdict(encoded(scene(800, 100))) == ""
    finding = judged_by(encoded(scene(810, 100)), None).finding
    assert finding is not None
    assert (finding.rule, finding.value, finding.threshold) == ("extreme_aspect", 8.1, 8.0)
    assert verdict(encoded(scene(100, 810))) == "extreme_aspect"
    assert verdict(encoded(scene(810, 100)), CleanConfig(size=SizeConfig(max_aspect=9))) == ""


@pytest.mark.parametrize("level", [0, 128, 255])
def test_one_colour_is_no_picture_even_with_a_sensors_noise(level: int) -> None:
    noise = np.random.default_rng(0).normal(level, 6, (256, 256, 3))
    data = encoded(Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)), "JPEG", quality=95)
    finding = judged_by(data, None).finding
    assert finding is not None
    assert finding.rule == "uniform"
    assert finding.value is not None
    assert finding.threshold == 2.0
    assert 0 <= finding.value < 2.0
    assert verdict(data, CleanConfig(content=ContentConfig(min_spread=0))) == ""


def test_a_small_mark_on_white_is_a_picture() -> None:
    page = Image.new("L", (512, 512), 255)
    page.paste(0, (250, 250, 290, 260))
    assert verdict(encoded(page)) == ""
    faint = Image.new("RGB", (64, 64), (200, 200, 200))
    faint.paste((200, 200, 212), (0, 0, 32, 64))  # differs in one channel only
    assert verdict(encoded(faint), CleanConfig(content=ContentConfig(min_sharpness=0))) == ""


def test_transparency_is_judged_as_it_will_be_seen() -> None:
    white = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    white.paste((255, 255, 255, 255), (32, 32, 96, 96))
    assert verdict(encoded(white)) == "uniform"
    assert verdict(encoded(white), background=(0, 0, 0)) == ""
    hidden = scene(128, 128).convert("RGBA")
    hidden.putalpha(0)
    assert verdict(encoded(hidden)) == "uniform"


def test_blurred_pictures_are_dropped_whatever_their_size() -> None:
    sharp = scene(2048, 1536).reduce(2)
    measured = []
    for factor in (1.0, 0.5, 0.35):
        size = (round(1024 * factor), round(768 * factor))
        smaller = sharp.resize(size, Image.Resampling.LANCZOS)
        soft = smaller.filter(ImageFilter.GaussianBlur(16 * factor))
        kept, dropped = judged_by(encoded(smaller), None), judged_by(encoded(soft), None)
        assert kept.finding is None
        assert dropped.finding is not None
        assert dropped.finding.rule == "blurred"
        assert dropped.finding.threshold == 3.0
        assert dropped.finding.value == dropped.measures.sharpness
        measured.append(kept.measures.sharpness or 0.0)
    assert max(measured) < 1.35 * min(measured)


def test_animations_show_their_first_frame_or_are_refused() -> None:
    frames = [scene(64, 64, seed) for seed in range(5)]
    still = {"GIF": {}, "PNG": {}, "WEBP": {"lossless": True}}
    refuse = CleanConfig(decoding=DecodingConfig(animations="refuse"))
    few = CleanConfig(decoding=DecodingConfig(max_frames=4))
    for kind, options in still.items():
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert frames_of(moving, open_header(moving), 100) == 5
        assert verdict(moving) == ""
        assert verdict(encoded(frames[0], kind, **options), refuse) == ""
        finding = judged_by(moving, refuse).finding
        assert finding is not None
        assert (finding.rule, finding.value, finding.threshold) == ("animated", 5, 1)
        assert verdict(moving, few) == "too_many_frames"


def test_a_bomb_of_frames_is_counted_no_further_than_it_matters() -> None:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 20, 20, 0) + b"\x02\x02\x4c\x01\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", 20, 20, 0x80, 0, 0) + bytes(6)
    bomb = head + frame * 500_000 + b";"
    assert frames_of(bomb, open_header(bomb), 1001) == 1001
    assert verdict(bomb) == "too_many_frames"


def test_text_and_profiles_that_unpack_into_far_more_are_dropped() -> None:
    png, much = encoded(scene(64, 64)), zlib.compress(bytes(80_000_000), 9)
    assert len(much) < 100_000
    assert verdict(with_chunk(png, b"zTXt", b"a\0\0" + much)) == "unpacks_too_far"
    assert verdict(with_chunk(png, b"zTXt", b"a\0\0" + much, at_end=True)) == "unpacks_too_far"
    assert verdict(with_chunk(png, b"iTXt", b"a\0\1\0\0\0" + much)) == "unpacks_too_far"
    assert verdict(with_chunk(png, b"iCCP", b"a\0\0" + much)) == "unpacks_too_far"
    many = png
    for _ in range(70):
        many = with_chunk(many, b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    finding = judged_by(many, None).finding
    assert finding is not None
    assert finding.rule == "unpacks_too_far"
    assert finding.value is not None
    assert finding.threshold is not None
    assert finding.value > finding.threshold
    assert verdict(with_chunk(png, b"zTXt", b"a\0\0" + zlib.compress(b"a comment"))) == ""


def test_a_header_that_promises_too_much_is_believed_unread() -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    finding = judged_by(bomb, None).finding
    assert finding is not None
    assert (finding.rule, finding.value, finding.threshold) == ("too_many_pixels", 9e8, 64e6)
    large = judged_by(encoded(scene(200, 100)), CleanConfig(size=SizeConfig(max_pixels=19_999))).finding
    assert large is not None
    assert (large.value, large.threshold) == (20_000, 19_999)


def test_a_jpeg_of_a_thousand_scans_is_dropped_before_decoding() -> None:
    data = encoded(scene(64, 64), "JPEG", progressive=True)
    assert verdict(data) == ""
    last = data.rindex(b"\xff\xda")
    finding = judged_by(data[:-2] + data[last:-2] * 1000 + data[-2:], None).finding
    assert finding is not None
    assert (finding.rule, finding.threshold) == ("too_many_scans", 100)
    assert finding.value is not None
    assert finding.value > 1000
    plain = encoded(scene(64, 64), "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 200)
    assert verdict(plain) == ""  # marks in metadata are no scans


def test_every_picture_is_measured() -> None:
    measures = judged_by(encoded(scene()), None).measures
    assert measures.phash is not None
    assert 0 <= measures.phash < 2**64
    assert len(measures.thumbnail or b"") == 384
    assert (measures.unsafe, measures.features, measures.caption_match) == (None, None, None)


def test_grey_and_colour_files_of_one_picture_measure_alike() -> None:
    grey = scene(300, 200).convert("L")
    one, other = (judged_by(encoded(picture, "JPEG", quality=95), None) for picture in (grey, grey.convert("RGB")))
    assert one.measures.spread == pytest.approx(other.measures.spread, abs=0.5)
    assert one.measures.sharpness == pytest.approx(other.measures.sharpness, rel=0.05)
    assert ((one.measures.phash or 0) ^ (other.measures.phash or 0)).bit_count() <= 2


def test_threads_judge_alike() -> None:
    files = [encoded(scene(200, 150, seed), kind) for seed in range(4) for kind in ("PNG", "JPEG", "WEBP")]
    alone = [judged_by(data, None).measures for data in files]
    together: dict[int, list[object]] = {}

    def work(number: int) -> None:
        together[number] = [judged_by(data, None).measures for data in files]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(4)] == [alone] * 4


def test_judging_without_models_imports_none() -> None:
    script = (
        "import sys; from training.data.clean import CleanConfig, Tools, judge;"
        "judge(b'', {}, CleanConfig(), Tools.of(CleanConfig()));"
        "print(sorted({'torch', 'onnxruntime', 'transformers', 'pyarrow', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
