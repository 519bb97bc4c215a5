"""Archives as WebDataset and others write them: names with dots, fields beside the image, what belongs to nothing."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genscale.data.images import sources as image_sources
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.images.shards import ImageSpec, Record, TarShard, _say_once
from genscale.data.source_file import SourceFile
from genscale.errors import UserError


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), number).save(file, "PNG")
    return file.getvalue()


def write(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path, **changes: Any) -> TarShard:
    spec = ImageSpec("data.source", str(path), label="label", **changes)
    return TarShard(path.name, path.stat().st_size, spec, SourceFile.local(path, spec.where))


def found(path: Path) -> list[tuple[str, bytes, Any]]:
    rows = list(shard(path).rows())
    records: list[Record] = [row[1] for row in rows]
    for start in range(len(rows)):  # a reader that begins anywhere finds the same
        row = rows[start]
        assert [later[1] for later in shard(path).rows(row[0], at=row[2])] == records[start:]
    return [(record.name.removesuffix(f" of {path.name}"), record.content, record.label) for record in records]


@pytest.fixture(params=["a.tar", "a.tar.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    _say_once.cache_clear()
    return tmp_path / request.param


def test_names_with_dots_are_names(path: Path) -> None:
    write(path, {f"a/{i}.{j}.{ending}": png(i) if ending == "png" else str(j).encode()
                 for i in range(3) for j in range(30) for ending in ("png", "cls")})
    assert found(path) == [(f"a/{i}.{j}", png(i), j) for i in range(3) for j in range(30)]


def test_mixed_names(path: Path) -> None:
    write(path, {"1.png": png(1), "2.5.png": png(2), "3.x.y.JPG": png(3), "4.png": png(4), "4.cls": b"7"})
    assert found(path) == [("1", png(1), None), ("2.5", png(2), None), ("3.x.y", png(3), None), ("4", png(4), 7)]


def test_other_pictures_of_a_sample_are_none_of_their_own(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, {"1.mask.png": png(9), "1.png": png(1), "1.cls": b"0", "1.txt": b"x", "2.left.png": png(2),
                 "2.right.png": png(3), "2.json": b'{"label": "b"}', "readme.txt": b"x", "notes/b": b"y"})
    assert found(path) == [("1", png(1), 0), ("2.left", png(2), "b"), ("2.right", png(3), "b")]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(f"{path.name}: 3 of its files belong to no image, the first is 1.mask.png; they are passed over")


def test_names_that_come_up_twice_are_refused(path: Path) -> None:
    write(path, [("1.png", png(1)), ("1.png", png(2))])
    with pytest.raises(UserError, match="has 1.png twice"):
        found(path)
    write(path, [(f"{i % 20}.png", png(i)) for i in range(21)])
    with pytest.raises(UserError, match=f"0 of {path.name} comes up twice"):
        ImageData(ImageDataSettings(source=str(path), size=4), 1)


def test_links_and_devices_are_not_followed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.CHRTYPE),
                           ("d.png", tarfile.FIFOTYPE), ("e.png", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
        member = tarfile.TarInfo("f.png")
        member.size = len(png(1))
        archive.addfile(member, io.BytesIO(png(1)))
    assert found(path) == [("f", png(1), None)]
    assert "4 of its files belong to no image, the first is a.png" in caplog.text


def test_what_is_hidden_is_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [".git/1.png", "./a/1.png", "a/._1.png", "__MACOSX/a/1.png", "a/.b/1.png", "../a/2.png", "2.png"]
    write(path, [(name, png(number)) for number, name in enumerate(names)])
    assert [key for key, _, _ in found(path)] == ["./a/1", "../a/2", "2"]
    assert f"{path.name}: 4 of its files belong to no image, the first is .git/1.png" in caplog.text


@pytest.mark.parametrize("member", ["b.bin", "b.png"])
def test_an_archive_that_grows_beyond_all_bounds_is_refused(tmp_path: Path, member: str) -> None:
    source = write(tmp_path / "a.tar.gz", {"1.png": png(1), member: bytes(10**6)})
    assert len(list(shard(source).rows())) > 0  # below the bound it may
    with pytest.raises(UserError, match="data.max_image_bytes=1,000: .*a.tar.gz is too large: it decompresses to over 200 "):
        list(shard(source, max_image_bytes=1000).rows())


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(UserError, match="a.tar is damaged or not what its name says .ReadError: empty file"):
        ImageData(ImageDataSettings(source=str(tmp_path / "a.tar"), labels=True), 1)


def test_a_damaged_header_is_not_the_end(path: Path) -> None:
    write(path, {f"{i}.png": png(i) for i in range(4)})
    with tarfile.open(path) as archive:
        middle = archive.getmembers()[2].offset
        raw = bytearray(archive.fileobj.read() if archive.fileobj.seek(0) == 0 else b"")
    raw[middle + 148 : middle + 156] = b"?" * 8
    import gzip

    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    with pytest.raises(UserError, match=f"{path.name} is damaged or not what its name says .*bad checksum|invalid header"):
        found(path)


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"label": ', b"\xff\xfe", b'{"label": ' + b"9" * 5000 + b"}"])
def test_a_label_that_is_no_json_is_one_line(path: Path, content: bytes) -> None:
    write(path, {"1.png": png(1), "1.json": content})
    with pytest.raises(UserError, match=f"1.json of {path.name} is no JSON"):
        found(path)


def test_relative_paths_beside_a_table_without_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 2**20)
    (tmp_path / "img").mkdir()
    for i in range(20):
        (tmp_path / "img" / f"{i}.png").write_bytes(png(i))
    table = pa.Table.from_pylist([{"image": {"bytes": None, "path": f"img/{i}.png"}, "label": i % 2} for i in range(20)])
    assert pa.types.is_null(table.schema.field("image").type.field("bytes").type)
    pq.write_table(table, tmp_path / "a.parquet")
    data = ImageData(ImageDataSettings(source=str(tmp_path / "a.parquet"), size=4, channels=1, labels=True), 1)
    samples = [*data.validation(), *(next(data.open_lane(lane))[0] for lane in range(data.order.count))]
    assert {(int(sample["image"][0, 0, 0]), int(sample["label"])) for sample in samples} == {(i, i % 2) for i in range(20)}
