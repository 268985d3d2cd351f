"""All golden files of a folder, through the product's functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.rivals import in_llm
from bench.rivals.from_pixels import is_from_pixels, pairs
from bench.rivals.golden import TOLERANCE, Case, Golden
from bench.rivals.methods import IN_LLM, INPUTS, KINDS, Kind


@dataclass
class Outcome:
    """Lines about a folder, and whether all of it is proven."""

    lines: list[str]
    proven: bool


def check_folder(folder: Path, tolerance: float = TOLERANCE, kinds: Mapping[str, Kind] = KINDS) -> Outcome:
    """Go through every ``*.safetensors`` of ``folder``: one line for each file and sub-case.

    What differs, and what nothing answers for, follow as lines of their own and leave the folder unproven.
    Methods of which it holds no file are named.
    """
    lines: list[str] = []
    proven = True
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return Outcome([f"{folder}: no golden files"], False)
    for path in paths:
        if path.stem in INPUTS:
            lines.append(f"{path.stem}: input of others")
            continue
        if path.stem.split("_")[0] in IN_LLM:
            of_file, fine = check_language_model(path)
            lines += of_file
            proven = proven and fine
            continue
        kind = kinds.get(path.stem.split("_")[0])
        if kind is None:
            lines.append(f"{path.stem}: FAILED: nothing answers for files of this kind")
            proven = False
            continue
        of_file, fine = check_file(path, kind, tolerance)
        lines += of_file
        proven = proven and fine
    here = {path.stem.split("_")[0] for path in paths}
    for family in (set(kinds), IN_LLM):
        if here & family and not family <= here:
            lines.append(f"not in this folder: {', '.join(sorted(family - here))}")
    return Outcome(lines, proven)


def check_file(path: Path, kind: Kind, tolerance: float = TOLERANCE) -> tuple[list[str], bool]:
    """Lines about one file, and whether all of it is proven."""
    try:
        golden = Golden.read(path, tolerance)
    except Exception as error:  # any reason is a failure of the file, and the others have their turn
        return [f"{path.stem}: FAILED: {type(error).__name__}: {error}"], False
    lines: list[str] = []
    fine = True
    for name in golden.cases():
        cases = [Case(golden, name, dtype) for dtype in kind.dtypes(golden.name, name)]
        problems: list[str] = []
        for case in cases:
            try:
                kind.check(case)
            except Exception as error:
                case.wrong.append(f"{name}: {type(error).__name__}: {error}")
            problems += [f"FAILED: {line}" for line in case.wrong]
        dtypes = ", ".join(str(case.dtype).removeprefix("torch.") for case in cases)
        compared, worst = max(case.compared for case in cases), max(case.worst for case in cases)
        said = f"{compared} compared, largest difference {worst:.1e} ({dtypes})"
        where = f"{golden.name} {name}".rstrip()
        lines.append(f"{where}: {'' if problems else 'ok, '}{said}")
        lines += [f"{golden.name} {problem}" for problem in problems]
        fine = fine and not problems
    of_pixels = from_pixels(golden)
    lines += of_pixels
    unseen = [f"{golden.name} FAILED: {key}: nothing looks at it" for key in golden.unseen()]
    unseen += [f"{golden.name} FAILED: {key}: no tower was run for it" for key in sorted(golden.owed)]
    failed = any(" FAILED: " in line for line in of_pixels)
    return lines + unseen, fine and not failed and not unseen


def check_language_model(path: Path) -> tuple[list[str], bool]:
    """Lines about a file of a method inside the language model, and whether all of it is proven."""
    try:
        found = in_llm.check(path)
    except Exception as error:
        return [f"{path.stem}: FAILED: {type(error).__name__}: {error}"], False
    wrong = [f"{path.stem} FAILED: {one.key}: off by {one.error:.2e}" for one in found if not one.ok]
    worst = max((one.error for one in found), default=0.0)
    fine = bool(found) and not wrong
    said = f"{len(found)} compared, largest difference {worst:.1e} (float32)"
    return [f"{path.stem}: {'ok, ' if fine else ''}{said}", *wrong], fine


def from_pixels(golden: Golden) -> list[str]:
    """Lines about what whole towers make of a file's pictures."""
    case = Case(golden, "", torch.float32)
    try:
        for key, found, expected in pairs(golden):
            case.pair(key, found, expected)
    except Exception as error:
        case.wrong.append(f"{type(error).__name__}: {error}")
    if not case.compared and not case.wrong:
        return [f"{golden.name} FAILED: no tower was run"] if is_from_pixels(golden.name) else []
    said = f"{case.compared} compared, largest difference {case.worst:.1e}"
    problems = [f"{golden.name} FAILED: {line}" for line in case.wrong]
    return [f"{golden.name} from pixels: {'ok, ' if not problems else ''}{said}", *problems]
