"""Follow a log over connections that may be lost: every character once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from orchestrator.failures import RunFailedError, one_line

_POLL_S = 0.5
# A connection that was silent for so long is made anew: it may be dead without having said so, or the job waits.
_SILENCE_S = 30.0
# How long a lost connection is tried again before the job is left to itself.
_GIVE_UP_S = 600.0
_TRY_EVERY_S = 2.0


def follow_log(
    connect: Callable[[], AsyncIterator[str]],
    look_up: Callable[[], Any],
    *,
    write: Callable[[str], None],
    say: Callable[[str], None],
    lost: str,
    again: str,
) -> Any:
    """Pass on a job's log until the job has ended and all of it is passed on.

    Args:
        connect: a new connection to the log, which begins at the log's beginning and ends with the job.
        look_up: what Ray's Jobs API knows of the job.
        write: called with the next piece of the log.
        say: called with a sentence where the connection is lost.
        lost: that sentence, without its end.
        again: the command that would follow the job again.

    Returns:
        What `look_up` returned at last.

    Raises:
        RunFailedError: the connection stayed away, or the job is not known any more.
    """
    log = _Log(connect, write)
    lost_s: float | None = None
    told = ""
    while True:
        try:
            is_complete = asyncio.run(log.pass_on())
            info = look_up()
        except _lost_connection() as error:
            if isinstance(error, RunFailedError) and error.bad_input:
                raise
            now_s = time.monotonic()
            if lost_s is None:
                say(f"{lost}; trying again. The job goes on")
                lost_s = now_s
            if now_s - lost_s > _GIVE_UP_S:
                raise RunFailedError(
                    f"{lost} for {_GIVE_UP_S / 60:.0f} minutes ({one_line(error)}). The job may go on: {again}"
                ) from error
            time.sleep(_TRY_EVERY_S)
            continue
        lost_s = None
        if info.status.value == "PENDING" and info.message and info.message != told:
            told = info.message
            say(one_line(told))
        if is_complete and info.status.is_terminal():
            return info
        time.sleep(_POLL_S)


class _Log:
    """A log, and how much of it has been passed on."""

    def __init__(self, connect: Callable[[], AsyncIterator[str]], write: Callable[[str], None]) -> None:
        self._connect = connect
        self._write = write
        self._num_written = 0

    async def pass_on(self) -> bool:
        """Pass on what is new over one connection; True where the log has come to its end."""
        num_read = 0
        pieces = aiter(self._connect())
        while True:
            try:
                text = await asyncio.wait_for(anext(pieces), timeout=_SILENCE_S)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            new = text[max(0, self._num_written - num_read) :]
            num_read += len(text)
            if new:
                self._write(new)
                self._num_written = num_read


def _lost_connection() -> tuple[type[Exception], ...]:
    """What Ray's client lets through where the other side is gone."""
    import aiohttp  # comes with ray[default]

    return (aiohttp.ClientError, OSError, RuntimeError)
