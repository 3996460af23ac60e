"""Choose one of several vLLM servers for a prompt.

A server is faster for chunks that it has loaded before, which are in its RAM tier and in the page
cache. So every chunk is assigned to a server by rendezvous hashing (Thaler and Ravishankar, 1998),
by which only a server's own chunks move when it is added or removed. A prompt is sent to the server
to which most of its tokens are assigned, unless others are much less busy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ragcache.errors import ConfigError
from ragcache.util.rendezvous import home

SLACK = 2  # more requests in flight than the least busy server that a server may have
DOWN_S = 10.0  # before a failed server is tried again, if there are others


class Router:
    """Servers of the same model. Raises ConfigError for none or duplicates. Thread-safe."""

    def __init__(self, urls: Sequence[str], *, slack: int = SLACK, down_s: float = DOWN_S) -> None:
        if not urls or len(set(urls)) != len(urls):
            raise ConfigError(f"base_url is {', '.join(urls) or 'empty'}: name each server once")
        self.urls, self.slack, self.down_s = tuple(urls), slack, down_s
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(urls, 0)
        self._lost: dict[str, float] = {}  # by URL, the time of the failure

    def choose(self, chunks: Mapping[bytes, int], without: Collection[str] = ()) -> str | None:
        """A server for a prompt of ``chunks`` (digest to tokens), or None if all are in
        ``without``.

        A server that failed recently is chosen only if there is no other.
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
                if (at_home := home(digest, self.urls)) in share:
                    share[at_home] += tokens
            return min(near, key=lambda url: (-share[url], self._busy[url]))

    @contextmanager
    def count_request(self, url: str) -> Iterator[None]:
        """Count a request to ``url`` as in flight in the ``with`` block."""
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
        """The number of requests in flight, by server."""
        with self._lock:
            return dict(self._busy)
