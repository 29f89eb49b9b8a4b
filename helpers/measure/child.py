"""The first thing that a process of its own does (`memory.alone`). Imports nothing, so that it can be silent before it does."""

import ctypes
import os
import pickle
import platform
from traceback import format_exception

M_MMAP_THRESHOLD, GIVEN_BACK = -3, 1_000_000  # of glibc's malloc.h; bytes


def enter(job: bytes, pipe) -> None:
    """Unpickle (work, args), do it, send (answer, None) or (None, the error in words)."""
    with open(os.devnull, "w") as nowhere:  # libraries talk while they are imported
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if platform.libc_ver()[0] == "glibc":
        # glibc keeps freed blocks below a threshold that it raises as it goes; fixed, it gives them back. The same as
        # MALLOC_MMAP_THRESHOLD_, which only counts at the start of the process that this one is forked from
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, GIVEN_BACK)
    try:
        work, args = pickle.loads(job)
        answer = work(*args), None
    except Exception as error:  # of any kind, and perhaps not picklable: it arrives in words
        answer = None, "".join(format_exception(error))
    pipe.send(answer)
