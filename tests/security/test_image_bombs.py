"""Small files that ask for much memory: refused or passed over by name, in a process that has little of it."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.images.decoding import DamagedImage, Picture, TooLarge, decode
from genscale.errors import UserError

ROOM = 600 * 2**20
"""Bytes of memory beyond what a process has once everything is imported."""
LIMITED = f"""
import resource, sys
import datasets, numpy, PIL.Image, pyarrow.parquet, sklearn
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.errors import UserError
PIL.Image.init()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {ROOM},) * 2)
for source in sys.argv[1:]:
    try:
        data = ImageData(ImageDataSettings(source=source, size=8, channels=1, lanes=2, bad_share=1.0), 1)
        print(len(data.validation()) + (data.order.count or 0), "images")
    except UserError as error:
        print(error)
"""


def png(number: int, size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), number).save(file, "PNG")
    return file.getvalue()


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def tar_bomb(path: Path) -> Path:
    """700 MB of no image between images."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))
            if number == 10:
                member = tarfile.TarInfo("10.mask.bin")
                member.size = 700_000_000
                archive.addfile(member, Zeros())
    return path


def header_bomb(path: Path) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo("././@LongLink")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1_500_000_000
        archive.addfile(member)
        archive.fileobj.write(bytes(2**20))
    return path


def npz_bomb(path: Path, shape: tuple[int, ...], kind: str = "|u1") -> Path:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": kind})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", file.getvalue())
    return path


def parquet_bomb(path: Path, rows: list[int], size: int) -> Path:
    values = pa.array([*(png(number) for number in range(20)), bytes(size)])
    table = pa.table({"image": pa.DictionaryArray.from_arrays(pa.array(rows, pa.int32()), values)})
    pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**30)
    return path


@pytest.mark.slow  # 10 s, for what has to be packed first
def test_small_files_that_ask_for_much_memory(tmp_path: Path) -> None:
    expected = {
        tar_bomb(tmp_path / "a.tar.gz"): "decompresses to over 200 times its size",
        header_bomb(tmp_path / "b.tar.gz"): "b.tar.gz is damaged or not what its name says (ReadError: a header of 1,500,000,",
        npz_bomb(tmp_path / "a.npz", (40_000_000, 32, 32)): "takes 40,960,000,000 bytes and is too large; give a smaller one",
        npz_bomb(tmp_path / "b.npz", (4_000_000, 32, 32)): "images is uint8 (4000000, 32, 32), for which 128 bytes are not",
        npz_bomb(tmp_path / "c.npz", (2**62, 2**62, 2**62)): "and is too large",
        parquet_bomb(tmp_path / "a.parquet", [20], 300_000_000): "the images of a.parquet are too large: 300,0",
        parquet_bomb(tmp_path / "b.parquet", [*range(20), *[20] * 12], 60_000_000): None,
    }
    for path in expected:
        assert path.stat().st_size < 6_000_000, path
    done = subprocess.run([sys.executable, "-c", LIMITED, *map(str, expected)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for line, (path, words) in zip(done.stdout.splitlines(), expected.items(), strict=True):
        assert words is None or words in line, (path, line)


def test_large_pictures_are_passed_over_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    file = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(file, "PNG")
    (tmp_path / "bomb.png").write_bytes(file.getvalue())
    settings = {"source": str(tmp_path), "size": 4, "channels": 1, "lanes": 1, "bad_share": 1.0}

    def all_of(**changes: Any) -> ImageData:
        data = ImageData(ImageDataSettings(**settings, **changes), 1)
        lane = data.open_lane(0)
        for _ in range(data.order.count):
            next(lane)
        return data

    all_of()
    line, = {record.getMessage() for record in caplog.records if "bomb.png" in record.getMessage()}
    assert "bomb.png is too large (13,000 x 13,000 pixels, and data.max_image_pixels=89,478,485); it is passed over" in line
    with pytest.raises(UserError, match="all of its images that were read cannot be used, the last: .* is too large .4 x 4"):
        all_of(max_image_pixels=9)
    with pytest.raises(UserError, match="is too large .more than data.max_image_bytes=20.; give another"):
        all_of(max_image_bytes=20)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int) -> bytes:
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("size", [(9_460, 9_460), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_the_header_says_how_large_a_picture_is(size: tuple[int, int]) -> None:
    with pytest.raises(TooLarge, match="pixels"):
        decode(png_of(*size), Picture(4, 3))
    if size[0] < 2**20:  # not too large where it is allowed, but not whole
        with pytest.raises(DamagedImage, match="truncated") as caught:
            decode(png_of(9_000, 10), Picture(4, 3, max_pixels=2**30))
        assert not isinstance(caught.value, TooLarge)


def test_what_is_packed_beside_the_pixels_is_bounded() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 30_000_000, zip=True)
    for options in ({"pnginfo": text}, {"icc_profile": bytes(30_000_000)}):
        file = io.BytesIO()
        Image.new("L", (4, 4)).save(file, "PNG", **options)
        with pytest.raises(TooLarge, match="more is packed than Pillow takes"):
            decode(file.getvalue(), Picture(4, 3))


def test_of_many_frames_the_first_is_read() -> None:
    frames = [Image.new("L", (4, 4), shade) for shade in (10, 200, 250)]
    for kind in ("GIF", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        assert np.asarray(decode(file.getvalue(), Picture(4, 1))).max() == 10


@pytest.mark.parametrize(("raw", "said"), [
    (b"", "an empty file"), (b"no image", "no image of a format that is read"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "EPS files are not read"),
])
def test_no_object_of_this_program_is_shown_and_no_other_program_runs(raw: bytes, said: str) -> None:
    with pytest.raises(DamagedImage, match=said):
        decode(raw, Picture(4, 3))


@pytest.mark.parametrize("array", [np.array([1, "a", None], dtype=object), np.array([("a", 1)], dtype="U1,i4"),
                                   np.array(["2020-01-01"], "M8[D]"), np.zeros((3, 2, 2), complex)])
def test_arrays_that_are_no_numbers_are_refused_unread(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", images=array)
    with pytest.raises(UserError, match="the array images of a.npz is .*; it must hold numbers"):
        ImageData(ImageDataSettings(source=str(tmp_path / "a.npz")), 1)
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8), labels=array)
    with pytest.raises(UserError, match="the array labels of a.npz is .*; it must hold whole numbers or texts"):
        ImageData(ImageDataSettings(source=str(tmp_path / "a.npz"), labels=True), 1)


def test_a_file_of_another_kind_is_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4), np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(UserError, match="a.npz cannot be read .*not a zip file"):
        ImageData(ImageDataSettings(source=str(tmp_path / "a.npz")), 1)
