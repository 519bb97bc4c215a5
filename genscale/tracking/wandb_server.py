"""The W&B server of this account: whether it can be reached from here, and whether it would let us in."""

from __future__ import annotations

import json
import os
from typing import Any

from genscale.errors import UserError
from genscale.tracking.wandb_lives import Uploaded

ANSWER_SECONDS = 8.0
QUERY = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { historyLineCount historyTail eventsTail }
  }
}"""


def server_address() -> str:
    """As `wandb login` or WANDB_BASE_URL has it, without a closing slash."""
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton().settings.base_url.rstrip("/")


def key_for(address: str) -> str | None:
    """Our key for the server: WANDB_API_KEY, or what `wandb login` has left in ~/.netrc."""
    import requests

    if key := os.environ.get("WANDB_API_KEY"):
        return key
    found = requests.utils.get_netrc_auth(address)
    return found[1] if found else None


def check_server() -> str:
    """The address of the server, which answers and has a key of ours.

    Raises:
        UserError: it does not answer, or there is no key for it.
    """
    import requests

    address = server_address()
    try:
        # Any answer will do: what is asked for is the way there.
        requests.get(f"{address}/healthz", timeout=ANSWER_SECONDS, allow_redirects=False)
    except requests.RequestException as error:
        raise UserError(f"W&B at {address} cannot be reached from here ({type(error).__name__})") from None
    if key_for(address) is None:
        raise UserError(f"W&B at {address} answers, and there is no key for it (`wandb login`, or WANDB_API_KEY)")
    return address


def uploaded(address: str, run: Any) -> Uploaded:
    """What the server has of a run, as W&B itself asks when it resumes one.

    Raises:
        UserError: it does not say.
    """
    import requests

    names = {"project": run.project, "entity": run.entity or None, "name": run.run_id}
    asked: dict[str, Any] = {"query": QUERY, "variables": names}
    try:
        answer = requests.post(f"{address}/graphql", json=asked, auth=("api", key_for(address) or ""), timeout=ANSWER_SECONDS)
        answer.raise_for_status()
        bucket = ((answer.json().get("data") or {}).get("model") or {}).get("bucket")
    except (requests.RequestException, ValueError) as error:
        raise UserError(f"W&B at {address} does not say what it has of run {run.run_id} ({type(error).__name__}: "
                        f"{error}); try again later") from None
    if not bucket or not bucket.get("historyLineCount"):
        return Uploaded()
    return Uploaded(int(_latest(bucket["historyTail"], "_step")), _latest(bucket.get("eventsTail") or "[]", "_timestamp"))


def _latest(tail: str, key: str) -> float:
    """The largest value of a key in the last lines of a file of the server's: JSON objects in a JSON list."""
    rows = [json.loads(line) if isinstance(line, str) else line for line in json.loads(tail)]
    return max((row[key] for row in rows if key in row), default=0)
