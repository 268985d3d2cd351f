"""How far results may be from exact ones, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest

from tests.kernels import triton_device
from tests.kernels.triton_device import within


def test_a_gpu_may_err_more_than_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_device, "ON_GPU", False)
    assert within(1e-6, 1e-7) == pytest.approx(2.1e-6)
    assert within(1e-6, 1e-7, 3) == pytest.approx(3.1e-6)
    monkeypatch.setattr(triton_device, "ON_GPU", True)
    assert within(1e-6, 1e-7) == pytest.approx(5e-6)
    assert within(1e-6, 1e-5) == pytest.approx(1.2e-5)  # never less than in the interpreter
