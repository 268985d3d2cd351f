"""The card of the hub's kernel: what it is, how it is used, and what of it has run on which hardware."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TEXT = """---
library_name: kernels
license: LICENSE
tags:
- kernels
- triton
- vision-language-models
- token-pruning
---

# NAME

Triton kernels for pruning the vision tokens of vision-language models: Slot Attention on folded weights, and
its training step; choosing, gathering and merging tokens; the attention that tokens receive in an encoder;
coverage, diversity and reconstruction errors of what is kept. Each operation has a PyTorch reference that
defines what is correct, gradients where there are any, a FLOP formula, and a fake for `torch.compile`.

It needs torch 2.7 or newer, Python 3.10 or newer and, for the kernels, Triton 3.3 or newer.

## How to use

```python
import torch
LOAD

attention = torch.rand(1, 16, 576, device="cuda").softmax(dim=1)  # [images, slots, tokens]
fill = torch.rand(1, 576, device="cuda")
indices, from_slots = NAME.selection.select_tokens(attention, 64, fill)
```

`backend="auto"` runs kernels on a GPU that tiles were made for, and the reference elsewhere; `"triton"` and
`"torch"` ask for one. Operators are registered under the name of this build, so that several builds, and the
installed package, can be in one process.

## What there is

OPERATIONS

## Hardware

HARDWARE
"""


def records(results: Path) -> list[dict[str, Any]]:
    """Every measurement under ``results``: JSON objects that name the device they come from."""
    found = (json.loads(path.read_text()) for path in sorted(results.glob("*/*.json")))
    return [record for record in found if isinstance(record, dict) and "device" in record]


def hardware(measured: Iterable[Mapping[str, Any]], counts: Mapping[str, Any]) -> str:
    """What has run where, in words.

    Args:
        measured: records; those of a GPU say how many multiprocessors it has.
        counts: the snapshot of ``bench.aot``.
    """
    gpus = sorted({str(record["device"]) for record in measured if "multiprocessors" in record})
    if gpus:
        ran = f"Records of these GPUs are in the source repository: {', '.join(gpus)}."
    else:
        ran = "**Nothing of it has been timed on a GPU yet**: the source repository holds no record of one."
    targets = counts.get("targets", {})
    if not targets:
        return ran
    spills = sum(row["spills"] for rows in targets.values() for row in rows.values())
    how = f"with {spills} spills" if spills else "without spills"
    return (
        f"{ran} Every kernel is compiled ahead of time, {how}, for {', '.join(targets)} (Triton "
        f"{counts['triton']}); what kernels compute is tested in Triton's interpreter, on a CPU."
    )


def card(name: str, repo: str | None, version: int, license_name: str, api: Iterable[str], ran: str) -> str:
    """README.md of the hub's repository, with the front matter that the hub reads."""
    if repo is None:
        how = ["from pathlib import Path", "", "from kernels import get_local_kernel", ""]
        how += [f'{name} = get_local_kernel(Path("."))']
    else:
        how = ["from kernels import get_kernel", ""]
        how += [f'{name} = get_kernel("{repo}", version={version}, trust_remote_code=True)']
    values = {
        "NAME": name,
        "LICENSE": license_name.lower(),
        "LOAD": "\n".join(how),
        "OPERATIONS": "\n".join(f"- `{one}`" for one in api),
        "HARDWARE": ran,
    }
    return re.sub(r"\b(" + "|".join(values) + r")\b", lambda found: values[found[1]], _TEXT)
