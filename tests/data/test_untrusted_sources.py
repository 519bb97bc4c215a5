"""Archives and servers that would lead elsewhere: nothing is unpacked, no link followed, no file of this machine fetched."""

from __future__ import annotations

import http.server
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genscale.data.images import sources as image_sources
from genscale.data.images.shards import ImageSpec, ImageTableShard
from genscale.data.images.sources import open_images
from genscale.data.text.data import TextData, TextDataSettings
from genscale.errors import UserError

ORDER = image_sources.Order(0.0, 4, 1, 1)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), number).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_members_of_a_tar_stay_in_it(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(99))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = tmp_path / "deep" / "er" / f"bad{suffix}"
    names = ["../../escaped.png", f"{tmp_path}/absolute.png", "plain.png", "./dot/../../up.png"]
    with tarfile.open(path, "w:gz" if suffix == ".tar.gz" else "w") as archive:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.CHRTYPE, "device.png"),
                           (tarfile.FIFOTYPE, "pipe.png"), (tarfile.DIRTYPE, "folder.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    found = open_images(ImageSpec("data.source", str(path)), ORDER, 1).training
    assert [found.read(i) for i in range(len(found))] == [png(number) for number in range(len(names))]
    assert sorted(tmp_path.rglob("*")) == before


def test_members_of_a_npz_stay_in_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    arrays = {"images": np.zeros((3, 4, 4), np.uint8), "../escaped": np.ones(3), "/tmp/absolute": np.ones(3)}
    np.savez(tmp_path / "deep" / "bad.npz", **arrays)
    before = sorted(tmp_path.rglob("*"))
    found = open_images(ImageSpec("data.source", str(tmp_path / "deep" / "bad.npz")), ORDER, 1).training
    assert len(found) == 3 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("scheme", ["file", "ftp"])
def test_a_redirect_leads_to_no_file_of_this_machine(tmp_path: Path, serve, scheme: str) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n' * 100)

    class Redirect(http.server.BaseHTTPRequestHandler):
        def __init__(self, *arguments: object, directory: str) -> None:
            super().__init__(*arguments)

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{scheme}://{'' if scheme == 'file' else '127.0.0.1'}{tmp_path}/secret.jsonl")
            self.send_header("Content-Length", "0")
            self.end_headers()

    url, _ = serve(tmp_path, handler=Redirect)
    with pytest.raises(UserError, match=f"data.source={url}/a.jsonl: cannot be read"):
        TextData(TextDataSettings(source=f"{url}/a.jsonl", lanes=2), seed=1)


def table_of(*paths: str) -> bytes:
    """A parquet file that names images by their path."""
    file = io.BytesIO()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": path} for path in paths], kind)}), file)
    return file.getvalue()


def test_a_table_at_a_url_leads_nowhere(tmp_path: Path, serve) -> None:
    url, asked = serve(tmp_path)
    (tmp_path / "0.png").write_bytes(png(0))
    for path in (f"{url}/0.png", "0.png", str(tmp_path / "0.png")):
        (tmp_path / "a.parquet").write_bytes(table_of(path))
        with pytest.raises(UserError, match=f"data.source={url}/a.parquet: row 0 of .*a.parquet names the file {path}, which "
                                            "is not read for a table at a URL"):
            open_images(ImageSpec("data.source", f"{url}/a.parquet"), ORDER, 1)
    assert {path for path, *_ in asked} == {"/a.parquet"}


HUB_SCRIPT = """
from genscale.data.images.shards import ImageSpec
from genscale.data.images.sources import find_shards
for shard in find_shards(ImageSpec("data.source", "someone/pictures"))[0]:
    for row in shard.rows():
        print(row.document.content.hex())
"""


@pytest.mark.parametrize("path", ["{}/secret.png", "hf://datasets/someone/private@main/0.png",
                                  "hf://datasets/someone/pictures@main/../../private/resolve/main/0.png",
                                  "hf://datasets/someone/pictures-private@main/0.png", "https://127.0.0.1:9/0.png",
                                  "{}/secret.png::hf://datasets/someone/pictures@main/0.png", "0.png"])
def test_a_table_of_the_hub_stays_in_its_dataset(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(99))
    path = path.format(tmp_path)
    shard = ImageTableShard("someone/pictures@main", 0, ImageSpec("data.source", "someone/pictures"))
    table = pq.read_table(io.BytesIO(table_of(path)))
    with pytest.raises(UserError) as caught:
        shard.documents(table, 0, 0, 1)
    assert str(caught.value).startswith(f"data.source=someone/pictures: row 0 of someone/pictures@main names the file {path}, "
                                        "which is not in the hub dataset someone/pictures")


def test_a_table_of_the_hub_names_files_of_its_dataset(tmp_path: Path, serve_hub, python_process) -> None:
    own = [f"hf://datasets/someone/pictures@{'c' * 40}/{name}" for name in ("0.png", "images/1.png")]
    files = {"train-0.parquet": table_of(*own), "0.png": png(0), "images/1.png": png(1)}
    said = python_process(HUB_SCRIPT, HF_ENDPOINT=serve_hub("someone/pictures", files), HF_HOME=str(tmp_path),
                          HF_HUB_OFFLINE="0", cwd=tmp_path)
    assert [bytes.fromhex(line) for line in said.split()] == [png(0), png(1)]
