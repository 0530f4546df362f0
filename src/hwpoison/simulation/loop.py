"""A deterministic asyncio event loop: no selector, no clock, no threads. The production coroutines run on it unchanged.

Callbacks run in the order in which they became ready, always, as asyncio promises. What is not promised, when something
from outside arrives and when a timer fires, is asked of `outside` and chosen by `choices`. Time is virtual: it moves only
to the next timer, which may fire as soon as anything else may happen.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from itertools import count
from typing import Any, Literal

from hwpoison.simulation.choices import MANAGER, Choices, Event, Happening

Mode = Literal["quiet", "batch"]
"""When something from outside may come: if no callback is ready, or also before the first of several runs."""


class TimedCallback(asyncio.TimerHandle):
    """asyncio's own, for plain callbacks as well; without what it keeps for debugging."""

    __slots__ = ()

    def __init__(self, loop: SimulationLoop, callback: Any, args: Any, context: Context | None, when: float) -> None:
        self._loop = loop
        self._callback = callback
        self._args = args
        # An empty context is falsy.
        self._context: Any = copy_context() if context is None else context
        self._when = when
        self._cancelled = False

    def __repr__(self) -> str:
        return f"run {self.owner}"

    def run(self) -> None:
        self._context.run(self._callback, *self._args)

    @property
    def owner(self) -> str:
        """The task that this runs or wakes, or the callback's name."""
        task = getattr(self._callback, "__self__", None)
        if isinstance(task, asyncio.Task):
            return task.get_name()
        return getattr(self._callback, "__qualname__", type(self._callback).__name__)


class SimulationLoop(asyncio.AbstractEventLoop):
    """See above. `tasks` are all that were made; `errors` what nobody caught."""

    def __init__(
        self, choices: Choices | None = None, outside: Callable[[], Sequence[Event]] = tuple, mode: Mode = "quiet"
    ) -> None:
        self.choices = choices or Choices()
        self.outside = outside
        self.mode = mode
        self.ready: deque[TimedCallback] = deque()
        self.timers: list[tuple[float, int, TimedCallback]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.errors: list[dict[str, Any]] = []
        self.steps = 0
        self.last: TimedCallback | Event | None = None
        self.arriving = True
        """In batch mode: more may come before the first callback runs."""
        self._timer = Happening("a timer fires", self._fire_timers)
        self._now = 0.0
        self._timers_made = 0
        self._running = self._stopping = self._closed = self._debug = False
        self._factory: Any = None
        self._handler: Any = None

    # --- one step after the other

    def step(self) -> bool:
        """Let one thing happen; False if nothing can."""
        ready, timers = self.ready, self.timers
        while ready and ready[0]._cancelled:
            ready.popleft()
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        options: list[Any] = [ready[0]] if ready else []
        if not ready or (self.mode == "batch" and self.arriving):
            options += self.outside()
            if timers:
                options.append(self._timer)
        if not options:
            return False
        chosen = options[self.choices.pick(options) if len(options) > 1 else 0]
        self.steps, self.last = self.steps + 1, chosen
        if ready and chosen is ready[0]:
            self.arriving = False
            ready.popleft()
            self._run_handle(chosen)
        else:
            self.arriving = True
            chosen.happen()
        return True

    def _run_handle(self, handle: TimedCallback) -> None:
        try:
            handle.run()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  (as asyncio does)
            self.call_exception_handler({"message": f"error in {handle.owner}", "exception": error})

    def _fire_timers(self) -> None:
        """Let time go on to the next timer, and make all ready that are due then."""
        self.choices.footprint.add(MANAGER)
        self._now = max(self._now, self.timers[0][0])
        while self.timers and self.timers[0][0] <= self._now:
            handle = heapq.heappop(self.timers)[2]
            if not handle._cancelled:
                self.ready.append(handle)

    def enter(self) -> None:
        """From now on this is the running loop of the thread: `step` may be called."""
        if self._running:
            raise RuntimeError("This event loop is already running")
        if events._get_running_loop() is not None:
            raise RuntimeError("Cannot run the event loop while another loop is running")
        events._set_running_loop(self)
        self._running = True

    def leave(self) -> None:
        """The opposite of `enter`."""
        events._set_running_loop(None)
        self._running = self._stopping = False

    def run_forever(self) -> None:
        self.enter()
        try:
            while not self._stopping:
                if not self.step():
                    raise RuntimeError("nothing can happen any more")
        finally:
            self.leave()

    def run_until_complete(self, future: Any) -> Any:
        future = asyncio.ensure_future(future, loop=self)
        future.add_done_callback(self.stop)
        try:
            self.run_forever()
        finally:
            future.remove_done_callback(self.stop)
        return future.result()

    def stop(self, _: object = None) -> None:
        self._stopping = True

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        if self._running:
            raise RuntimeError("Cannot close a running event loop")
        self._closed = True
        self.ready.clear()
        self.timers.clear()

    async def shutdown_asyncgens(self, _: float | None = None) -> None:
        pass

    shutdown_default_executor = shutdown_asyncgens

    # --- callbacks, timers, tasks

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> Any:  # type: ignore[override]
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle = TimedCallback(self, callback, args, context, self._now)
        self.ready.append(handle)
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        handle = TimedCallback(self, callback, args, context, when)
        self._timers_made += 1
        heapq.heappush(self.timers, (when, self._timers_made, handle))
        return handle

    def _timer_handle_cancelled(self, handle: object) -> None:
        """asyncio tells so of each timer."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None, **options: Any) -> Any:
        if self._factory is not None:
            task = self._factory(self, coro) if context is None else self._factory(self, coro, context=context)
            if name is not None:
                task.set_name(name)
            return task
        task = asyncio.Task(coro, loop=self, name=self._free_name(name or coro.__name__), context=context)
        task.begun = self._now  # type: ignore[attr-defined]
        self.tasks.append(task)
        return task

    def _free_name(self, name: str) -> str:
        """A name that no task under way has: names tell them apart, and are the same in every run."""
        used = {task.get_name() for task in self.tasks if not task.done()}
        names = (name if number == 1 else f"{name} ({number})" for number in count(1))
        return next(one for one in names if one not in used)

    def set_task_factory(self, factory: Any) -> None:
        self._factory = factory

    def get_task_factory(self) -> Any:
        return self._factory

    def run_in_executor(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("threads are not deterministic: what they do belongs into the machine")

    call_soon_threadsafe = run_in_executor  # type: ignore[assignment]

    # --- errors

    def set_exception_handler(self, handler: Any) -> None:
        self._handler = handler

    def get_exception_handler(self) -> Any:
        return self._handler

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._handler is not None:
            self._handler(self, context)
        else:
            self.errors.append(context)

    def get_debug(self) -> bool:
        return self._debug

    def set_debug(self, enabled: bool) -> None:
        self._debug = enabled
