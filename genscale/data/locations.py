"""What stands at a location: files by their names, URLs by asking their server, and Hugging Face hub datasets.

Whether a URL or the hub answers is asked first, for what is wrong with it must show before the first step. Silence is most
likely a mistake in the address, and no reason to wait; but not where a run goes on, which has read from there before.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from genscale.data.retrying import Passing, in_threads, persist
from genscale.data.source_file import DECOMPRESSORS, SourceFile, is_url, url_path
from genscale.data.spec import SOURCES, Spec
from genscale.data.web import AGAIN, answer_of, answered, cause_of, innermost, part_of, passes, size_of, version_of
from genscale.errors import SourceLost, UserError, nearest

T = TypeVar("T")
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
READABLE = "; .txt, .jsonl (JSON by lines or in an array) and .parquet are read, plain or compressed (.gz .zst .xz .bz2)"
HUB_SECONDS = 10.0
"""Longest wait for the hub's first answer."""
URL_SECONDS = 10.0
"""Longest wait for a web server's first answer."""
PROBES = 16
"""URLs that are asked at a time."""
NO_ACCESS = "put the user and password of this server into ~/.netrc, or give an address that needs none"
START_MINUTES = 1.0
"""Longest time to try a URL again before the first step, when a wrong address is likelier than a server in trouble."""
_goes_on: ContextVar[bool] = ContextVar("goes_on", default=False)


@contextmanager
def of_a_run_that_goes_on(it_does: bool = True) -> Iterator[None]:
    """Sources opened meanwhile have been read before: where one does not answer, `retry_minutes` count in full."""
    before = _goes_on.set(it_does)
    try:
        yield
    finally:
        _goes_on.reset(before)


