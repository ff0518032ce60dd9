"""The thread pool as Python meets it: threads, forks, Ctrl-C and the end of the interpreter."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sixfold.kernels import _native

pytestmark = [
    pytest.mark.skipif(isinstance(_native.extension(), str), reason=str(_native.extension())),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork and POSIX signals"),
]

PATH = getattr(_native.extension(), "__file__", "")
# The extension alone: importing torch takes seconds, and its threads do not survive a fork.
PRELUDE = f"""
import array, importlib.util, os, signal, sys, threading, time
# A shell that starts a job in the background makes it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
spec = importlib.util.spec_from_file_location("_cpu", {PATH!r})
_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cpu)
words = array.array("Q", range(1 << 18))
address, count = words.buffer_info()
def total(threads, passes=1):
    return _cpu.sum_words(address, count, passes, threads)
expected = sum(words)
FOREVER = 1 << 20
"""


def script(code: str, before: str = "") -> subprocess.Popen[str]:
    # Python 3.12 and later warn of any fork of a process with threads: that is what is tested.
    command = [
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        f"{before}\n{PRELUDE}{code}",
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, errors


def test_workers_are_started_when_needed_and_kept() -> None:
    code = """
assert _cpu.pool_workers() == 0
assert total(1) == expected and _cpu.pool_workers() == 0
assert total(2) == expected and _cpu.pool_workers() == 1
# Two blocks, hence no use for more.
assert total(8) == expected and _cpu.pool_workers() == 1
assert total(4, 2) == 2 * expected and _cpu.pool_workers() == 3
"""
    assert finish(script(code)) == (0, "")


@pytest.mark.parametrize("told", [{}, {"SIXFOLD_THREADS": "own"}, {"OMP_WAIT_POLICY": "PASSIVE"}])
def test_threads_are_those_of_torch_unless_told_otherwise(told: dict[str, str]) -> None:
    if sys.platform != "linux":
        pytest.skip("torch's runtime is looked up on Linux alone")
    # Both kinds do the work, in the parent and in its child, where torch's do not survive.
    code = f"""
import os, torch
{PRELUDE}
own = {bool(told)}
assert _cpu.borrows_threads != own
torch.randn(300, 300) @ torch.randn(300, 300)
assert total(4, 2) == 2 * expected
assert _cpu.pool_workers() == (3 if own else 0)
child = os.fork()
if child == 0:
    os._exit(0 if total(4, 2) == 2 * expected and _cpu.pool_workers() == 3 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    unset = {"SIXFOLD_THREADS", "OMP_WAIT_POLICY"}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | told
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_on_borrowed_threads() -> None:
    process = script(
        """
print("begun", flush=True)
try:
    total(2, FOREVER)
except KeyboardInterrupt:
    assert total(2) == expected
    sys.exit(42)
""",
        before="import torch; torch.set_num_threads(2)",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (42, "")


def test_many_python_threads_at_once() -> None:
    cpu = _native.extension()
    assert not isinstance(cpu, str)
    words = torch.arange(1 << 18)
    expected = int(words.sum())

    def total(threads: int) -> int:
        return int(cpu.sum_words(words.data_ptr(), len(words), 1, threads))

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(total, [1, 2, 3, 4] * 50)) == {expected}


def test_a_forked_child_has_a_pool_of_its_own() -> None:
    code = """
assert total(4, 2) == 2 * expected and _cpu.pool_workers() == 3
for _ in range(20):
    child = os.fork()
    if child == 0:
        fresh = _cpu.pool_workers() == 0
        right = total(3, 2) == 2 * expected and _cpu.pool_workers() == 2
        os._exit(0 if fresh and right else 1)
    assert os.waitpid(child, 0)[1] == 0
assert total(4, 2) == 2 * expected
"""
    assert finish(script(code)) == (0, "")


def test_multiprocessing_by_fork_while_the_pool_is_busy() -> None:
    code = """
import multiprocessing
stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        total(4, 50)
busy = threading.Thread(target=keep_busy)
busy.start()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(total, [1, 2, 3] * 5) == [expected] * 15
stop.set()
busy.join()
"""
    assert finish(script(code)) == (0, "")


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_long_call(threads: int) -> None:
    process = script(f"""
print("begun", flush=True)
try:
    total({threads}, FOREVER)
except KeyboardInterrupt:
    assert total({threads}) == expected
    sys.exit(42)
""")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (42, "")


def test_a_handler_that_does_not_raise_does_not_end_the_call() -> None:
    process = script("""
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(time.monotonic()))
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
passes = 4000
assert total(2, passes) == passes * expected % 2**64
while not heard:
    time.sleep(0.01)
""")
    assert finish(process) == (0, "")


def test_another_threads_long_call_does_not_hold_up_the_exit() -> None:
    process = script("""
threading.Thread(target=total, args=(4, FOREVER), daemon=True).start()
time.sleep(0.2)
""")
    assert finish(process) == (0, "")
