"""A hub dataset end to end, through a small server that speaks as much of the hub's API as `datasets` uses."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from genscale.data.columns import Spec
from genscale.data.readers import find_shards
from genscale.data.sources import text_hash
from genscale.errors import UserError

NAME, COMMIT = "someone/corpus", "c" * 40
TEXTS = [f"document {i} of the hub" for i in range(300)]
FILES = {"train-0.jsonl": TEXTS[:150], "train-1.jsonl": TEXTS[150:], "validation.jsonl": ["a validation text", "and another"]}
CONTENT = {name: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode() for name, texts in FILES.items()}

SCRIPT = """
import json, sys
from genscale.data.text import TextData, TextDataSettings
from genscale.data.text_settings import readings
from genscale.data.text_stream import open_training_source
from genscale.errors import UserError

def read(changes):
    settings = TextDataSettings(**changes)
    source = open_training_source(readings(settings)[0].spec, settings, seed=1)
    lanes = []
    for lane in range(settings.lanes):
        for piece in source.read(lane):
            if piece.place["epoch"]:
                break
            lanes.append(piece.text)
    validation = [sample["tokens"].tolist() for sample in TextData(settings, seed=1).validation()]
    return {"documents": list(source.documents()), "lanes": lanes, "plan": source.plan(), "held": list(source.held_out()),
            "validation": validation}


for changes in json.loads(sys.argv[1]):
    try:
        print(json.dumps(read(changes)))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), Content_Type="application/json", X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        info = f"/api/datasets/{NAME}"
        if path in (info, f"{info}/revision/{COMMIT}"):
            return self._json({"id": NAME, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        if path == f"{info}/tree/{COMMIT}":
            return self._json([{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                               for name, content in CONTENT.items()])
        found = re.fullmatch(f"/datasets/{NAME}/resolve/{COMMIT}/(.+)", path)
        if not found or found[1] not in CONTENT:
            return self._reply(404, X_Error_Code="EntryNotFound" if NAME in path else "RepoNotFound")
        content, wanted = CONTENT[found[1]], self.headers.get("Range")
        start, stop = (int(part) for part in wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(content) - 1)
        stop = min(stop, len(content) - 1)
        self._reply(206 if wanted else 200, content[start : stop + 1], ETag='"1"', X_Repo_Commit=COMMIT,
                    Content_Range=f"bytes {start}-{stop}/{len(content)}")


CASES: dict[str, dict[str, Any]] = {
    "held out": {"validation_fraction": 0.1}, "validation split": {"validation_source": NAME}, "split": {"split": "test"},
    "subset": {"subset": "german"}, "name": {"source": "someone/nothing"}, "column": {"column": "content"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """What one process reads with the settings of each case: the hub's address is fixed when its client is imported."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home),
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_OFFLINE", None)
    settings = [{"source": NAME, "lanes": 4, "sequence_length": 16, "shuffle_window": 8, **case} for case in CASES.values()]
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(settings)], env=environment, capture_output=True, text=True,
                          timeout=240, cwd=home)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    yield dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_hub_dataset_is_streamed_by_split(found: dict[str, dict[str, Any]]) -> None:
    read = found["held out"]
    held = [text for text in TEXTS if text_hash(text) < int(0.1 * 2**64)]
    assert read["held"] == held and 10 < len(held) < 60
    assert read["documents"] == [text for text in TEXTS if text not in held]
    assert sorted(read["lanes"]) == sorted(read["documents"]) != read["lanes"]
    assert read["plan"]["order"] == "stream" and read["plan"]["shards"] == 2  # its files, dealt to the lanes
    assert read["validation"][0] == [token for text in held for token in [*text.encode(), 256]][:17]


def test_the_validation_split_of_a_hub_dataset(found: dict[str, dict[str, Any]]) -> None:
    read = found["validation split"]
    assert read["held"] == [] and read["documents"] == TEXTS
    assert read["validation"][0] == [*b"a validation text"]


@pytest.mark.parametrize(("case", "words"), [
    ("split", ["data.split=test: ", "train", "validation"]), ("subset", ["data.subset=german: "]),
    ("name", ["data.source=someone/nothing: ", "no such dataset on the Hugging Face hub", "HF_TOKEN"]),
    ("column", ["data.column=content: ", "has the columns text"]),
])
def test_mistakes_about_a_hub_dataset_are_one_line(found: dict[str, dict[str, Any]], case: str, words: list[str]) -> None:
    assert all(word in found[case]["error"] for word in words), found[case]["error"]


def test_a_hub_that_does_not_answer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"data.source={NAME}: .*hub cannot be reached.*give the path of a local file"):
        find_shards(Spec("data.source", NAME), at_least=1)
