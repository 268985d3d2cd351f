"""Reading weights, and the official key names of OC-VTP.

The official file is a flat ``state_dict`` saved with ``torch.save``: 25 keys for the pruner, 69 with the
decoder, possibly wrapped in ``{"state_dict": ...}``. Nothing here executes code from a file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ocvtp.pruner.config import PrunerConfig
from ocvtp.stored.refused import Refused, shown
from ocvtp.stored.strict_json import read_object
from ocvtp.stored.tensors import check_tensors, read_facts

# Official prefix -> ours. The tails (".weight", ".bias", "weight_ih", ...) are the same.
_PREFIXES = {
    "encode_project.mlp.0.": "encoder.norm.",
    "encode_project.mlp.1.": "encoder.fc1.",
    "encode_project.mlp.4.": "encoder.fc2.",
    "initializ.mean": "slot_mean",
    "initializ.logstd": "slot_log_std",
    "aggregat.norm_in.": "slot_attention.input_norm.",
    "aggregat.norm_slots_0.": "slot_attention.slot_norm.",
    "aggregat.proj_q.": "slot_attention.query.",
    "aggregat.proj_k.": "slot_attention.key.",
    "aggregat.proj_v.": "slot_attention.value.",
    "aggregat.gru.": "slot_attention.gru.",
    "aggregat.norm_slots_1.": "slot_attention.mlp_norm.",
    "aggregat.ffn.mlp.0.": "slot_attention.mlp_fc1.",
    "aggregat.ffn.mlp.3.": "slot_attention.mlp_fc2.",
    "decode.mask_token": "decoder.mask_token",
    "decode.posit_embed._pe": "decoder.position",
    "decode.project1.project.": "decoder.token_proj.",
    "decode.project1.norm.": "decoder.token_norm.",
    "decode.project2.project.": "decoder.slot_proj.",
    "decode.project2.norm.": "decoder.slot_norm.",
    "decode.norm0.": "decoder.input_norm.",
    "decode.backbone.layers.": "decoder.layers.",
}
_DECODER = "decode."
_DECODER_LAYER = "decode.backbone.layers."

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AGAIN = "copy it back as it was, download it again, or save the pruner again (save_pretrained)"


class CheckpointError(ValueError):
    """A file or state dict that is not a complete, well-shaped pruner. The message names the key."""


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Around checks of what a file holds: a ``CheckpointError`` that doesn't name ``path`` is made to."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` file, or of a PyTorch file read with ``weights_only=True``.

    Raises:
        TypeError: no path.
        FileNotFoundError: nothing there.
        CheckpointError: not such a file, or it holds more than plain tensors.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"official weights are a file's path or a state dict; got {type(path).__name__}")
    if not str(path):  # as a Path, this would be the current folder
        raise FileNotFoundError("no checkpoint at '': the path is empty")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the weights file, or use OCPruner.from_pretrained")
    if not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} is no regular file; give the weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            loaded = load_file(path)
        except (SafetensorError, KeyError, TypeError) as error:  # the latter: a dtype that torch has not
            raise CheckpointError(
                f"{path} is not a safetensors file of weights ({error}); download it again"
            ) from error
        with naming(path):
            return unwrap_state_dict(loaded)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # on bytes that are no checkpoint, torch.load raises nearly anything
        # Its message is not passed on: it advises weights_only=False, which runs what is in the file.
        raise CheckpointError(
            f"{path} can't be read: it is no PyTorch file that holds tensors alone. "
            "Give official weights (weights.pth or .safetensors)"
        ) from error
    with naming(path):
        state = unwrap_state_dict(loaded)
        for key, tensor in state.items():
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise CheckpointError(
                    f"{key!r} claims shape {list(tensor.shape)}, the file holds fewer values; save it again "
                    "with .contiguous()"
                )
        return state


def read_own_weights(path: Path, config_file: Path, config: PrunerConfig) -> dict[str, torch.Tensor]:
    """Tensors of our own format, compared with what the file says of them and of ``config.json``.

    Files that say nothing are of an older version, or of another program: there is nothing to compare.

    Raises:
        CheckpointError: a tensor or a field of the configuration is not what was saved; names file and field.
    """
    state = read_state_dict(path)
    try:
        found = read_facts(path)
        if found is None:
            return state
        facts, digests = found
        saved = PrunerConfig.from_dict(facts["config"]).to_dict() if "config" in facts else {}
        check_tensors(state, digests)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {_AGAIN}") from error
    now = config.to_dict()
    if differ := [
        f"{name} is {now[name]!r}, was {saved[name]!r}" for name in saved if now[name] != saved[name]
    ]:
        raise CheckpointError(
            f"{config_file}: {'; '.join(differ)} when {path.name} was saved: changed or damaged; {_AGAIN}"
        )
    return state


def read_config(path: Path) -> PrunerConfig:
    """The configuration in a ``config.json``.

    Raises:
        CheckpointError: not a JSON object, or a field that is unknown, of another type or out of bounds;
            names file and field.
    """
    try:
        values = read_object(path)
        if "model_type" in values:
            raise Refused(f"it is a {shown(values['model_type'])} model's")
        return PrunerConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{path} is no pruner's configuration: {error}; {_AGAIN}") from error


def unwrap_state_dict(loaded: object) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, or of ``{"state_dict": ...}`` around one.

    Raises:
        CheckpointError: something in it is not a tensor, or not a plain one; names it.
    """
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"expected a state dict; got {type(loaded).__name__}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"expected only tensors; {shown(key)} is {type(value).__name__}")
        if odd := _odd(value):
            raise CheckpointError(f"{key!r} is {odd}; weights must be plain dense tensors, save it as such")
    return dict(loaded)


