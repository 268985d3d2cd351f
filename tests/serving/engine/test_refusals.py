"""What can't be served is refused when an engine is configured, before weights are read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engine import folders
from tests.serving.engine.asking import engine
from tests.serving.engine.folders import Hub
from tests.serving.engine.pruners import Pruners

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")
pytestmark = pytest.mark.quick

LLAVA, QWEN = "OcvtpLlavaForConditionalGeneration", "OcvtpQwen2_5_VLForConditionalGeneration"


def configure(folder: Path, architecture: str, settings: Any, **more: Any) -> Any:
    """vLLM's configuration, which front end, engine and workers are made from."""
    from vllm.engine.arg_utils import EngineArgs

    ours = {} if settings is None else {"ocvtp": settings}
    overrides = {"architectures": [architecture], **ours}
    return EngineArgs(model=str(folder), hf_overrides=overrides, **more).create_engine_config()


WRONG: dict[str, tuple[str, Any, str]] = {
    "no settings": (LLAVA, None, "needs settings: --hf-overrides"),
    "settings that are none": (LLAVA, 64, "needs settings: --hf-overrides"),
    "unknown setting": (LLAVA, {"kep": 6}, "unknown ocvtp setting.* kep; there are keep, pruner"),
    "too large": (LLAVA, {"keep": 600}, "keep must be between 1 and 16"),
    "none": (LLAVA, {"keep": 0}, "keep must be between 1 and"),
    "a word": (LLAVA, {"keep": "many"}, "keep must be"),
    "auto": (LLAVA, {"keep": "auto"}, 'keep="auto" is not available: vLLM counts tokens before'),
    "proportional attention": (LLAVA, {"keep": 6, "weigh": True}, "vLLM's kernels have no place"),
    "merged before the projector": (LLAVA, {"keep": 6, "merge": "features"}, "the projector too"),
    "no such pruner": (LLAVA, {"keep": 6, "pruner": "./no/such"}, "neither a folder nor a repository id"),
    "layer of a rule": (LLAVA, {"keep": 6, "layer": 3}, "needs none: leave it out"),
    "newlines of LLaVA-1.5": (LLAVA, {"keep": 6, "newlines": "all"}, "is not available for llava"),
    "newlines by rows": (LLAVA, {"keep": 6, "newlines": "rows"}, "depends on what is chosen"),
    "refined without features": (LLAVA, {"keep": 6, "pruner": "grid", "refine": 1}, "refine needs features"),
    "unknown backend": (LLAVA, {"keep": 6, "backend": "cuda"}, "backend must be one of"),
    "layer beyond": (LLAVA, {"keep": 6, "features": 9}, "features must be between 0 and 2"),
}


@pytest.mark.parametrize(("architecture", "settings", "said"), WRONG.values(), ids=WRONG)
def test_settings(hub: Hub, architecture: str, settings: Any, said: str) -> None:
    """As ``RuntimeError``: after a ``ValueError`` vLLM would serve text only, with a warning."""
    with pytest.raises(RuntimeError, match=f"(?s)ocvtp: .*{said}"):
        configure(hub(folders.LLAVA), architecture, settings)


def test_a_pruner_for_another_tower(hub: Hub, pruner_for: Pruners) -> None:
    settings = {"keep": 2, "pruner": str(pruner_for(hub(folders.QWEN2_5)))}
    with pytest.raises(RuntimeError, match=r"ocvtp: the pruner reads tokens of 2 x 2 .*ocvtp features"):
        configure(hub(folders.LLAVA), LLAVA, settings)


def test_another_familys_architecture(hub: Hub) -> None:
    with pytest.raises(RuntimeError, match=f"ocvtp: {QWEN} can't serve .* 'llava': give .*{LLAVA}"):
        configure(hub(folders.LLAVA), QWEN, {"keep": 6})


def test_an_unknown_architecture(hub: Hub) -> None:
    with pytest.raises(ValueError, match="OcvtpFooForConditionalGeneration"):
        configure(hub(folders.LLAVA), "OcvtpFooForConditionalGeneration", {"keep": 6})


def test_a_tower_that_is_not_known(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "pixtral"
    folder.symlink_to(hub(folders.LLAVA))
    from transformers import AutoConfig

    import ocvtp
    import ocvtp.serving

    config = AutoConfig.from_pretrained(folder).to_dict()
    config["vision_config"] = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 2}
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ocvtp.UnsupportedModelError, match="'pixtral' vision tower; supported: clip"):
        ocvtp.serving.engine_args(str(made), keep=6)


