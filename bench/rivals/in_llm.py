"""Methods inside the language model against tensors of the official code: every step, through our hooks.

The cases are tiny random Llamas with a prompt of embeddings. What is expected is the official code's, or,
where that depends on the order of a set or raises, an independent restatement's (``expect`` in a case's
metadata).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ocvtp.methods import in_llm
from ocvtp.vlm.in_llm import install
from ocvtp.vlm.in_llm.prefill import Seen


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        key: of the tensor.
        error: the largest difference, of sets how many differ.
        ok: whether it is within the case's tolerance.
    """

    key: str
    error: float
    ok: bool


def check(path: str | Path, *, attention: str = "sdpa", family: str = "llama") -> list[Finding]:
    """All comparisons of one case.

    Args:
        path: ``<case>.safetensors``, its weights beside it.
        attention: implementation of the language model's.
        family: ``"llama"``, ``"mistral"`` or ``"qwen2"``, which compute the same here.
    """
    path = Path(path)
    case, tensors = read(path)
    found: list[Finding] = []
    for walk in ("rank", "set") if case["method"] == "dart" else (None,):
        found += _compared(case, tensors, model_of(case, path.parent, attention, family), walk)
    for number, account in enumerate(case["accounting"]):
        tokens = [span[1] for span in case["image_spans"] if span[1]][number]
        made = in_llm.averages(method_of(case), depth=case["layers"], tokens=tokens)
        found.append(_number("accounting.input", made.entering - account["input_average"], 1e-4))
        found.append(_number("accounting.output", made.leaving - account["output_average"], 1e-4))
    return found


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors of one case."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return json.loads(file.metadata()["case"]), tensors


def method_of(case: dict[str, Any], walk: str | None = None) -> in_llm.Method:
    """The settings of a case."""
    given = case["parameters"]
    if case["method"] == "fastv":
        return in_llm.FastV(given["K"], given["keep"])
    if case["method"] == "pdrop":
        return in_llm.PyramidDrop(tuple(given["layer_list"]), tuple(given["ratios"]))
    if case["method"] == "sparsevlm":
        # The narrow heads of these models make divisors negative, which the official code lets stand.
        return in_llm.SparseVLM(
            tuple(given["prune_after_layers"]), tuple(given["lists"]), given["version"], floor=None
        )
    tokens, (own, said) = case["image_spans"][0][1], given["pivots"]
    total = given["max_trunc"] if given["max_trunc"] is not None else tokens * (1 - given["r"])
    keep = own + (own + said) * int(total // (own + said))
    return in_llm.Dart(given["K"], keep, (own, said), "set" if walk == "set" else "rank")


def model_of(case: dict[str, Any], folder: Path, attention: str, family: str) -> Any:
    """The case's language model, of weights under Hugging Face's names."""
    import transformers
    from safetensors.torch import load_file

    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family]
    more: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=case["vocab"],
        hidden_size=case["hidden"],
        intermediate_size=case["intermediate"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        max_position_embeddings=4096,
        rms_norm_eps=case["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": case["rope_theta"]},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation=attention,
        **more,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    width, weights = case["hidden"] // case["heads"], {}
    for name, value in load_file(folder / case["weights"]).items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= case["layers"]:
            continue
        shared = "k_proj" in name or "v_proj" in name
        weights[name] = (value[: case["kv_heads"] * width] if shared else value).float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.endswith(".bias") for name in missing):
        raise ValueError(f"weights don't fit: {missing}, {unexpected}")
    for name, parameter in model.named_parameters():
        if name in missing:
            torch.nn.init.zeros_(parameter)
    return model.float().eval()


@torch.no_grad()
def _compared(
    case: dict[str, Any], tensors: dict[str, torch.Tensor], model: Any, walk: str | None
) -> list[Finding]:
    expect = dict.fromkeys(case["expect"], "official") if walk == "set" else case["expect"]
    label = "" if walk is None else f"{walk}."
    hooks = install(model, method_of(case, walk), placeholders=())
    hooks.seen = []
    embeddings, mask = tensors["inputs_embeds"], tensors.get("attention_mask")
    vision = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    for row, (start, count) in enumerate(case["image_spans"]):
        vision[row, start : start + count] = True
    with hooks.expecting(vision=vision):
        output = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=True)
    found: list[Finding] = []
    for row, (_, count) in enumerate(case["image_spans"]):
        made = torch.zeros(0, dtype=torch.long)
        for cut, seen in enumerate(hooks.seen if count else ()):
            if seen.choice.stands is not None:
                there = seen.rows.vision[row, seen.choice.stands[row, : seen.choice.made[row]]]
                made = torch.cat([made, seen.rows.columns[row, there]])
            found += _at_cut(case, tensors, expect, label, cut, seen, row, made)
    steps, cache = [], output.past_key_values
    for token in tensors["decode_ids"].unbind(1):
        more: dict[str, Any] = {}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -1:]}
        out = model(input_ids=token[:, None], past_key_values=cache, use_cache=True, **more)
        steps.append(out.logits[:, 0])
    tolerance = case["tolerance"]["logits"]
    for name, got in (("logits", output.logits), ("decode_logits", torch.stack(steps, 1))):
        key = f"fixed.{name}" if expect[name] == "fixed" else name
        want = tensors[key]
        last = hooks.seen[-1].stage
        for row in range(len(want)):
            count = int(last.live[row].sum()) if name == "logits" and last is not None else got.shape[1]
            error = (got[row, :count] - want[row, :count]).abs().max()
            found.append(_number(f"{label}{key}.row{row}", float(error), tolerance))
    return found


