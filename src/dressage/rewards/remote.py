"""Rewards from a server over HTTP, and the careful request that a judge's server gets too."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dressage.rewards.parts import Ungraded, request
from dressage.schema import Rollout

ATTEMPTS = 3
FIRST_WAIT_SECONDS = 0.5
"""Before the second attempt; doubled before each further one."""
LARGEST_REPLY = 2**24
"""Bytes."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP states that may be over when asked again."""


@dataclass(frozen=True)
class RemoteReward:
    """Grades by POST {"prompts", "answers", "targets", "finished"} -> {"rewards": [...]}."""

    url: str
    timeout_seconds: float
    batch_size: int

    def __call__(self, rollouts: Sequence[Rollout]) -> list[object]:
        """One request for each batch; a batch that fails leaves the others as they are."""
        grades: list[object] = []
        for start in range(0, len(rollouts), self.batch_size):
            batch = rollouts[start : start + self.batch_size]
            try:
                grades += self._batch(batch)
            except Ungraded as why:
                grades += [why] * len(batch)
        return grades

    def _batch(self, rollouts: Sequence[Rollout]) -> list[object]:
        reply = post_json(self.url, request(rollouts), timeout_seconds=self.timeout_seconds)
        rewards = reply.get("rewards") if isinstance(reply, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(rollouts):
            count = f"{len(rewards)} rewards" if isinstance(rewards, list) else "no list of rewards"
            raise Ungraded(f"{place(self.url)}: {count} for {len(rollouts)} answers")
        return rewards


class _Passing(Exception):
    """A fault that may be over when asked again."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """What is sent goes to the place that was named, and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def post_json(url: str, body: Mapping[str, Any], *, timeout_seconds: float, key: str | None = None) -> Any:
    """The server's JSON reply. Asks three times, with growing waits; Ungraded says what was wrong the last time.

    All attempts together end after `timeout_seconds`.
    """
    ends, wait, fault = time.monotonic() + timeout_seconds, FIRST_WAIT_SECONDS, "no answer"
    for attempt in range(ATTEMPTS):
        if attempt:
            if time.monotonic() + wait >= ends:
                break
            time.sleep(wait)
            wait *= 2
        try:
            return _post(url, body, ends, key)
        except _Passing as error:
            fault = str(error)
    raise Ungraded(f"{place(url)}: {fault}")


def place(url: str) -> str:
    """A URL without what may be secret in it: its host and path."""
    parts = urlsplit(url)
    return f"{parts.hostname}{'' if parts.port is None else f':{parts.port}'}{parts.path}"


def _post(url: str, body: Mapping[str, Any], ends: float, key: str | None) -> Any:
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    asked = urllib.request.Request(url, json.dumps(body).encode(), headers)
    left = max(0.01, ends - time.monotonic())
    try:
        with urllib.request.build_opener(_Stay).open(asked, timeout=left) as response:
            content = _read(response, ends)
    except urllib.error.HTTPError as error:
        error.close()
        said = f"HTTP {error.code} {error.reason}"
        if error.code in range(300, 400):
            said += "; it sends elsewhere, and what is asked goes nowhere but to the URL of the settings"
        if error.code in PASSING:
            raise _Passing(said) from error
        raise Ungraded(f"{place(url)}: {said}") from error
    except TimeoutError as error:
        raise _Passing("no answer in time") from error
    except http.client.HTTPException as error:
        raise _Passing(f"no reply in HTTP ({type(error).__name__})") from error
    except ValueError as error:
        raise Ungraded(f"{place(url)}: not the URL of a server") from error
    except OSError as error:
        raise _Passing(" ".join(str(getattr(error, "reason", error)).split())[:200] or "no answer") from error
    if len(content) > LARGEST_REPLY:
        raise Ungraded(f"{place(url)}: a reply of more than {LARGEST_REPLY >> 20} MiB")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Ungraded(f"{place(url)}: the reply is not JSON") from error


def _read(response: Any, ends: float) -> bytes:
    """The reply, at most one byte too much of it; a server that trickles is not waited for."""
    content = b""
    while len(content) <= LARGEST_REPLY:
        if time.monotonic() >= ends:
            raise TimeoutError
        piece = response.read1(LARGEST_REPLY + 1 - len(content))
        if not piece:
            break
        content += piece
    return content
