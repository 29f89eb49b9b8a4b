"""Replies of an OpenAI-compatible server as they come, every fault of it one kind of error."""

import json
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit


class EngineFailed(RuntimeError):
    """The engine died, did not get ready, cannot be reached, or does not answer as it should; `status`: HTTP's, if it did."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


def lines(url: str, body: dict | None, seconds: float) -> Iterator[bytes]:
    """The lines of a reply (POST with a body, else GET) as they come, whole within `seconds`. Raises EngineFailed, which says
    what happened, or what the server said."""
    at, deadline = urlsplit(url), time.monotonic() + seconds
    if at.scheme not in ("http", "https") or not at.netloc:
        raise EngineFailed(f"{url}: expected an address such as http://127.0.0.1:8000")
    rest, connection = b"", None
    try:
        connection = (HTTPSConnection if at.scheme == "https" else HTTPConnection)(at.netloc, timeout=seconds)
        connection.connect()
        sock = connection.sock  # which the reply takes over
        connection.request("POST" if body else "GET", at.path, body and json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            said = reply.read(2000).decode(errors="replace").strip()
            raise EngineFailed(f"{url}: HTTP {reply.status}: {said}", reply.status)
        while True:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            sock.settimeout(left)  # so that silence and a trickle end at the same time
            if not (part := reply.read1(1 << 16)):
                break
            *whole, rest = (rest + part).split(b"\n")
            yield from whole
        yield rest
    except TimeoutError as error:
        raise EngineFailed(f"{url}: no whole reply in {seconds:g} s") from error
    except (OSError, HTTPException) as error:
        raise EngineFailed(f"{url} cannot be reached, or the connection was cut: {error!r}") from error
    finally:
        if connection is not None:
            connection.close()


def completion(url: str, model: str, prompt: Sequence[int] | str, new_tokens: int, seconds: float, **options) -> Iterator[dict]:
    """The pieces of a streamed completion at temperature 0.

    Raises EngineFailed, also for a stream that does not end in [DONE] (the server was killed) or has an error line (a worker
    was: the status is 200 even so, and [DONE] follows).
    """
    body = {"model": model, "prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": new_tokens,
            "temperature": 0, "stream": True, "return_token_ids": True} | options
    done = False
    for line in lines(f"{url}/v1/completions", body, seconds):
        data = line.strip()
        if not data or data.startswith(b":"):
            continue
        data = data.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            done = True
            continue
        try:
            event = json.loads(data)
            if "error" in event:
                raise EngineFailed(f"{url}: an error line in the stream: {event['error']}")
            yield from event["choices"]
        except (ValueError, TypeError, KeyError) as error:
            raise EngineFailed(f"{url}: a line that is no completion: {data[:200]!r}") from error
    if not done:
        raise EngineFailed(f"{url}: the stream ended without [DONE]")
