"""A trained pruner as a test fixture: ``python -m bench.evidence.fixture``.

Drops the decoder, which only training needs, and stores features of the middle squares of a few held-out
photographs, which tests compare selectors on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from bench.agreement import Encoder, find_photographs, split
from bench.evidence.views import views
from ocvtp import OCPruner
from ocvtp.training.trainer import without_decoder

FEATURES = "held-out-features.safetensors"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the fixture; its README stays as it is."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.fixture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pruner", type=Path, required=True, help="folder of a trained pruner")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of its vision encoder")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders of them")
    parser.add_argument("--names", nargs="+", required=True, help="files whose features are stored")
    parser.add_argument("--size", type=int, default=224, help="pixels; default: 224")
    parser.add_argument("--out", type=Path, required=True, help="folder of the fixture")
    arguments = parser.parse_args(argv)
    pruner = OCPruner.from_pretrained(arguments.pruner)
    _, held_out = split(find_photographs(arguments.photographs))
    wanted = [photograph for photograph in held_out if photograph.path.name in arguments.names]
    if missing := set(arguments.names) - {photograph.path.name for photograph in wanted}:
        parser.error(f"not among the {len(held_out)} photographs held out: {', '.join(sorted(missing))}")
    layer = pruner.config.layer
    seen = views(Encoder(arguments.encoder, layer), wanted, [layer], arguments.size, 1)
    readme = arguments.out / "README.md"
    said = readme.read_text(encoding="utf-8") if readme.exists() else None
    without_decoder(pruner).save_pretrained(arguments.out)
    if said is not None:
        readme.write_text(said, encoding="utf-8")
    stored = {"features": seen.layers[layer].half(), "received": seen.received}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, arguments.out / FEATURES)
    print(f"{len(wanted)} photographs, {list(stored['features'].shape)}, in {arguments.out}")


if __name__ == "__main__":
    main()
