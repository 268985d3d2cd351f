from typing import Any


def serves(*a: Any) -> bool:
    return False


def counters(*a: Any) -> Any: ...
def assign(*a: Any) -> Any: ...
