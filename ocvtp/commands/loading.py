"""Images, pruners and models from what a person types. Cheap checks first: a model takes long to load."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ocvtp.commands.dropped import Wishes
from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.progress import busy
from ocvtp.stored.refused import shown

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from rich.console import Console

    from ocvtp import OCPruner, PrunerConfig, PruneReport
    from ocvtp.vlm.contracts.adapter import Adapter
    from ocvtp.vlm.contracts.layout import TowerFacts

DEFAULT_KEEP = 64
_MOST = 2**31  # of anything that a model's configuration counts
DTYPES = ("auto", "float32", "bfloat16", "float16")

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a Path has one slash left; C:/ is a drive


def load_image(path: Path) -> Image:
    """The picture at ``path``, decoded, upright and in RGB."""
    from ocvtp.images import BadImageError, decode

    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give one image file")
    if not os.path.isfile(path):
        if _URL.match(str(path)):
            raise UserError("URLs are not read: download the image first, then give the file")
        raise UserError(f"no image at {path}")
    with blamed_on_input(BadImageError):
        return decode(path)


def model_source(given: str, option: str = "--model") -> str:
    """A model's folder or Hub id, as far as can be told without loading anything.

    Args:
        given: what was typed.
        option: where it was typed, for messages.
    """
    return _model_source(given, option)


def encoder_source(given: str) -> str:
    """The same of a vision encoder, or of a model that has one."""
    return _model_source(given, "--encoder")


def _model_source(given: str, option: str) -> str:
    if not given.strip():
        raise UserError(f"{option} is empty; give a model's folder or Hub id")
    if os.path.isfile(given):
        raise UserError(f"{given} is a file; {option} takes the folder that holds config.json")
    if os.path.isdir(given):
        if _is_pruner_folder(Path(given)):
            swapped = "" if option == "--encoder" else f": are {option} and --pruner swapped?"
            raise UserError(f"{given} holds a pruner, not a model{swapped}")
    elif given.startswith((".", "/", "~")) or given.count("/") > 1:
        raise UserError(f"no model folder at {given}")
    return given


def _is_pruner_folder(folder: Path) -> bool:
    from ocvtp.pruner.config import read_json_object

    config = folder / "config.json"
    if not config.exists():
        return (folder / "weights.pth").exists()
    return "slot_dim" in read_json_object(config)


def is_rule(pruner: str) -> bool:
    """Whether this names a rule, or a method of others, that needs no pruner."""
    from ocvtp.vlm.contracts.reducer import Rival
    from ocvtp.vlm.contracts.selector import Rule

    return pruner in (*get_args(Rule), *get_args(Rival))


def pruner_source(given: str) -> str:
    """A pruner's folder, file or Hub id, as far as can be told without loading anything."""
    from ocvtp.pruner.config import read_json_object

    if not given.strip():
        raise UserError("--pruner is empty; give a pruner's folder, Hub id or official weights file")
    kind = read_json_object(Path(given) / "config.json").get("model_type")
    if kind and not (Path(given) / "weights.pth").exists():
        raise UserError(f"{given} holds a {kind!r} model, not a pruner: are --model and --pruner swapped?")
    return given


