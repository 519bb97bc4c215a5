"""Planted tokens and passwords: none of them stands in anything that a run writes or says."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from genscale.checkpoint.checkpoints import find_checkpoints
from genscale.data.readers import find_shards
from genscale.data.spec import Spec
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.masking import masked
from genscale.settings.parser import load_config
from genscale.tracking.run_logging import setup_logging

PLANTED = {"HF_TOKEN": "hf_PlantedHubToken0123456789", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
TOKEN = "PlantedSourceToken123"


@pytest.fixture(scope="module")
def address(tiny_text: Path, tmp_path_factory) -> Iterator[str]:
    """The tiny text on a web server."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "text.txt").write_bytes(tiny_text.read_bytes())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/text.txt"
        server.shutdown()


def assert_nowhere(folder: Path, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for secret in (*PLANTED.values(), TOKEN):
        held = [str(path) for path in files if secret.encode() in path.read_bytes()]
        assert not held, f"{secret} in {held}"
        assert not any(secret in text for text in texts), secret


@pytest.mark.slow
def test_a_run_that_was_given_secrets_writes_none(tiny_settings, genscale_process, genscale, address, tmp_path) -> None:
    """W&B, TensorBoard, checkpoints, the token cache, logs and the trace; then a resume, which needs the address again."""
    settings = {**tiny_settings, "run": {"name": "tiny", "dir": str(tmp_path / "runs"), "trace": True},
                "data": {**tiny_settings["data"], "source": address, "cache": str(tmp_path / "runs" / "cache")},
                "train": {**tiny_settings["train"], "steps": 2, "checkpoint_every": 1},
                "tracking": {"wandb": "offline", "tensorboard": True}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    command = ["train", "--config", tmp_path / "tiny.yaml", "--data.source", f"{address}?v=1&token={TOKEN}"]
    done = genscale_process(*command, **PLANTED)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "tiny"
    assert_nowhere(tmp_path / "runs", done.out, done.err)
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert f"{address}?v=1&token=***" in (run / "config.yaml").read_text()
    # With the address the run goes on; from what it wrote of it, it cannot; and what takes no data does without.
    assert genscale(*command, "--train.steps", 3).code == 0
    assert max(checkpoint.step for checkpoint in find_checkpoints(run)) == 3
    said = genscale("train", "--config", run / "config.yaml", "--train.steps", 4).message()
    assert said.startswith(f"data.source={address}?v=1&token=***: its token was left out when this was written; give the whole")
    assert genscale("sample", run, "--tokens", 3).code == 0
    assert_nowhere(tmp_path / "runs")


@pytest.mark.parametrize("key", ["data.source", "data.validation_source"])
def test_a_password_in_an_address_is_refused_and_not_repeated(refuse, key) -> None:
    said = refuse(f"--{key}", "https://alice:PlantedPassword@example.org/a.txt")
    assert said.startswith(f"{key}=https://***@example.org/a.txt: an address must not hold a user's name or password")
    assert said.endswith("put them into ~/.netrc (machine example.org login USER password PASSWORD) and leave them out here")


def test_a_password_in_a_mixture_is_refused_too(refuse, tiny_config) -> None:
    settings = yaml.safe_load(tiny_config.read_text())
    del settings["data"]["source"]
    settings["data"]["sources"] = [{"source": "https://alice:PlantedPassword@example.org/a.txt", "weight": 1}]
    tiny_config.write_text(yaml.safe_dump(settings))
    said = refuse()
    assert said.startswith("data.sources=https://***@example.org/a.txt: an address must not") and "Planted" not in said


def test_a_password_is_read_from_netrc(tiny_text, tmp_path, monkeypatch) -> None:
    """As the refusal advises; without it the server's refusal says so too."""
    class Guarded(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"alice:PlantedPassword").decode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body) if known else 0))
            self.end_headers()
            self.wfile.write(body if known else b"")

        def log_message(self, *_: object) -> None: ...

    body = tiny_text.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/text.txt"
        spec = Spec("data.source", address)
        with pytest.raises(UserError, match=r"the server answers 401 .*put the user and password of this server into ~/.netrc"):
            find_shards(spec, at_least=1)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login alice password PlantedPassword\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        (shard,) = find_shards(spec, at_least=1)
        assert "\n\n".join(row[1] for row in shard.rows()) == body.decode()
        server.shutdown()


