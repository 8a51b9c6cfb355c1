"""Hostile and broken files, each with what must become of it: ``python -m tests.training.data.hostile FOLDER``.

``FOLDER/pictures`` is a source, ``FOLDER/listed/rows.jsonl`` another, and each tar of ``FOLDER/tars`` one of its own.
Expectations hold for the default rules, and are written to ``FOLDER/expected.json``: by source, the ledger's names
with their rule, or null for what is kept.
Nothing here is random: equal calls write equal bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFilter, PngImagePlugin

Expected = dict[str, str | None]
"""The rule expected by the ledger's name; None for what is kept."""

FORBIDDEN = b"must never be read"
"""The content of files outside the sources, to which links and names in them point."""


def photo(number: int, size: tuple[int, int] = (96, 72), detail: int = 6) -> Image.Image:
    """A picture with shapes and shades like a photograph's, another one for each number."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (detail, detail, 3), dtype=np.uint8)
    fine = rng.integers(-12, 13, (size[1], size[0], 3))
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(np.clip(smooth + fine, 0, 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes, *, sound: bool = True) -> bytes:
    crc = zlib.crc32(kind + data) if sound else 0xBAD
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def after_header(png: bytes, chunk: bytes) -> bytes:
    """A PNG with one more chunk behind its IHDR."""
    return png[:33] + chunk + png[33:]


def header_bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that says it has this many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def broken_pictures() -> dict[str, tuple[bytes, str | None]]:
    """Files that are damaged, or no pictures."""
    jpeg, png, webp, gif = (encoded(photo(n), kind) for n, kind in enumerate(("JPEG", "PNG", "WEBP", "GIF"), 10))
    wrong_crc = png[:29] + b"\0\0\0\0" + png[33:]
    wrong_data = bytearray(png)
    wrong_data[len(png) // 2] ^= 0xFF
    ended_early = jpeg[: len(jpeg) // 2] + b"\xff\xd9"
    noise = jpeg[:-2] + b"\x12" * 50 + jpeg[-2:]
    text_bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9))
    icc_bomb = png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(80_000_000), 9))
    frames = [photo(40 + n, (32, 32)).quantize(8) for n in range(4)]
    many = encoded(frames[0], "GIF", save_all=True, append_images=[frames[n % 4] for n in range(1200)], duration=20)
    scans = encoded(photo(15), "JPEG", progressive=True)
    start = scans.rindex(b"\xff\xda")
    return {
        "cut.jpg": (jpeg[: len(jpeg) * 2 // 3], "truncated"),
        "cut.png": (png[: len(png) * 2 // 3], "truncated"),
        "cut.webp": (webp[: len(webp) * 2 // 3], "undecodable"),  # WebP's decoder does not even open it
        "cut.gif": (gif[: len(gif) * 2 // 3], "truncated"),
        "cut_in_header.png": (png[:20], "undecodable"),
        "ended_early.jpg": (ended_early, "damaged_jpeg"),
        "noise_at_its_end.jpg": (noise, "damaged_jpeg"),
        "wrong_header_crc.png": (wrong_crc, "undecodable"),
        "wrong_data_crc.png": (bytes(wrong_data), "corrupt"),
        "wrong_magic.png": (b"\x89PNX" + png[4:], "undecodable"),
        "empty.png": (b"", "undecodable"),
        "text.jpg": (b"this is no picture\n" * 40, "undecodable"),
        "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "undecodable"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "undecodable"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\nshowpage\n", "undecodable"),
        "payload.pkl": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "unsafe_member"),
        "header_bomb.png": (header_bomb(60_000, 60_000), "too_many_pixels"),
        "real_bomb.png": (encoded(Image.new("1", (9_000, 9_000)), "PNG"), "too_many_pixels"),
        "text_bomb.png": (after_header(png, text_bomb), "unpacks_too_far"),
        "profile_bomb.png": (after_header(png, icc_bomb), "unpacks_too_far"),
        "many_frames.gif": (many, "too_many_frames"),
        "many_scans.jpg": (scans[:start] + scans[start:-2] * 150 + scans[-2:], "too_many_scans"),
        "one_pixel.png": (encoded(photo(16, (1, 1)), "PNG"), "too_small"),
        "small_side.png": (encoded(photo(17, (64, 15)), "PNG"), "too_small"),
        "ruler.png": (encoded(photo(18, (4000, 2)), "PNG"), "too_small"),
        "banner.png": (encoded(photo(19, (400, 20)), "PNG"), "extreme_aspect"),
        "white.png": (encoded(Image.new("RGB", (64, 64), "white"), "PNG"), "uniform"),
        "clear.png": (encoded(Image.new("RGBA", (64, 64), (200, 10, 10, 0)), "PNG"), "uniform"),
    }


def odd_pictures() -> dict[str, tuple[bytes, str | None]]:
    """Pictures that are unusual and good."""
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "steps: 20 " * 2000)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = np.asarray(photo(24).convert("L")).astype(np.uint16) * 257
    cut_out = photo(25).convert("RGBA")
    cut_out.putalpha(photo(26).convert("L"))
    frames = [photo(30 + n) for n in range(3)]
    palette = photo(27).quantize(32)
    return {
        "with_text.png": (encoded(photo(20), "PNG", pnginfo=text), None),
        "with_profile.jpg": (encoded(photo(21), "JPEG", icc_profile=profile), None),
        "with_broken_profile.png": (encoded(photo(22), "PNG", icc_profile=b"no profile at all"), None),
        "turned.jpg": (encoded(photo(23), "JPEG", exif=turned), None),
        "sixteen_bit.png": (encoded(Image.fromarray(grey), "PNG"), None),
        "transparent.png": (encoded(cut_out, "PNG"), None),
        "palette.png": (encoded(palette, "PNG", transparency=3), None),
        "inks.jpg": (encoded(photo(28).convert("CMYK"), "JPEG"), None),
        "grey.jpg": (encoded(photo(29).convert("L"), "JPEG"), None),
        "two_level.png": (encoded(photo(33).convert("1"), "PNG"), None),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "animated.webp": (encoded(photo(34), "WEBP", save_all=True, append_images=[photo(35)], lossless=True), None),
        "blurred.jpg": (encoded(photo(36).filter(ImageFilter.GaussianBlur(8)), "JPEG"), None),  # the rule is off
        "wrong_ending.png": (encoded(photo(37), "JPEG"), None),
        "no_ending": (encoded(photo(38), "PNG"), None),
        "bitmap.bmp": (encoded(photo(39), "BMP"), None),
    }


def duplicates() -> dict[str, tuple[bytes, str | None]]:
    """Copies; the first by name stays."""
    first = encoded(photo(51, (200, 150)), "PNG")
    smaller = photo(51, (200, 150)).resize((160, 120), Image.Resampling.LANCZOS)
    return {
        "d1_first.png": (first, None),
        "d2_same_bytes.png": (first, "exact_duplicate"),
        "d3_as_jpeg.jpg": (encoded(photo(51, (200, 150)), "JPEG", quality=80), "near_duplicate"),
        "d4_smaller.webp": (encoded(smaller, "WEBP", quality=85), "near_duplicate"),
    }


def bad_sidecars() -> dict[str, tuple[bytes, str | None]]:
    """Sidecars that cannot be what they say; the picture is dropped with them, for nobody knows what it is."""
    sidecars = {
        "s_array.json": b'["a caption"]',
        "s_nan.json": b'{"caption": "a", "score": NaN}',
        "s_infinite.json": b'{"caption": "a", "score": 1e999}',
        "s_cut.json": b'{"caption": "a',
        "s_deep.json": b'{"caption": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "s_number.json": b'{"caption": 7}',
        "s_latin.txt": "caf\u00e9".encode("latin-1"),
        "s_huge.txt": b"word " * 400_000,
    }
    found: dict[str, tuple[bytes, str | None]] = {}
    for number, (name, data) in enumerate(sidecars.items()):
        found[f"{Path(name).stem}.png"] = encoded(photo(60 + number), "PNG"), "bad_sidecar"
        found[name] = data, "(a sidecar)"
    found["alone.txt"] = b"a caption of nothing", "sidecar_without_image"
    found["markup.png"] = encoded(photo(70), "PNG"), None
    found["markup.txt"] = b"<script>alert(1)</script> \x1b[31m \xe2\x80\xaeesrever", "(a sidecar)"
    return found


def write_pictures(folder: Path) -> Expected:
    """The folder of hostile files; beside it lie files that nothing may read.

    Returns:
        What is expected, by the ledger's name.
    """
    folder.mkdir(parents=True)
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.png").write_bytes(FORBIDDEN)
    expected: Expected = {}
    for files in (broken_pictures(), odd_pictures(), duplicates(), bad_sidecars()):
        for name, (data, rule) in files.items():
            (folder / name).write_bytes(data)
            if rule != "(a sidecar)":
                expected[name] = rule
    return expected | _names(folder) | _specials(folder, outside)


def _names(folder: Path) -> Expected:
    """Good pictures with names that hurt terminals, pages and file systems; the ledger's names are printable."""
    replaced = "\N{REPLACEMENT CHARACTER}"
    names = {
        b"bell\a.png": f"bell{replaced}.png",
        b"red\x1b[31m.png": f"red{replaced}[31m.png",
        b"new\nline.png": f"new{replaced}line.png",
        "right\u202egnp.png".encode(): f"right{replaced}gnp.png",
        "combining\u0301\u0301\u0301.png".encode(): "combining\u0301\u0301\u0301.png",
        b"not utf-8 \xff\xfe.png": "not utf-8 ??.png",
        b"<img src=x onerror=alert(1)>.png": "<img src=x onerror=alert(1)>.png",
        b"{{ 7 * 7 }}.png": "{{ 7 * 7 }}.png",
        b"' OR 1=1; --.png": "' OR 1=1; --.png",
        b"-rf.png": "-rf.png",
        b"n" * 250 + b".png": "n" * 250 + ".png",
    }
    for number, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(encoded(photo(80 + number), "PNG"))
    return dict.fromkeys(names.values())