def load_pruner(source: str, layer: int | None = None) -> OCPruner:
    """A pruner from our folder, a Hub repository, or an official weights file.

    ``layer`` is what official weights were trained on, which they don't say; our own format does.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from ocvtp.pruner.sources import read_pruner

    with blamed_on_input(OSError, ValueError):
        try:
            return read_pruner(source, layer)
        except GatedRepoError:  # a kind of the next; its message says how to get access
            raise
        except RepositoryNotFoundError as error:
            raise UserError(
                f"no folder {source!r} here, and no such repository on the Hub that you can read; "
                "check the spelling, or log in with: hf auth login"
            ) from error


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:1")
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if not found:
            raise UserError("this machine has no usable CUDA GPU; use --device cpu")
        if (device.index or 0) >= found:
            raise UserError(f"no device {name}: this machine has {found}, numbered from 0")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and bfloat16 (float16 before Ampere) on a GPU."""
    import torch

    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}")
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def read_model_config(source: str, revision: str | None = None) -> Any:
    """The configuration of a model in a local folder or on the Hub, if it is one that can be pruned.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit on the Hub; ``None`` is the default one.
    """
    from transformers import AutoConfig

    from ocvtp.vlm.families import ADAPTERS

    try:
        config = AutoConfig.from_pretrained(source, **({"revision": revision} if revision else {}))
    except Exception as error:  # of a config.json that was altered, transformers raises nearly anything
        if isinstance(error, (OSError, ValueError)):
            where = "" if os.path.isdir(source) else "no such folder here, and not readable from the Hub. "
            raise UserError(f"can't load the model {source!r}: {where}{error}") from error
        raise UserError(_odd_config(source, f"{type(error).__name__}: {error}")) from error
    if config.model_type not in ADAPTERS:
        raise UserError(
            f"{source} is a {config.model_type!r} model; ocvtp prunes these: {', '.join(sorted(ADAPTERS))}"
        )
    for name, value in _numbers(config.to_dict()):
        if abs(value) > _MOST:
            raise UserError(
                _odd_config(source, f"{name} is {shown(value)}, and no model has more than {_MOST}")
            )
    return config


