"""Archives and servers that would lead elsewhere: nothing is unpacked, no link followed, no file of this machine fetched."""

from __future__ import annotations

import http.server
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genscale.data import image_sources
from genscale.data.image_shards import ImageSpec
from genscale.data.image_sources import open_images
from genscale.data.text import TextData, TextDataSettings
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