def _specials(folder: Path, outside: Path) -> Expected:
    """What looks like a file and is none."""
    (folder / "link_inside.png").symlink_to("d1_first.png")
    (folder / "link_outside.png").symlink_to(outside / "secret.png")
    (folder / "link_to_password.png").symlink_to("/etc/passwd")
    (folder / "link_to_device.png").symlink_to("/dev/zero")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "linked_folder").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    expected: Expected = {
        "link_inside.png": "exact_duplicate",
        "link_outside.png": "outside_source",
        "link_to_password.png": "outside_source",
        "link_to_device.png": "outside_source",
        "dangling.png": "missing_file",
        "loop.png": "unreadable",
        "linked_folder": "not_a_file",
        "pipe.png": "not_a_file",
    }
    if os.geteuid() != 0:  # no mode keeps root out
        (folder / "closed.png").write_bytes(encoded(photo(79), "PNG"))
        (folder / "closed.png").chmod(0)
        expected["closed.png"] = "unreadable"
    return expected


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def _tar(members: list[tuple[str | tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name) if isinstance(name, str) else name
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def hostile_members(outside: Path) -> tuple[bytes, Expected]:
    """One tar with a good picture and every kind of bad member."""
    good = [encoded(photo(100 + number), "PNG") for number in range(8)]
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        ("good.png", good[0]),
        ("good.json", b'{"caption": "fine"}'),
        (f"{outside}/absolute.png", good[1]),
        ("../climbs.png", good[2]),
        ("a/../../climbs.png", good[3]),
        ("back\\slash.png", good[4]),
        ("good.png", good[5]),
        ("payload.pkl", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        (_special("soft.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (_special("hard.png", tarfile.LNKTYPE, "good.png"), b""),
        (_special("character", tarfile.CHRTYPE), b""),
        (_special("block", tarfile.BLKTYPE), b""),
        (_special("pipe", tarfile.FIFOTYPE), b""),
        (_special("folder", tarfile.DIRTYPE), b""),
        ("cut.jpg", encoded(photo(109), "JPEG")[:700]),
        ("last.png", good[6]),
    ]
    return _tar(members), {
        "good.png": None,
        f"{outside}/absolute.png": "unsafe_name",
        "../climbs.png": "unsafe_name",
        "a/../../climbs.png": "unsafe_name",
        "back\\slash.png": "unsafe_name",
        "good.png (#2)": "duplicate_name",
        "payload.pkl": "unsafe_member",
        "soft.png": "not_a_file",
        "hard.png": "not_a_file",
        "character": "not_a_file",
        "block": "not_a_file",
        "pipe": "not_a_file",
        "cut.jpg": "truncated",
        "last.png": None,
    }


def lying_tars() -> dict[str, tuple[bytes, Expected | None]]:
    """Tars that are damaged; those with None are refused as a whole."""
    whole = _tar([(f"{number}.png", encoded(photo(110 + number), "PNG")) for number in range(3)])
    kept: Expected = {"0.png": None, "1.png": None}
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        third = archive.getmembers()[2]
    header = bytearray(whole[third.offset : third.offset + 512])
    header[124:136] = b"77777777777\0"  # 8 GiB
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    lie = whole[: third.offset] + bytes(header) + whole[third.offset + 512 :]
    garbage = whole[: third.offset] + b"\xaa" * 512 + whole[third.offset + 512 :]
    bomb = gzip.compress(bytes(200_000_000), 9, mtime=0)
    return {
        "size_lie.tar": (lie, kept | {"2.png": "damaged_tar", "(rest of the tar)": "damaged_tar"}),
        "garbage_header.tar": (garbage, kept | {"(rest of the tar)": "damaged_tar"}),
        "cut.tar": (
            whole[: third.offset_data + 50],
            kept | {"2.png": "damaged_tar", "(rest of the tar)": "damaged_tar"},
        ),
        "gzip_bomb.tar": (bomb, None),
        "empty.tar": (b"", None),
    }


def write_manifest(folder: Path, outside: Path) -> Expected:
    """A manifest with rows that lead elsewhere or nowhere, or are no rows; its pictures lie beside it."""
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded(photo(120), "PNG"))
    rows = [
        '{"file": "good.png", "caption": "one caption"}',
        '{"file": "good.png", "caption": "another caption of the same picture"}',
        '{"file": "../outside/secret.png", "caption": "climbs"}',
        json.dumps({"file": f"{outside}/secret.png", "caption": "absolute"}),
        '{"file": "missing.png", "caption": "nowhere"}',
        '{"file": "good.png", "caption": ["a", "list"]}',
        '{"file": 7}',
        '{"caption": "of nothing"}',
        '{"file": "good.png", "score": NaN}',
        '["good.png"]',
        "no JSON",
        '{"file": "a\\u0000b.png"}',
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    expected: Expected = {
        "good.png": None,
        "../outside/secret.png": "outside_source",
        f"{outside}/secret.png": "outside_source",
        "missing.png": "missing_file",
        "a\N{REPLACEMENT CHARACTER}b.png": "unreadable",
    }
    return expected | {f"rows.jsonl:{line}": "bad_row" for line in range(6, 12)}


def write(folder: Path) -> dict[str, Expected | None]:
    """Everything; returns what is expected by source, relative to ``folder``."""
    expected: dict[str, Expected | None] = {"pictures": write_pictures(folder / "pictures")}
    expected["listed/rows.jsonl"] = write_manifest(folder / "listed", folder / "outside")
    (folder / "tars").mkdir()
    members, rules = hostile_members(folder / "outside")
    for name, (data, told) in {"members.tar": (members, rules), **lying_tars()}.items():
        (folder / "tars" / name).write_bytes(data)
        expected[f"tars/{name}"] = told
    (folder / "expected.json").write_text(json.dumps(expected, indent=2, sort_keys=True))
    return expected


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if place.exists():
        sys.exit(f"{place} is there already; give the name of a new folder")
    try:
        for source, rules in write(place).items():
            told = (
                "refused as a whole"
                if rules is None
                else f"{len(rules)} inputs, {list(rules.values()).count(None)} kept"
            )
            sys.stdout.write(f"{place / source}: {told}\n")
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
