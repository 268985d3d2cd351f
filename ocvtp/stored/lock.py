"""Locks of files and folders, which the system takes back when a process ends."""

from __future__ import annotations


def lock(descriptor: int) -> bool:
    """Lock what is open for this process alone, until it is closed.

    Returns:
        ``False``: another process has it. Where there are no locks, nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:  # not POSIX
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
