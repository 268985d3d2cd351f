"""Writes folders laid out as the hub repositories of :data:`~tests.vlm.hub_families.FAMILIES` are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.vlm.hub_families import FAMILIES, VOCAB, Family, Id

SHARDS = 2


def write_folder(root: Path, name: str) -> Path:
    """``root/<org>/<name>`` with everything the repository of that name has."""
    family, folder = FAMILIES[name], root / name
    folder.mkdir(parents=True)
    ids = _write_tokenizer(folder, family)
    _write_json(folder / "config.json", _with_ids(family.config, ids))
    for file, content in family.files.items():
        _write_json(folder / file, _with_ids(content, ids))
    _write_weights(folder, family)
    return folder


def random_model(folder: Path) -> Any:
    """The model of a folder's configuration with the weights its checkpoint holds, never saved or loaded."""
    # Of its own in the checkpoint, whatever the configuration says (InternVL's says nothing).
    own_head = any(sample.endswith("lm_head.weight") for sample in _family(folder).samples)
    return random_weights(transformers.AutoConfig.from_pretrained(folder), own_head=own_head)


def random_weights(config: Any, *, own_head: bool = False) -> Any:
    """A model whose answers can be told apart, in numbers that half precision has.

    Args:
        config: of the model.
        own_head: the last layer shares nothing with the embeddings.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            # Logits far enough apart to compare answers; representable in half precision.
            spread = 0.1 if parameter.ndim >= 2 else 0.02
            parameter.copy_((parameter.round() + spread * torch.randn(parameter.shape)).bfloat16().half())
    return model.eval()


def _family(folder: Path) -> Family:
    return FAMILIES[f"{folder.parent.name}/{folder.name}"]


def published_name(name: str, family: Family) -> str:
    """What a parameter of the model is called in the checkpoint."""
    for ours, theirs in family.names:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise ValueError(f"no published name is known for {name}")


def _write_weights(folder: Path, family: Family) -> None:
    model = random_model(folder)
    dtype = getattr(torch, family.config.get("torch_dtype", "bfloat16"))
    tied = {id(model.get_input_embeddings().weight)}
    state = {
        published_name(name, family): parameter.detach().to(dtype).contiguous()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not (name.startswith("lm_head") and id(parameter) in tied)
    }
    names = sorted(state)
    share = -(-len(names) // SHARDS)
    where = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: state[name] for name in names[shard * share : (shard + 1) * share]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where}
    )


def _write_tokenizer(folder: Path, family: Family) -> dict[str, int]:
    """``tokenizer.json`` and its companions; returns the ids of all tokens."""
    from tokenizers import AddedToken, Tokenizer

    first, model = _vocabulary(family)
    tokenizer = Tokenizer(model)
    _set_up(tokenizer, family)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*first, *family.special)]
    )
    ids = tokenizer.get_vocab(with_added_tokens=True)
    assert len(ids) <= VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(family.tokenizer_config)
    config["added_tokens_decoder"] = {
        str(ids[token]): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in (*first, *family.special)
    }
    _write_json(folder / "tokenizer_config.json", config)
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    _write_json(
        folder / "special_tokens_map.json", {role: config[role] for role in roles if config.get(role)}
    )
    _write_json(folder / "added_tokens.json", {token: ids[token] for token in family.special})
    if family.chat:
        _write_json(folder / "chat_template.json", {"chat_template": family.chat})
    return ids


def _vocabulary(family: Family) -> tuple[tuple[str, ...], Any]:
    """The first special tokens, and a BPE model of single characters or bytes."""
    from tokenizers import models, pre_tokenizers

    if family.tokenizer == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        return (), models.BPE({token: index for index, token in enumerate(alphabet)}, [])
    first = {"llama": ("<unk>", "<s>", "</s>"), "gemma": ("<pad>", "<eos>", "<bos>", "<unk>")}[
        family.tokenizer
    ]
    letters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    tokens = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return first, models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _set_up(tokenizer: Any, family: Family) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers, processors

    if family.tokenizer == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    start = family.tokenizer_config["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A",
        pair=f"{start} $A {start} $B",
        special_tokens=[(start, {"llama": 1, "gemma": 2}[family.tokenizer])],
    )


def _with_ids(value: Any, ids: dict[str, int]) -> Any:
    """``value`` with every ``Id`` in it resolved."""
    if isinstance(value, Id):
        return ids[value]
    if isinstance(value, dict):
        return {key: _with_ids(item, ids) for key, item in value.items()}
    return [_with_ids(item, ids) for item in value] if isinstance(value, list) else value


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
