"""A bad link: a TCP proxy that delays, stalls, cuts and drops what a seed tells it to.

What happens to the n-th connection of a link depends on the seed, the link's name and n alone.
Knows nothing of what passes, which is TLS.
"""

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

_CHUNK = 16 << 10
_LINGER_S = 0.2
_T = TypeVar("_T")
Trouble = Literal["none", "refuse", "drop", "truncate", "stall"]
_ODDS: dict[Trouble, int] = {"none": 6, "refuse": 2, "drop": 4, "truncate": 4, "stall": 2}


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What happens to one connection, after so many bytes in both directions together.

    ``refuse``: it is closed at once. ``drop``: it is reset. ``truncate``: the first half of a
    piece passes, then it is closed. ``stall``: nothing passes for ``stall_s`` seconds. Every
    piece is late by ``delay_s``.
    """

    trouble: Trouble
    after_bytes: int
    delay_s: float
    stall_s: float

    @classmethod
    def of(cls, seed: int, link: str, number: int) -> Self:
        """Return the fate of a link's connection ``number``."""
        chance = random.Random(f"{seed}/{link}/{number}")
        (trouble,) = chance.choices(list(_ODDS), list(_ODDS.values()))
        return cls(
            trouble=trouble,
            # A call without content takes about a thousand bytes, a handshake three thousand.
            after_bytes=int(2 ** chance.uniform(9, 18)),
            delay_s=chance.choice((0.0, 0.0, 0.002, 0.02)),
            stall_s=chance.uniform(1.0, 5.0),
        )


class BadLinks:
    """Proxies on the loopback interface to one port; use it as a context manager."""

    def __init__(self, seed: int, port: int) -> None:
        """Lead to ``port``, which need not be listened on yet."""
        self._seed = seed
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bad links")
        self._servers: list[asyncio.Server] = []
        self.met: list[tuple[str, Trouble]] = []
        """Link and trouble of every connection whose trouble has come."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self, link: str) -> int:
        """Open a link, and return the port that it is reached by."""
        return self._do(self._listen(link))

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self, link: str) -> int:
        number = -1

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal number
            number += 1
            await self._connect(link, Fate.of(self._seed, link, number), reader, writer)

        server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def _connect(
        self,
        link: str,
        fate: Fate,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        # asyncio reports a handler that was cancelled as a defect.
        ended = (OSError, asyncio.CancelledError)
        with contextlib.suppress(*ended), contextlib.ExitStack() as opened:
            opened.callback(_reset, writer)
            if fate.trouble == "refuse":
                self.met.append((link, fate.trouble))
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
            opened.callback(_reset, far_writer)
            passing = _Passing(fate, lambda: self.met.append((link, fate.trouble)))
            directions = [
                asyncio.ensure_future(passing.pass_on(reader, far_writer)),
                asyncio.ensure_future(passing.pass_on(far_reader, writer)),
            ]
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in directions:
                    each.cancel()
                await asyncio.gather(*directions, return_exceptions=True)

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


class _Passing:
    """The bytes of one connection, in both directions."""

    def __init__(self, fate: Fate, met: Callable[[], None]) -> None:
        self._fate = fate
        self._left = fate.after_bytes
        self._met = met
        self._held = asyncio.Event()
        self._held.set()

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on until an end is closed or the trouble comes."""
        while data := await reader.read(_CHUNK):
            await self._held.wait()
            comes = self._left > 0 >= self._left - len(data)
            self._left -= len(data)
            if comes and self._fate.trouble != "none":
                self._met()
                if self._fate.trouble == "drop":
                    return
                if self._fate.trouble == "truncate":
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    writer.write_eof()
                    await asyncio.sleep(_LINGER_S)
                    return
                self._held.clear()
                await asyncio.sleep(self._fate.stall_s)
                self._held.set()
            await asyncio.sleep(self._fate.delay_s)
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other end is told at once, with nothing sent after it."""
    raw = writer.get_extra_info("socket")
    if raw is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.close()