def test_pruned_videos(hub: Hub) -> None:
    with pytest.raises(RuntimeError, match="ocvtp: only images are served"):
        configure(hub(folders.QWEN2_5), QWEN, {"keep": 6}, video_pruning_rate=0.5)


def test_an_internvl_of_another_layer(hub: Hub, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(hub(folders.INTERNVL), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -2}))
    with pytest.raises(RuntimeError, match="ocvtp: vLLM reads InternVL's last layer"):
        configure(folder, "OcvtpInternVLForConditionalGeneration", {"keep": 2})


def test_an_onevision_that_vllm_packs_otherwise(hub: Hub, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(hub(folders.ONEVISION), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_aspect_ratio": "anyres_max_2"}))
    with pytest.raises(RuntimeError, match=r"ocvtp: vLLM packs images .* as anyres_max_9, .* 'anyres_max_2'"):
        configure(folder, "OcvtpLlavaOnevisionForConditionalGeneration", {"keep": 6})


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"backend": "triton"}])
def test_what_this_machine_cannot_compute(hub: Hub, pruner_for: Pruners, settings: dict[str, str]) -> None:
    """Known to workers alone; at the start, and not when the first image comes."""
    folder = hub(folders.LLAVA)
    with (
        pytest.raises(RuntimeError, match=r"ocvtp: .*(Triton|triton)"),
        engine(folder, {"keep": 6, "pruner": str(pruner_for(folder)), **settings}),
    ):
        pass


@pytest.mark.parametrize("flag", ["compile_mm_encoder", "cudagraph_mm_encoder"])
def test_a_tower_that_is_compiled_or_replayed(hub: Hub, flag: str) -> None:
    """Hooks would not see what passes it."""
    options = {"enforce_eager": False, "compilation_config": {flag: True}}
    with (
        pytest.raises(RuntimeError, match=f"ocvtp: .*{flag} must be off"),
        engine(hub(folders.QWEN2_5), {"keep": 3}, **options),
    ):
        pass


def test_a_data_parallel_tower_falls_back(hub: Hub) -> None:
    """To sharded weights, which vLLM says itself."""
    config = configure(hub(folders.QWEN2_5), QWEN, {"keep": 6}, mm_encoder_tp_mode="data")
    assert config.model_config.multimodal_config.mm_encoder_tp_mode == "weights"


def test_another_pruner_in_a_worker(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that has another one than the front end must not answer."""
    from ocvtp.serving.vllm import front

    told = front.PrunedInfo.__init__

    def mistold(self: Any, ctx: Any) -> None:
        told(self, ctx)
        setattr(ctx.model_config.hf_config, front.DIGEST, "of another")

    monkeypatch.setattr(front.PrunedInfo, "__init__", mistold)
    with (
        pytest.raises(RuntimeError, match="ocvtp: this machine has another pruner"),
        engine(hub(folders.LLAVA), {"keep": 6}),
    ):
        pass


def test_a_vllm_without_what_we_override() -> None:
    """An override that nobody calls would go unnoticed."""
    from vllm.model_executor.models import llava

    from ocvtp.serving.vllm.families.llava import PrunedLlava
    from ocvtp.serving.vllm.model import twin

    class OldProcessor:
        def _get_prompt_updates(self) -> None:
            pass

    info, dummy = llava.LlavaProcessingInfo, llava.LlavaDummyInputsBuilder
    with pytest.raises(ImportError, match="OldProcessor has no _get_mm_hashes"):
        twin(PrunedLlava, llava.LlavaForConditionalGeneration, info, OldProcessor, dummy)


def test_a_server_ends_with_our_words(hub: Hub, tmp_path: Path) -> None:
    """Exit code 1, our message last, and no weight was read: there are none."""
    import shutil

    folder = shutil.copytree(
        hub(folders.LLAVA), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    overrides = {"architectures": [LLAVA], "ocvtp": {"keep": 600}}
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    result = subprocess.run(
        [*server, "--hf-overrides", json.dumps(overrides)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    last = (result.stdout + result.stderr).strip().splitlines()[-1]
    assert "ServingError: ocvtp: keep must be between 1 and 16" in last