def _odd(tensor: torch.Tensor) -> str:
    """What keeps a tensor from being weights, whatever its shape and values; empty if nothing does."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.')} tensor"
    if tensor.is_meta:
        return "a meta tensor, without values"
    return ""


def config_from_official(
    state: Mapping[str, torch.Tensor], num_iters: int, decoder_heads: int, layer: int
) -> PrunerConfig:
    """Every size from the shapes of an official state dict; the arguments are what shapes can't tell.

    Raises:
        CheckpointError: a key needed for a size is missing or has the wrong rank, or it is our own format.
    """
    if "slot_mean" in state and "initializ.mean" not in state:
        raise CheckpointError(
            "this is ocvtp's own format: give the folder that holds it and config.json "
            "(OCPruner.from_pretrained)"
        )

    def size(key: str, rank: int, dim: int) -> int:
        if key not in state:
            raise CheckpointError(
                f"missing key {key!r}: not an official OC-VTP checkpoint, or a truncated one"
            )
        if state[key].ndim != rank:
            raise CheckpointError(
                f"{key!r} must have {rank} dimension(s); got shape {list(state[key].shape)}"
            )
        return state[key].shape[dim]

    decoder: dict[str, int] = {}
    if any(key.startswith(_DECODER) for key in state):
        layers = {key[len(_DECODER_LAYER) :].split(".")[0] for key in state if key.startswith(_DECODER_LAYER)}
        decoder = {
            "decoder_layers": len(layers),
            "decoder_heads": decoder_heads,
            "decoder_ffn_dim": size(f"{_DECODER_LAYER}0.linear1.weight", 2, 0),
            "decoder_tokens": size("decode.posit_embed._pe", 3, 1),
        }
    try:
        return PrunerConfig(
            in_dim=size("encode_project.mlp.1.weight", 2, 1),
            hidden_dim=size("encode_project.mlp.1.weight", 2, 0),
            slot_dim=size("initializ.mean", 3, 2),
            ffn_dim=size("aggregat.ffn.mlp.0.weight", 2, 0),
            num_iters=num_iters,
            layer=layer,
            **decoder,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"no pruner has these sizes: {error}") from error


def from_official_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official names -> ours.

    Raises:
        CheckpointError: a name that is not official.
    """
    unexpected = sorted(key for key in state if not key.startswith(tuple(_PREFIXES)))
    if unexpected:
        raise CheckpointError(f"unexpected key(s) {_listed(unexpected)}")
    return {_rename(key, _PREFIXES): tensor for key, tensor in state.items()}


def to_official_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names -> the official ones."""
    return {to_official_name(key): tensor for key, tensor in state.items()}


def to_official_name(key: str) -> str:
    """One of our names -> the official one."""
    return _rename(key, {ours: official for official, ours in _PREFIXES.items()})


def check_state(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, official_names: bool
) -> None:
    """Raise ``CheckpointError`` unless ``state`` has the names and shapes of ``expected``, and is finite.

    Both are in our names; ``official_names`` says which names the message should speak of.
    """

    def named(keys: list[str]) -> list[str]:
        return sorted(to_official_name(key) if official_names else key for key in keys)

    missing = [key for key in expected if key not in state]
    if missing:
        raise CheckpointError(f"missing key(s) {_listed(named(missing))}")
    unexpected = [key for key in state if key not in expected]
    if unexpected:
        raise CheckpointError(f"unexpected key(s) {_listed(named(unexpected))}")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{named([key])[0]!r} has shape {list(tensor.shape)}; "
                f"the other sizes ask for {list(expected[key].shape)}"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{named([key])[0]!r} is {tensor.dtype}; weights must be "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{named([key])[0]!r} contains NaN or Inf")
    dtypes = sorted({str(tensor.dtype) for tensor in state.values()})
    if len(dtypes) > 1:
        raise CheckpointError(f"all weights must have one dtype; this state dict has {', '.join(dtypes)}")


def _listed(keys: list[str]) -> str:
    """The first of them; a file of something else may have any number, of any length."""
    more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
    return f"{[key[:100] for key in keys[:10]]}{more}"


def _rename(key: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key