def _at_cut(
    case: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    expect: dict[str, str],
    label: str,
    cut: int,
    seen: Seen,
    row: int,
    made: torch.Tensor,
) -> list[Finding]:
    """What one row chose at one cut.

    Args:
        made: columns on which tokens that were made stand, at this cut and before: recorded as -1.
    """
    fixed = expect["kept"] == "fixed"

    def want(name: str) -> torch.Tensor | None:
        tail = f"stage{cut}.{name}" if name != "raters" else name
        for prefix in ("fixed.", "") if fixed else ("",):
            for suffix in (f".row{row}", ""):
                if f"{prefix}{tail}{suffix}" in tensors:
                    return tensors[f"{prefix}{tail}{suffix}"]
        return None

    evidence, stage = seen.choice.evidence, seen.stage
    present = seen.rows.present[row]
    kept = seen.choice.kept[row, :present].nonzero()[:, 0]
    found = [_sets(f"{label}stage{cut}.kept.row{row}", kept, want("kept"))]
    scores = evidence["scores"][row, :present]
    if case["method"] == "dart":  # theirs repeat keys that heads share
        scores = scores * (case["official_meta"]["key_heads_seen"] // case["kv_heads"])
    pairs = [("scores", scores)]
    if "head_mass" in evidence:
        pairs.append(("head_mass", evidence["head_mass"][row]))
    for name, got in pairs:
        wanted = want(name)
        if wanted is not None:
            error = float((got - wanted).abs().max() / wanted.abs().max())
            found.append(
                _number(f"{label}stage{cut}.{name}.row{row}", error, case["tolerance"]["scores_relative"])
            )
    if "raters" in evidence and cut == 0:
        found.append(_sets(f"{label}raters", evidence["raters"][row].nonzero()[:, 0], want("raters")))
    if "pivots" in evidence:
        found.append(_sets(f"{label}stage{cut}.pivots", evidence["pivots"][row], want("pivots")))
    merged = want("merged")
    if merged is not None and seen.choice.merged is not None:
        error = float((seen.choice.merged[row, : len(merged)] - merged).abs().max())
        found.append(_number(f"{label}stage{cut}.merged", error, case["tolerance"]["merged"]))
        pooled = want("pool")
        if pooled is not None:
            _, means = in_llm.density_peaks(pooled[None], len(merged))
            error = float((means[0] - merged).abs().max())
            found.append(_number(f"{label}stage{cut}.pool", error, case["tolerance"]["merged"]))
    if stage is None:
        return found
    live = stage.live[row]
    columns, positions = stage.columns[row][live], stage.positions[row][live]
    columns = torch.where(torch.isin(columns, made), -1, columns)
    wanted = want("columns")
    if wanted is not None and label != "set.":  # they are recorded of the restatement alone
        found.append(_sets(f"{label}stage{cut}.columns.row{row}", columns, wanted))
    wanted = want("positions")
    if wanted is not None:
        wanted = wanted[row] if wanted.ndim == 2 else wanted
        found.append(_sets(f"{label}stage{cut}.positions.row{row}", positions, wanted[: len(positions)]))
    return found


def _sets(key: str, got: torch.Tensor, wanted: torch.Tensor | None) -> Finding:
    """Whether two lists of numbers are the same."""
    if wanted is None:
        return Finding(key, float("nan"), False)
    if got.shape != wanted.shape:
        return Finding(key, float("inf"), False)
    differ = int((got != wanted).sum())
    return Finding(key, float(differ), differ == 0)


def _number(key: str, error: float, tolerance: float) -> Finding:
    return Finding(key, abs(error), abs(error) <= tolerance)