@pytest.mark.parametrize(("text", "safe"), [
    ("get https://a.b/c?X-Amz-Credential=AK&X-Amz-Signature=ab%2Fcd&part=3 now",
     "get https://a.b/c?X-Amz-Credential=***&X-Amz-Signature=***&part=3 now"),
    ("'https://u:p@h.org:80/x?sig=Zz&se=2030'", "'https://***@h.org:80/x?sig=***&se=2030'"),
    ("https://h/x?api_key=1, https://h/y?access-token=2", "https://h/x?api_key=***, https://h/y?access-token=***"),
    ("https://h/tokens/x.txt?author=me&design=2&keyword=cat", "https://h/tokens/x.txt?author=me&design=2&keyword=cat"),
    ("data.source=https://h/x?token=1:2: not found", "data.source=https://h/x?token=***: not found"),
    ("mail me@home.org about a=b?token=c", "mail me@home.org about a=b?token=c"),
    ("https://h/x?jwt=a.b.c&pass=p&hmac=1&session=2&sid=3&k=q&k=7", "https://h/x?jwt=***&pass=***&hmac=***&session=***&sid=***&"
                                                                   "k=***&k=7"),
    ("https://h/x;jsessionid=1A#access_token=z&state=on", "https://h/x;jsessionid=***#access_token=***&state=on"),
    ("s3://AKIDX:s3cr@t@bucket/x and ftp://u@h/y", "s3://***@bucket/x and ftp://***@h/y"),
    ("https://h/eyJhbGciOi.eyJzdWIiOiIx.c2ln/a.txt of hf_abcdefghijklmnopqrstuvwxyz012345", "https://h/***/a.txt of ***"),
    ("https://h/x?auth_key=a&api.key=b&key[]=c&oauth=d&cred=e&pw=f&access_code=g&cookie=h&csrf=i&passcode=j&keys=2",
     "https://h/x?auth_key=***&api.key=***&key[]=***&oauth=***&cred=***&pw=***&access_code=***&cookie=***&csrf=***&passcode=***"
     "&keys=2"),
    ("https://h/x?token='a'b&sig=a,b)c, then", "https://h/x?token=***&sig=***, then"),
    ("https://h/x?hdnts=exp=17~acl=/*~hmac=0a&url=https%3A%2F%2Fg%2F%3Ftoken%3Dz&j=%7B%22key%22%3A1%7D&q=a=b",
     "https://h/x?hdnts=***&url=***&j=***&q=a=b"),
    # By shape: what is drawn by lot, under whatever name; not what says which file is meant.
    ("https://h/x?u=9f86d081884c7d659a2feaa0c55ad015", "https://h/x?u=***"),
    ("https://h/x?q=dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk", "https://h/x?q=***"),
    ("https://h/x?g=123e4567-e89b-42d3-a456-426614174000&page=3", "https://h/x?g=***&page=3"),
    ("https://h/x?w=3q2%2B7wAB%2FcdQ9zXy0123Kg%3D%3D", "https://h/x?w=***"),
    ("https://h/x?id=1AbCdEfGhIjKlMnOpQrStUvWxYz012345&download=1", "https://h/x?id=1AbCdEfGhIjKlMnOpQrStUvWxYz012345&download=1"),
    *((f"https://h/x?{plain}", f"https://h/x?{plain}") for plain in (
        "page=3", "file=train.jsonl", "revision=main", "rev=9f86d081884c7d659a2feaa0c55ad015", "from=2024-01-15T12:00:00Z",
        "sha256=9f86d081884c7d659a2feaa0c55ad015", "part=train-00001-of-00064", "to=20240115T120000Z", "at=1700000000123456789",
        "model=Qwen2.5-0.5B-Instruct-GPTQ-Int4", "crawl=CC-MAIN-2024-10", "part=c4-train.00000-of-01024.json.gz",
        "fileId=dBjftJeZ4CVPmB92K27uhbUJU1p1r", "versionId=3sL4kqtJlcpXroDTDmJ.rmSpXd3dIbrHY", "name=ünïcödé-ÄÖÜ-12345678901")),
])
def test_what_is_masked_and_what_not(text, safe) -> None:
    assert masked(text) == safe
    assert masked(safe) == safe


def test_what_is_drawn_by_lot_is_masked_nearly_always() -> None:
    drawn = random.Random(1)
    for length, least in ((16, 165), (24, 185), (32, 195)):
        tokens = [base64.urlsafe_b64encode(drawn.randbytes(length)).decode().rstrip("=") for _ in range(200)]
        assert sum(masked(f"https://h/x?u={token}") == "https://h/x?u=***" for token in tokens) >= least
        assert all(masked(f"https://h/x?u={drawn.randbytes(length).hex()}") == "https://h/x?u=***" for _ in range(100))


@pytest.mark.parametrize("text", ["://?u=" + "a-" * 100_000, "a-" * 100_000 + "://", "://" + "?token" * 50_000, "eyJ" * 60_000,
                                  "://?" + "id_" * 50_000 + "=1"])
def test_masking_takes_no_long_time(text) -> None:
    started = time.monotonic()
    masked(text)
    assert time.monotonic() - started < 5


