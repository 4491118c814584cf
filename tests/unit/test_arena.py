"""Where torch's tensors lie with arena.c, each time in a process of its own: it is for good."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dressage.compiled import library

MB = 1 << 20
PREAMBLE = f"""
import ctypes, os, random
from dressage.compiled import library
from dressage.monitor import memory
assert memory.keep_freed_memory() and memory.has_arena()
import torch
extent = library("arena").arena_extent
extent.restype = ctypes.c_size_t
def taken(megabytes): return torch.ones(megabytes * {MB // 4})
"""


def told(program: str, **more: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    ran = subprocess.run([sys.executable, "-c", program], env=env | more, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


COMMITS = Path("/proc/sys/vm/overcommit_memory")
usable = pytest.mark.skipif(
    library("arena") is None
    or (sys.platform, platform.machine(), platform.libc_ver()[0]) != ("linux", "x86_64", "glibc")
    or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    or (COMMITS.is_file() and COMMITS.read_text().strip() == "2"),
    reason="arena.c was not built, is not for this system, or addresses are limited",
)


@usable
def test_tensors_keep_what_is_in_them_and_holes_are_filled() -> None:
    program = """
a, b, c, d = map(taken, (1, 2, 3, 1))
place = a.data_ptr()
assert [x.data_ptr() - place for x in (b, c, d)] == [1 << 20, 3 << 20, 6 << 20]  # side by side
del b
assert taken(2).data_ptr() - place == 1 << 20  # the hole that one of the same size has left
del a  # a hole of 1 + 2, since the two have been joined
e = taken(3)
assert e.data_ptr() == place
del c  # 3 to 6
f = taken(1)
assert f.data_ptr() - place == 3 << 20
g = torch.ones(2000)  # small ones are the C library's
assert not 0 <= g.data_ptr() - place < extent()
del d, e, f
assert extent() == 0  # nothing is left, so all holes were joined

draw, live = random.Random(0), []
for step in range(20_000):
    if len(live) > 200 or live and draw.random() < 0.5:
        block, value = live.pop(draw.randrange(len(live)))
        assert bool((block == value).all())
    else:
        live.append((torch.full((draw.randrange(1, 200_000),), float(step)), float(step)))
    if step % 1000 == 0:
        memory.give_back_memory()
del block
live.clear()
assert extent() == 0
"""
    told(PREAMBLE + program)


@usable
def test_what_is_free_goes_back_when_asked_and_a_child_has_its_own() -> None:
    program = """
from threading import Thread
kept, gone = taken(1), taken(200)
more = taken(1)
del gone
before = memory.rss_gb()
memory.give_back_memory()
assert before - memory.rss_gb() > 0.18 and bool((kept == 1).all()) and bool((more == 1).all())

def churn(value):
    for size in range(1, 400):
        block = torch.full((size * 100,), value)
        assert bool((block == value).all())
threads = [Thread(target=churn, args=(float(number),)) for number in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]

torch.set_num_threads(1)
if (child := os.fork()) == 0:
    kept.zero_()
    os._exit(0 if taken(1).sum() == 1 << 18 and kept.sum() == 0 else 1)
assert os.waitpid(child, 0)[1] == 0 and bool((kept == 1).all())
"""
    told(PREAMBLE + program)


@usable
def test_more_than_the_machine_has_is_refused_at_once(tmp_path: Path) -> None:
    program = """
import shutil
pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
before = extent()
try:
    torch.empty(int(1.5 * pages), dtype=torch.uint8)
except RuntimeError:
    pass
assert extent() == before

first = library("arena")
shutil.copy(first._name, COPY)
assert ctypes.CDLL(COPY).arena_use() == 0  # the entries are not the C library's any more
assert int(taken(1).sum()) == 1 << 18
"""
    told(PREAMBLE + f"COPY = {str(tmp_path / 'copy.so')!r}" + program)


@usable
def test_it_is_the_same_where_torch_was_at_work_before() -> None:
    program = f"""
import torch
old = torch.ones({MB})
from dressage.monitor import memory
memory.keep_freed_memory()
new = torch.ones({MB})
print(memory.has_arena(), abs(old.data_ptr() - new.data_ptr()) > {4 * MB}, bool((old == new).all()))
del old, new
"""
    assert told(program) == "True True True"


@pytest.mark.parametrize(
    ("before", "more"),
    [
        ("", {"MALLOC_TRIM_THRESHOLD_": "1000000"}),
        ("", {"LD_PRELOAD": "libm.so.6"}),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", {}),
        ("from dressage import compiled; compiled.__file__ = '/nowhere/compiled.py'", {}),
    ],
    ids=["another's setting", "another's allocator", "few addresses", "not built"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="settings of Linux")
def test_elsewhere_tensors_lie_where_they_did(before: str, more: dict[str, str]) -> None:
    program = f"""
{before}
from dressage.monitor import memory
memory.keep_freed_memory()
import torch
memory.give_back_memory()
print(memory.has_arena(), int(torch.ones({MB}).sum()))
"""
    assert told(program, **more) == f"False {MB}"


def test_a_file_that_is_no_library_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dressage.compiled.__file__", str(tmp_path / "compiled.py"))
    from importlib.machinery import EXTENSION_SUFFIXES

    (tmp_path / f"_broken{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert library("broken") is None and library("absent") is None
