"""Which of several vLLM servers a prompt goes to.

A server is faster at chunks that it has had before: the tier in RAM before its store holds them,
and so does the page cache. So every chunk has a home among the servers, by rendezvous hashing
(Thaler and Ravishankar, 1998): when one comes or goes, only its own chunks move. A prompt goes to
the server that is home to most of its tokens, unless others have much less to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from blake3 import blake3

from ragcache.errors import ConfigError

SLACK = 2  # requests under way by which a server may be ahead of the least busy one
DOWN_S = 10.0  # until one that was lost is tried again, if others are there


class Router:
    """Servers that hold the same model. Thread-safe."""

    def __init__(self, urls: Sequence[str], *, slack: int = SLACK, down_s: float = DOWN_S) -> None:
        if not urls or len(set(urls)) != len(urls):
            raise ConfigError(f"base_url is {', '.join(urls) or 'empty'}: name each server once")
        self.urls, self.slack, self.down_s = tuple(urls), slack, down_s
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(urls, 0)
        self._lost: dict[str, float] = {}  # since when

    def choose(self, chunks: Mapping[bytes, int], without: Collection[str] = ()) -> str | None:
        """A server for a prompt of ``chunks`` (digest to tokens); None where all are ``without``.

        One that was lost lately is the last resort.
        """
        with self._lock:
            left = [url for url in self.urls if url not in without]
            now = time.monotonic()
            up = [u for u in left if now - self._lost.get(u, -self.down_s) >= self.down_s] or left
            if not up:
                return None
            least = min(self._busy[url] for url in up)
            near = [url for url in up if self._busy[url] <= least + self.slack]
            share = dict.fromkeys(near, 0)
            for digest, tokens in chunks.items():
                if (at_home := _home(digest, self.urls)) in share:
                    share[at_home] += tokens
            return min(near, key=lambda url: (-share[url], self._busy[url]))

    @contextmanager
    def count_request(self, url: str) -> Iterator[None]:
        """Count a request as under way there while this lasts."""
        with self._lock:
            self._busy[url] += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[url] -= 1

    def mark_down(self, url: str) -> None:
        """Note that a server does not answer."""
        with self._lock:
            self._lost[url] = time.monotonic()

    def mark_up(self, url: str) -> None:
        """Note that a server answers."""
        with self._lock:
            self._lost.pop(url, None)

    def busy(self) -> dict[str, int]:
        """Requests under way at each."""
        with self._lock:
            return dict(self._busy)


def _home(digest: bytes, urls: Sequence[str]) -> str:
    """Where a chunk is at home: the server whose hash together with it is the largest."""
    return max(urls, key=lambda url: blake3(digest + url.encode()).digest())
