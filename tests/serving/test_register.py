"""The entry point: vLLM calls it in every process, pruned model or not."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import ocvtp.serving.vllm
from ocvtp.serving.vllm import register
from ocvtp.serving.vllm.twins import TWINS

ROOT = Path(__file__).parents[2]


class Registry:
    """vLLM's, as far as it goes."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, architecture: str, where: str) -> None:
        self.models[architecture] = where


def with_vllm(monkeypatch: pytest.MonkeyPatch, registry: object) -> None:
    module = types.ModuleType("vllm")
    module.ModelRegistry = registry  # type: ignore[attr-defined]
    module.__version__ = "0.99.0rc1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_finds_it() -> None:
    (found,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "ocvtp")
    assert found.load() is register


def test_it_names_every_twin_and_does_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    with_vllm(monkeypatch, registry)
    register()
    once = dict(registry.models)
    register()
    assert registry.models == once
    assert len(once) == len(TWINS) == 12
    # From the package itself, by whose contents vLLM knows whether what it remembers is of this class; and
    # with vLLM's own version, by which it doesn't.
    assert once["OcvtpLlavaForConditionalGeneration"] == "ocvtp.serving.vllm:llava__0_99_0rc1"
    for family, twin in TWINS.items():
        assert f"ocvtp.serving.vllm:{family}__0_99_0rc1" in once.values()
        assert (ROOT / Path(*twin.module.split("."))).with_suffix(".py").is_file()


def test_a_name_that_is_no_model() -> None:
    for name in ("llava", "llava__", "bert__0_32_0"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(ocvtp.serving.vllm, name)


class Broken:
    """A registry that changed."""

    def register_model(self, *_: object) -> None:
        raise TypeError("register_model takes three arguments")


@pytest.mark.parametrize("registry", [Broken(), None], ids=["changed", "not there"])
def test_it_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, registry: object
) -> None:
    """vLLM would start no model at all, pruned or not."""
    with_vllm(monkeypatch, registry)
    with caplog.at_level(logging.ERROR, "ocvtp"):
        register()
    assert "ocvtp's models are not available in this vLLM" in caplog.text


def test_it_is_quick_and_imports_no_model() -> None:
    code = """
import json, sys, time, types
vllm = types.ModuleType("vllm")
vllm.__version__ = "0.99.0rc1"
vllm.ModelRegistry = type("Registry", (), {"register_model": staticmethod(lambda *_: None)})
sys.modules["vllm"] = vllm
before = set(sys.modules)
start = time.perf_counter()
from ocvtp.serving.vllm import register
register()
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""
    command = [sys.executable, "-c", code]
    tries = [json.loads(subprocess.check_output(command, text=True, cwd=ROOT)) for _ in range(3)]
    assert min(seconds for seconds, _ in tries) < 0.05  # the machine may be busy
    modules = tries[0][1]
    assert "torch" not in modules
    assert "transformers" not in modules


def test_importing_ocvtp_imports_no_vllm() -> None:
    code = """
import sys
sys.modules["vllm"] = None  # importing it raises
import ocvtp, ocvtp.serving, ocvtp.vlm, ocvtp.cli, ocvtp.commands.serve, ocvtp.serving.vllm.launch
print("fine")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.stdout.strip() == "fine", result.stderr
