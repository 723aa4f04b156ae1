"""Workers as processes of one machine, which share its cores and GPUs."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from lightning_ydrop.checks import check_count
from lightning_ydrop.errors import ConfigurationError

# Seconds that a worker has to end once it is told to.
SECONDS_TO_END = 30.0


def start_workers(
    count: int,
    function: Callable[..., object],
    *args: Any,
    tick: Callable[[], None] | None = None,
    tick_seconds: float = 1.0,
    say: Callable[[str], None] = print,
) -> list[int]:
    """Call a function in several processes, and wait until all have ended.

    A worker that dies is reported, and the others go on. Where this process is told to end, or killed, the workers end
    too. One worker is this process itself.

    Args:
        count: How many processes.
        function: A function that can be pickled, such as one of a module.
        args: Its arguments, which can be pickled too.
        tick: Called every `tick_seconds` and at the end, for progress.
        tick_seconds: How often.
        say: Called with what goes wrong.

    Returns:
        The exit code of each: 0 where all went well, -9 where it was killed.

    Raises:
        ConfigurationError: If none ended well, the first that a worker raised.

    """
    count = check_count("start_workers", "count", count, minimum=1, example=2)
    tick = tick or (lambda: None)
    with _told_to_end():
        if count == 1:
            with _environment(share(0, 1)), _ticking(tick, tick_seconds):
                function(*args)
            return [0]
        return _in_processes(count, function, args, tick, tick_seconds, say)


def share(index: int, count: int) -> dict[str, str]:
    """Give a worker its share of the machine.

    Args:
        index: Which worker, from 0.
        count: How many there are.

    Returns:
        Environment variables: a number of threads, and one of the GPUs that this process may use, if there are any.

    """
    environment = {"OMP_NUM_THREADS": str(max(1, num_cores() // count))}
    if torch.cuda.is_available():
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[index % torch.cuda.device_count()]
    return environment


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    count: int,
    function: Callable[..., object],
    args: tuple[Any, ...],
    tick: Callable[[], None],
    tick_seconds: float,
    say: Callable[[str], None],
) -> list[int]:
    context = multiprocessing.get_context("spawn")  # a forked process can't use a GPU that its parent has used
    processes: list[BaseProcess] = []
    receivers: list[Connection] = []
    try:
        for index in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_be_worker, args=(sender, function, args), name=f"worker {index}")
            with _environment(share(index, count)):
                process.start()
            sender.close()
            processes.append(process)
            receivers.append(receiver)
        errors = _watched(processes, receivers, tick, tick_seconds, say)
    finally:
        _end(processes)
        for receiver in receivers:
            receiver.close()
    codes = [process.exitcode or 0 for process in processes]
    if errors and 0 not in codes:
        raise errors[0]
    return codes


def _watched(
    processes: list[BaseProcess],
    receivers: list[Connection],
    tick: Callable[[], None],
    tick_seconds: float,
    say: Callable[[str], None],
) -> list[ConfigurationError]:
    """Wait until all have ended, and report what goes wrong."""
    errors: list[ConfigurationError] = []
    running = list(range(len(processes)))
    while running:
        wait([processes[index].sentinel for index in running], timeout=tick_seconds)
        for index in [index for index in running if not processes[index].is_alive()]:
            running.remove(index)
            if code := processes[index].exitcode:
                error = _received(receivers[index])
                reason = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                say(f"{processes[index].name} {reason}{f': {error}' if error else '.'}")
                errors += [error] if error else []
        tick()
    return errors


def _received(receiver: Connection) -> ConfigurationError | None:
    try:
        error: ConfigurationError = receiver.recv()
    except EOFError:  # it ended without one
        return None
    return error


def _end(processes: list[BaseProcess]) -> None:
    """End the processes that still run: started again, the program goes on with their trials."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _be_worker(sender: Connection, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Call the function in a process of its own, which ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(*args)
    except ConfigurationError as error:
        sender.send(error)
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Turn a signal to end into an exception, which ends the workers on its way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables, of which processes that start inherit a copy."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _ticking(tick: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function now and then, from another thread, and at the end."""
    is_over = threading.Event()

    def go_on() -> None:
        while not is_over.wait(seconds):
            tick()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    tick()
