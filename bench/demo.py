"""The demo's figures with their provenance: ``python -m bench.demo [--out FILE.json]``."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console

from bench.harness import provenance, summarise
from ocvtp.commands import demo


def main() -> None:
    """Run the demo, gate included, which prints its timings; write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        comparisons = demo.run(
            out=Path(folder),
            keep=arguments.keep,
            repeats=arguments.repeats,
            threads=None,
            console=Console(),
        )
    size = demo.LLAVA_SHAPED
    rows = [
        {
            "what": comparison.name,
            "speedup": comparison.speedup,
            "unpruned": summarise([1e3 * s for s in comparison.unpruned]).to_dict(),
            "pruned": summarise([1e3 * s for s in comparison.pruned]).to_dict(),
            "standing": summarise([1e3 * s for s in comparison.standing]).to_dict()
            if comparison.standing
            else None,
        }
        for comparison in comparisons
    ]
    shape = {
        "image_tokens": size.image_tokens,
        "keep": arguments.keep,
        "prompt_tokens": size.prompt_tokens,
        "vision": size.vision,
        "text": size.text,
    }
    result = {**provenance(), "weights": "random", "dtype": "float32", "shape": shape, "rows": rows}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