def test_a_run_goes_on_with_a_new_token_of_a_name_that_nobody_knows(tiny_config, genscale, address, tiny_run) -> None:
    """Nothing that it writes holds the old one; and one from before its shape was known is no other address."""
    secrets = ("dBjftJeZ4CVPmB92K27uhbUJU1p1rwW1gFWFOEjXk", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl")
    command = ["train", "--config", tiny_config, "--train.checkpoint_every", 1, "--data.source"]
    assert genscale(*command, f"{address}?page=3&u={secrets[0]}&jwt={secrets[1]}", "--train.steps", 1).code == 0
    written = [path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()]
    assert len(written) > 8 and not any(secret.encode() in content for secret in secrets for content in written)
    assert f"{address}?page=3&u=***&jwt=***" in (tiny_run / "config.yaml").read_text()
    config = next((tiny_run / "checkpoints").glob("step-*")) / "config.yaml"
    old = config.read_text().replace("u=***", f"u={secrets[0]}")
    manifest = json.loads((config.parent / "manifest.json").read_text())
    manifest["files"]["config.yaml"] = {"bytes": len(old), "sha256": hashlib.sha256(old.encode()).hexdigest()}
    config.write_text(old)
    (config.parent / "manifest.json").write_text(json.dumps(manifest))
    done = genscale(*command, f"{address}?page=3&u=Zz{secrets[0]}&jwt=x.y", "--train.steps", 2)
    assert done.code == 0, done.err
    done = genscale(*command, f"{address}?page=4&u=Zz{secrets[0]}&jwt=x.y", "--train.steps", 3)  # the same text elsewhere
    assert done.code == 0 and "page=3&u=***&jwt=***" in done.err and "page=4&u=***&jwt=***" in done.err, done.err


def test_errors_and_logs_are_masked_whoever_writes_them(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    assert TOKEN not in str(UserError(f"cannot read https://h/x?token={TOKEN}"))
    setup_logging(tmp_path, 0)
    logging.getLogger("urllib3").info("GET https://h/x?token=%s with %s", TOKEN, PLANTED["HF_TOKEN"])
    logging.getLogger("genscale").warning("retrying https://h/x?token=%s with %s", TOKEN, PLANTED["HF_TOKEN"])
    try:
        raise ValueError(f"https://h/x?token={TOKEN}")
    except ValueError:
        logging.getLogger("genscale").exception("failed")
    text = (tmp_path / "logs" / "rank-00000.log").read_text() + capsys.readouterr().err
    assert text.count("https://h/x?token=***") >= 5
    assert TOKEN not in text and PLANTED["HF_TOKEN"] not in text


def test_what_a_run_folder_was_given_without_secrets_is_read_as_it_was_written(trained) -> None:
    """Masking changes nothing where there is nothing to mask."""
    config = load_config(FAMILIES, trained / "config.yaml")
    assert config.data.source.endswith("/text.txt") and "***" not in (trained / "config.yaml").read_text()


@pytest.mark.parametrize(("key", "value", "named"), [
    ("environment", {"NCCL_DEBUG": "INFO", **PLANTED}, "HF_TOKEN"),
    ("environment", {"my_password": TOKEN}, "my_password"),
    ("environment", {"OPENAI_APIKEY": TOKEN}, "OPENAI_APIKEY"),
    ("environment", {"https_proxy": f"http://me:{TOKEN}@proxy:3128"}, "https_proxy"),
    ("setup", ["source .venv/bin/activate", f"export WANDB_API_KEY='{TOKEN}'"], "WANDB_API_KEY"),
    ("sbatch", [f"--export=ALL,HF_TOKEN={TOKEN}"], "HF_TOKEN"),
])  # fmt: skip
def test_a_token_in_a_site_is_not_written_into_its_jobs(key, value, named, genscale, tiny_config, tmp_path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({key: value}))
    refused = genscale("slurm", "render", "--config", tiny_config, "--site", site, "--out", tmp_path / "job.sbatch")
    assert refused.message().startswith(f"site.{key}: {named} in {site} would be kept in the script of every job")
    assert not any(secret in refused.out + refused.err for secret in (*PLANTED.values(), TOKEN))
    assert not (tmp_path / "job.sbatch").exists()


def test_what_only_sounds_like_a_token_may_stand_there(genscale, tiny_config, tmp_path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("environment: {TOKENIZERS_PARALLELISM: 'false', HF_TOKEN_PATH: /home/me/token}\n"
                    "setup: [export HF_TOKEN=$(cat ~/.token), 'export WANDB_API_KEY=\"$KEY\"']\n")
    script = genscale("slurm", "render", "--config", tiny_config, "--site", site).out
    for line in ("TOKENIZERS_PARALLELISM=false", "HF_TOKEN_PATH=/home/me/token", "HF_TOKEN=$(cat ~/.token)"):
        assert f"\nexport {line}\n" in script