def _numbers(values: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The ints in a configuration, by their names."""
    if type(values) is int:
        yield name, values
    pairs = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in pairs:
        yield from _numbers(value, f"{name}.{key}" if name else str(key))


def _odd_config(source: str, why: str) -> str:
    return (
        f"no model can be made from the config.json of {source} ({why}); if it was changed, copy it back, or "
        "download it again"
    )


def check_fit(config: Any, pruner: PrunerConfig | None, keep: float) -> Adapter:
    """Whether ``pruner`` and ``keep`` suit a model, told from its configuration: no weights are loaded.

    Returns:
        Of a model of shapes alone, for more checks.
    """
    from ocvtp.vlm.contracts.fit import check_fit as check_pruner
    from ocvtp.vlm.skeleton import skeleton_of

    with blamed_on_input(ValueError):
        try:
            adapter = skeleton_of(config)
            facts = adapter.facts({})
        except ValueError:
            raise
        except Exception as error:  # a field of another type or sign, anywhere in transformers
            raise UserError(_odd_config(config.name_or_path, f"{type(error).__name__}: {error}")) from error
        if pruner is not None:
            check_pruner(pruner, facts)
    if facts.tokens is not None and isinstance(keep, int) and keep > facts.tokens:
        got = f"{keep} (the default)" if keep == DEFAULT_KEEP else keep
        raise UserError(
            f"--keep must be between 1 and {facts.tokens}, the image tokens of this model; got {got}"
        )
    return adapter


def load_processor(source: str) -> Any:
    """The model's processor, from its own folder or repository."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"can't load the processor of {source}: {error}") from error


def check_processor(processor: Any, source: str, config: Any, facts: TowerFacts, picture: Image) -> None:
    """Try the processor on ``picture``: it has to make what this model takes."""
    if config.model_type != "llava":  # their processors leave nothing to set
        return
    save = f"and save the processor in {source} (processor.save_pretrained)"
    vision = config.vision_config
    patch = getattr(processor, "patch_size", None)
    if patch != vision.patch_size:
        raise UserError(
            f"processor.patch_size is {patch}, this model's tower cuts patches of {vision.patch_size}: "
            f"set it, {save}"
        )
    with blamed_on_input(ValueError):
        made = processor(images=picture, text=processor.image_token, return_tensors="pt")
    height, width = made["pixel_values"].shape[-2:]
    side = vision.image_size
    if (height, width) != (side, side):
        raise UserError(
            f"the processor makes images of {width} x {height} pixels, this model's tower takes {side} x "
            f"{side}: set processor.image_processor.size and crop_size, {save}"
        )
    placeholders = int((made["input_ids"] == config.image_token_id).sum())
    assert facts.tokens is not None
    rows = facts.tokens + facts.extra_rows
    if placeholders != rows:
        raise UserError(
            f"the processor writes {placeholders} placeholders for an image, this model makes {rows} tokens "
            f"of it: set processor.num_additional_image_tokens and vision_feature_select_strategy, {save}"
        )


def load_weights(source: str, device: torch.device, dtype: torch.dtype, console: Console) -> Any:
    """The model itself."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    # transformers draws bars of its own while it downloads
    waiting = busy(console, f"loading {source}") if os.path.isdir(source) else contextlib.nullcontext()
    try:
        with waiting:
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    except SafetensorError as error:
        raise UserError(
            f"the weights of {source} are damaged or incomplete ({error}); download the model again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"the weights of {source} have other shapes than its config.json says; download the model again"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"can't load the weights of {source}: {error}") from error
    return model.to(device).eval()


@dataclass(frozen=True)
class Prepared:
    """A decoded photograph and a patched model."""

    picture: Image
    model: Any
    processor: Any
    report: PruneReport


def prepare(
    image: Path,
    *,
    model: str,
    pruner: str,
    keep: float,
    device: str,
    dtype: str,
    layer: int | None,
    seed: int,
    refine: int,
    wishes: Wishes,
    console: Console,
    positions: Literal["auto", "compact", "original"] = "auto",
    planned: Callable[[PruneReport], None] | None = None,
) -> Prepared:
    """Check, load and patch: everything that ``prune`` and ``visualize`` do before they differ.

    ``planned`` may refuse what will be done, before weights are loaded.
    """
    from ocvtp.vlm.contracts.selector import reads_features

    if refine and is_rule(pruner) and not reads_features(pruner):
        raise UserError(f"--refine needs features; {pruner!r} reads none")
    if layer is not None and is_rule(pruner):
        raise UserError(f"--layer is for official weights; {pruner!r} needs none: leave it out")
    wishes.check(pruner)
    check_keep(keep)
    model, pruner = model_source(model), pruner_source(pruner)
    picture = load_image(image)
    on = resolve_device(device)
    as_dtype = resolve_dtype(dtype, on)
    loaded_pruner = None if is_rule(pruner) else load_pruner(pruner, layer)
    config = read_model_config(model)
    skeleton = check_fit(config, None if loaded_pruner is None else loaded_pruner.config, keep)
    facts = skeleton.facts({})
    wishes.check_layer(max(facts.consumed_layers))
    options = {"keep": keep, "positions": positions, "seed": seed, "refine": refine, **wishes.options()}
    chosen: Any = pruner if loaded_pruner is None else loaded_pruner
    plan = _planned(skeleton, chosen, options)
    if planned is not None:
        planned(plan)
    processor = load_processor(model)
    check_processor(processor, model, config, facts, picture)
    vlm = load_weights(model, on, as_dtype, console)

    import ocvtp

    with blamed_on_input(ValueError):
        report = ocvtp.apply(vlm, chosen, **options)
    return Prepared(picture, vlm, processor, report)


def _planned(skeleton: Adapter, chosen: Any, options: dict[str, Any]) -> PruneReport:
    """What ``apply`` would do, or why it won't, told from shapes."""
    from ocvtp.vlm.options import Options
    from ocvtp.vlm.resolving import resolve

    with blamed_on_input(ValueError):
        return resolve(skeleton, Options(chosen, **options))[1]


def check_keep(keep: float) -> None:
    """Catch a budget that no model could use before one is loaded."""
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise UserError(f"--keep as a share must be above 0 and at most 1.0; got {keep}")
    elif keep < 1:
        raise UserError(f"--keep must be at least 1; got {keep}")