def builder_of(path: str | Path) -> str | None:
    """text, json or parquet for a file name or URL, or None for one that is not read."""
    name = Path(url_path(str(path)) if is_url(str(path)) else path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return BUILDERS.get(Path(name).suffix)


def is_plain_parquet(path: str) -> bool:
    """Whether the columns and row groups of a parquet file can be read by themselves."""
    return (url_path(path) if is_url(path) else path).lower().endswith(".parquet")


def quiet_datasets() -> Any:
    """`datasets`, without the progress bars and log lines that would stand beside our own one-line errors."""
    import datasets

    # It would send a request to the hub each time that a local file is opened, and wait for the answer.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


@lru_cache(maxsize=4)
def open_hub(spec: Spec) -> Any:
    """The stream of a hub dataset.

    Raises:
        UserError: no such subset or split, or the hub does not answer.
    """
    datasets = quiet_datasets()
    try:
        return _ask_hub(spec, lambda: datasets.load_dataset(spec.name, spec.subset, split=spec.split, revision=spec.revision,
                                                            streaming=True))
    except UserError:
        raise
    except ValueError as error:
        setting, value = ("split", spec.split) if "split" in str(error).lower() else ("subset", spec.subset)
        raise UserError(f"{spec.setting(setting)}={value}: {spec.key}={spec.name}: {error}") from None
    except Exception as error:
        raise UserError(f"{spec.key}={spec.name}: the hub dataset cannot be opened ({type(error).__name__}: {error}); "
                        f"{spec.local_advice}") from None


def hub_revision(spec: Spec) -> str:
    """The hub dataset's present commit.

    Raises:
        UserError: no such dataset, no access to it, or the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    installed = SOURCES.names()
    beside = f", none of the installed sources is called so ({', '.join(installed)}{nearest(spec.name, installed)})"
    where = f"{spec.key}={spec.name}: there is no such path here{beside if installed else ''}, and"
    try:
        found = _ask_hub(spec, lambda: HfApi().dataset_info(spec.name, timeout=HUB_SECONDS))
        return cast(str, found.sha)  # which is there where nothing else was asked for
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"{where} access to this hub dataset must be granted; accept its terms on the hub and set HF_TOKEN, "
                        f"or {spec.local_advice}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{where} no such dataset on the Hugging Face hub (a private one needs HF_TOKEN); "
                        f"{spec.local_advice}") from None
    except Exception as error:  # each transport of the hub client has exceptions of its own
        raise UserError(f"{where} the Hugging Face hub cannot be reached ({type(error).__name__}; is HF_HUB_OFFLINE set, "
                        f"or the network down?); {spec.local_advice}") from None


def _ask_hub(spec: Spec, ask: Callable[[], T]) -> T:
    def attempt() -> T:
        try:
            return ask()
        except Exception as error:
            if _goes_on.get() and is_silence(error):
                raise Passing(f"{type(error).__name__}: {error}") from error
            raise

    try:
        return persist(attempt, f"{spec.key}={spec.name}: there is no such path here; the Hugging Face hub", spec.retry_minutes)
    except Passing as failure:
        raise SourceLost(f"{spec.key}={spec.name}: the hub does not answer ({failure}; tried for data.retry_minutes="
                         f"{spec.retry_minutes:g}); start again when it does: {AGAIN}") from None


def is_silence(error: Exception) -> bool:
    """Whether an error of the hub's client means that the hub does not answer, or not now."""
    import requests
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # the one that this client uses: httpx or httpx2

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and passes(error.response.status_code)
    theirs = (httpx.HTTPError, requests.RequestException, ConnectionError, TimeoutError)
    return isinstance(error, theirs) and not isinstance(error, OfflineModeIsEnabled)


def find_urls(spec: Spec, urls: Sequence[str]) -> list[SourceFile]:
    """What stands at each URL.

    Raises:
        UserError: the first URL that does not answer, and why.
    """
    patient = _goes_on.get()  # which the threads do not see

    def answer(url: str) -> SourceFile | UserError:
        try:
            return _find_url(spec, url, patient)
        except UserError as error:
            return error

    found = [answer(urls[0])] if len(urls) == 1 else in_threads(answer, urls, PROBES)
    files: list[SourceFile] = []
    for each in found:
        if isinstance(each, UserError):
            raise each
        files.append(each)
    return files


def _find_url(spec: Spec, url: str, patient: bool) -> SourceFile:
    import requests

    where = f"{spec.key}={spec.name}"

    def attempt() -> SourceFile:
        try:
            # Addresses signed for reading answer to GET alone: one byte is asked for, and the size stands beside it.
            with answer_of(url, "0-0", URL_SECONDS) as response:
                return _found(spec, url, where, response)
        except Passing as failure:
            if not patient and isinstance(failure.__cause__, OSError) and (refusal := _at_once(spec, url, innermost(failure))):
                raise refusal from None
            raise

    try:
        minutes = spec.retry_minutes if patient else min(spec.retry_minutes, START_MINUTES)
        return persist(attempt, f"{where}: {url}", minutes)
    except Passing as failure:
        error = _url_error(spec, url, f"{failure}; tried for {minutes:g} min", "try again later, or give a local copy")
        raise SourceLost(str(error)) from None
    except requests.RequestException as error:
        raise _url_error(spec, url, cause_of(error), "mend the address, or give a local copy") from None


def _found(spec: Spec, url: str, where: str, response: Any) -> SourceFile:
    status, headers = response.status_code, response.headers
    if status == 416:  # an empty file has no first byte
        return SourceFile(url, where, 0, version_of(headers), True, spec.retry_minutes)
    if status not in (200, 206):
        raise _url_error(spec, url, answered(response), {
            401: NO_ACCESS, 403: NO_ACCESS,
            404: "there is nothing at this address; mend it", 410: "there is nothing at this address; mend it",
        }.get(status, "mend the address, or give a local copy"))
    part = part_of(headers)
    if status == 206 and (part is None or part[:2] != (0, 0)):
        raise _url_error(spec, url, "asked for its first byte, the server gives another part", "mend the server, or give a "
                         "local copy")
    size = part[2] if part else size_of(headers)
    ranges = status == 206 and size is not None
    if not ranges and (is_plain_parquet(url) or url_path(url).endswith(".jsonl")):
        raise _url_error(spec, url, "the server does not give parts of a file",
                         "give a compressed one (.jsonl.zst), or a local copy")
    whole = size is not None or "chunked" in headers.get("Transfer-Encoding", "").lower()
    if not whole and Path(url_path(url).lower()).suffix not in DECOMPRESSORS:  # those tell when they were cut off
        raise _url_error(spec, url, "the server does not say how long it is, so that one cut off would look whole",
                         "give a compressed one, or a local copy")
    return SourceFile(url, where, size or 0, version_of(headers), ranges, spec.retry_minutes)


def _at_once(spec: Spec, url: str, error: BaseException) -> UserError | None:
    if isinstance(error, socket.gaierror):
        return _url_error(spec, url, f"the name {urlsplit(url).hostname} does not resolve",
                          "mend the address, check the network, or give a local copy")
    if isinstance(error, ConnectionRefusedError):
        return _url_error(spec, url, error.strerror or "",
                          "mend the address, check that the server runs, or give a local copy")
    return None


def _url_error(spec: Spec, url: str, reason: str, advice: str) -> UserError:
    return UserError(f"{spec.key}={url}: cannot be read ({reason}); {advice}")
