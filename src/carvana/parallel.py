"""Work on several threads and processes, and the progress bar that goes with it."""

import math
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from carvana.errors import UserError

Result = TypeVar("Result")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # what a container may use: microseconds of work, of how many; or "max"
SHARED_MEMORY = "/dev/shm"  # through which worker processes hand over batches
SHARING = "LOCAL_WORLD_SIZE"  # torch's environment variable: processes of this machine that work at the same time


def cores() -> int:
    """Cores for this process: those that affinity and container allow, divided among processes that work together."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        work, period = map(int, CPU_MAX.read_text().split())
        allowed = min(allowed, math.ceil(work / period))
    return max(1, allowed // int(os.environ.get(SHARING, "1")))


@contextmanager
def sharing(processes: int) -> Iterator[None]:
    """Divide the cores among so many: this process, or those that are started meanwhile, count their part alone."""
    before = os.environ.get(SHARING, "1")
    os.environ[SHARING] = str(int(before) * processes)
    try:
        yield
    finally:
        os.environ[SHARING] = before


def overlapped(function: Callable[..., Result], items: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
    """`function(*item)` of every item, in order, on as many threads as cores.

    At most four results a core wait, so that memory stays flat where the items come faster than they are worked on.
    """
    threads = cores()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def progress(items: Iterable[Any] | None, what: str, unit: str = "images", **options: Any) -> tqdm:
    """A progress bar with rate and time left; outside a terminal it is renewed every 10 s, so that logs stay short."""
    live = sys.stderr.isatty()
    interval = 0.2 if live else 10
    return tqdm(items, desc=what, unit=" " + unit, mininterval=interval, ascii=not live, ncols=100, **options)


def tame_allocator() -> None:
    """Keep freed memory in the process: glibc otherwise returns and faults in every large tensor again.

    Training on a CPU is 1.16 (bf16) to 1.3 times (float32) faster. It holds for processes that start afterwards; other
    systems ignore it.
    """
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**31 - 1))
    os.environ.setdefault("MALLOC_TOP_PAD_", str(256 << 20))


@dataclass(frozen=True)
class Processes:
    """How many processes share the work, and the file of `accelerate config` that spreads them over machines, or ""."""

    count: int = 1
    config: str = ""


ALONE = Processes()


def exit_code(work: Callable[[], object]) -> int:
    """The work of a launched process; 1 where it ends with a UserError, whose line `launch` hands on.

    However the process that launched it ends, it ends too: what comes through standard input is that end.
    """
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
    try:
        work()
    except UserError as error:
        sys.stderr.write(f"carvana: {error}\n")  # at once: lines of processes that fail together must not mix
        return 1
    return 0


def launch(
    module: str, arguments: Iterable[object], processes: Processes, on_line: Callable[[], None] = lambda: None
) -> None:  # fmt: skip
    """Run `python -m module arguments` in connected processes, each on a device of its own, by `accelerate launch`.

    Each machine starts its own ones by a call like this. What they write to stderr goes to ours, and `on_line` is
    called after each line. UserError with the line `carvana: ...` of a process that failed, or with the error that
    ended it.
    """
    options = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes.count)]
    options += ["--main_process_port", "0", "--num_cpu_threads_per_process", str(max(1, cores() // processes.count))]
    options = ["--config_file", processes.config] if processes.config else options
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", module, *map(str, arguments)]
    reason = error = ""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr or ():
                if not reason and line.startswith("carvana: "):
                    reason = line.removeprefix("carvana: ").strip()
                if not error and re.match(
                    r"(?!.*ChildFailedError)(\[rank\d+\]: )?\w[\w.]*(Error|Exception|Interrupt)\b", line
                ):
                    error = line.strip()
                if not reason:  # what follows is the launcher's own traceback
                    print(line, end="", file=sys.stderr)
                on_line()
        finally:
            process.terminate()
    if process.returncode:
        killed = f"The {processes.count} processes were killed, most likely for memory. Lower batch_size, then workers."
        raise UserError(reason or (f"One of {processes.count} processes failed: {error}" if error else killed))
