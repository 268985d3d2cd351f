"""Has vLLM load the plug-in of this tree, whether or not something is installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import ocvtp

ROOT = Path(__file__).parents[2]
#: What servers are given of vLLM's variables: where it keeps things. Others would be options nobody recorded.
_PLACES = ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT")
_ENTRY = "[vllm.general_plugins]\nocvtp = ocvtp.serving.vllm:register\n"


def environment(folder: Path, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for servers, which must not be started in a folder that has packages of its own.

    Python looks for entry points along its search path and takes each distribution's first description:
    ours comes first, then this tree, then what was there.

    Args:
        folder: for the description.
        given: variables of this process.
    """
    about = folder / f"ocvtp-{ocvtp.__version__}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ocvtp\nVersion: {ocvtp.__version__}\n")
    (about / "entry_points.txt").write_text(_ENTRY)
    before = [path for path in given.get("PYTHONPATH", "").split(os.pathsep) if path]
    places = [folder.resolve(), ROOT, ROOT / "kernels", *(Path(path).resolve() for path in before)]
    kept = {name: value for name, value in given.items() if not name.startswith("VLLM_") or name in _PLACES}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
