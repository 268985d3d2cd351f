"""Prints the commands that make the paper's table: ``python -m ocvtp.harness.commands llava-1.5-7b``.

One run for the unpruned model, one for every budget of every method, and the table of all. Nothing is run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, get_args

from ocvtp.harness.protocol import BENCHMARKS, GROUP, MODELS, Benchmark, Model, benchmark_of

#: As ``--methods``: the pruner, trained.
PRUNER = "pruner"
_THROWN_AWAY = (("merge", "off"), ("weigh", "false"))
_TASKS = '"$(python -m ocvtp.harness.tasks)"'


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Attributes:
        label: folder of its results.
        arguments: of the model, in order.
    """

    label: str
    arguments: tuple[tuple[str, str], ...]


def runs(
    model: Model,
    methods: Sequence[str],
    budgets: Sequence[int | float] | None,
    pruner: str | None,
    *,
    merged: bool = False,
) -> list[Run]:
    """The rows: unpruned, then every method at every budget.

    Of the paper's budgets, those that a method can't have are left out (:func:`impossible`).

    Args:
        model: of the protocol.
        methods: names that ``pruner=`` takes, or :data:`PRUNER`.
        budgets: tokens, or shares of them; ``None``: the paper's.
        pruner: folder, Hub id or file, for :data:`PRUNER`.
        merged: of pruner and rules, also rows in which kept tokens stand for the others.

    Raises:
        ValueError: a method that is none, a pruner that nobody named or no row uses, a budget that a method
            can't have, or one row twice.
    """
    asked = model.budgets if budgets is None else budgets
    _check(model, methods, asked, pruner)
    own = (("pretrained", model.checkpoint), *model.arguments)
    # Unpruned tiles are packed as the model packs them: a layout is chosen for who drops tokens.
    plain = tuple(pair for pair in own if pair[0] != "layout")
    found = [Run("none", (*plain, ("pruner", "none")))]
    for method in methods:
        ours = method == PRUNER or method in _kinds()["rules"]
        base = plain if method in _kinds()["inside"] else own
        for budget in asked:
            if (why := impossible(model, method, budget)) is not None:
                if budgets is None:
                    continue
                raise ValueError(f"{method} can't have --keep {budget}: {why}")
            keep = _inside_budget(model, budget) if method in _kinds()["inside"] else budget
            chosen = (*base, *_choice(model, method, pruner), ("keep", str(keep)))
            # As published: dropped tokens are thrown away.
            found.append(Run(f"{method}-{budget}", (*chosen, *(_THROWN_AWAY if ours else ()))))
            if merged and ours:
                found.append(Run(f"{method}-{budget}-merged", chosen))
    return found


def _choice(model: Model, method: str, pruner: str | None) -> tuple[tuple[str, str], ...]:
    if method == PRUNER:
        chosen = pruner or model.pruner
        if chosen is None:
            raise ValueError(f"{model.note}: --pruner FOLDER, or --methods")
        return (("pruner", chosen),)
    from ocvtp.harness.arguments import reads_text  # later: see _kinds

    reads = model.text_encoder is not None and reads_text(method)
    return (("pruner", method), *((("text_encoder", str(model.text_encoder)),) if reads else ()))


def _kinds() -> dict[str, tuple[str, ...]]:
    from ocvtp.methods.in_llm import Inside  # later: they load torch, which --help can do without
    from ocvtp.vlm.contracts.reducer import Rival
    from ocvtp.vlm.contracts.selector import Rule

    return {"rules": get_args(Rule), "rivals": get_args(Rival), "inside": get_args(Inside)}


def _check(model: Model, methods: Sequence[str], budgets: Sequence[int | float], pruner: str | None) -> None:
    """Raise ``ValueError`` for rows that would fail once they run."""
    for what, given in (("method", methods), ("budget", budgets)):
        if twice := sorted({str(one) for one in given if given.count(one) > 1}):
            raise ValueError(
                f"{what} {', '.join(twice)} is there twice, and each row has a folder of its own"
            )
    if pruner is not None and PRUNER not in methods:
        raise ValueError(f"--pruner is for the method {PRUNER}, and --methods has {', '.join(methods)} alone")
    for budget in budgets:
        whole = isinstance(budget, int)
        if not (1 <= budget < (model.tokens or math.inf) if whole else 0 < budget < 1):
            of = "" if model.tokens is None else f", fewer than the {model.tokens} of an image"
            raise ValueError(f"--keep {budget}: tokens, at least 1{of}, or a share between 0 and 1")
    for method in methods:
        if method != PRUNER:
            check_method(method)
        if method in _kinds()["rivals"]:
            from ocvtp.vlm.rivals.catalog import METHODS

            fitting = [name for name, kind in METHODS.items() if model.family in kind.families]
            if method not in fitting:
                raise ValueError(f"{method} has no form on {model.name}; there are {', '.join(fitting)}")


def impossible(model: Model, method: Any, budget: int | float) -> str | None:
    """Why a method can't have a budget on this model; ``None``: it can, as far as can be told."""
    if method not in _kinds()["inside"]:
        return None
    from ocvtp.methods.in_llm import by_name

    given = _inside_budget(model, budget)
    if isinstance(given, int) and model.tokens is None:
        return f"images of {model.name} differ in size, so it takes a share"
    try:
        by_name(method, given, depth=model.depth, tokens=model.tokens)
    except ValueError as error:
        return str(error)
    return None


def _inside_budget(model: Model, budget: int | float) -> int | float:
    """For what drops tokens inside: packed as the model packs them, tiles leave numbers that differ."""
    packed = any(name == "layout" for name, _ in model.arguments)
    return round(budget / model.tokens, 4) if isinstance(budget, int) and packed and model.tokens else budget


def check_method(name: str) -> None:
    """Raise ``ValueError`` for a name that ``pruner=`` doesn't know; the message lists those it does."""
    known = [one for names in _kinds().values() for one in names]
    if name not in known:
        raise ValueError(f"no method {name!r}; there are {PRUNER}, {', '.join(known)}")


def command(run: Run, out: str, tasks: Sequence[str], processes: int, batch_size: int) -> list[str]:
    """Lines of shell: the run, and a look at what it left, since lmms-eval exits with 0 after an exception.

    Args:
        run: a row.
        out: folder of all rows.
        tasks: of lmms-eval.
        processes: GPUs, each with a model of its own.
        batch_size: questions answered at once.
    """
    folder = PurePosixPath(out) / run.label
    given = (*run.arguments, ("resume", f"{folder}/answers"))
    said = ",".join(f"{name}={_value(name, value)}" for name, value in given)
    start = "lmms-eval" if processes == 1 else f"accelerate launch --num_processes {processes} -m lmms_eval"
    return [
        f"{start} --model ocvtp --include_path {_TASKS} --tasks {','.join(tasks)} \\",
        f"  --batch_size {batch_size} --log_samples --output_path {shlex.quote(str(folder))} \\",
        f"  --model_args {shlex.quote(said)}",
        f"ls {shlex.quote(str(folder))}/*/*_results.json || echo {shlex.quote(_failed(run))}",
    ]


def _value(name: str, text: str) -> str:
    """lmms-eval cuts at commas, but not in brackets and quotes, and reads numbers and truth values."""
    if name in ("pruner", "resume") and ("," in text or _reads_as_other(text)):
        return f'"{text}"'
    return text


def _reads_as_other(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false")
    return True


def _check_names(out: str, pruner: str | None) -> None:
    """Raise ``ValueError`` for names that lmms-eval's command line would tear apart."""
    if "," in out:
        raise ValueError(f"--out {out}: lmms-eval cuts its --output_path at commas")
    for option, name in (("--out", out), ("--pruner", pruner or "")):
        # A quote or a bracket that is open hides the commas behind it, and so the arguments.
        if found := sorted(set(name) & set("\"'{}[]\\")):
            raise ValueError(
                f"{option} {name}: lmms-eval's --model_args can't have {' '.join(found)} in a name"
            )


def _failed(run: Run) -> str:
    return (
        f"{run.label} has no results: look above, and give the same command again, which goes on from there"
    )


def script(
    model: Model,
    *,
    methods: Sequence[str] = (PRUNER,),
    budgets: Sequence[int | float] | None = None,
    pruner: str | None = None,
    tasks: Sequence[str] = (GROUP,),
    out: str = "runs",
    processes: int = 1,
    batch_size: int = 1,
    merged: bool = False,
) -> str:
    """The whole of it, for a shell.

    Args:
        model: of the protocol.
        methods: see :func:`runs`.
        budgets: see :func:`runs`; ``None``: the paper's.
        pruner: see :func:`runs`.
        tasks: of lmms-eval, or names of benchmarks.
        out: see :func:`command`.
        processes: see :func:`command`.
        batch_size: see :func:`command`; 1 is the paper's.
        merged: see :func:`runs`.

    Raises:
        ValueError: see :func:`runs`; or an unknown benchmark; or a comma in ``out``, or a quote, bracket or
            backslash there or in ``pruner``, which lmms-eval can't read.
    """
    _check_names(out, pruner)
    rows = runs(model, methods, budgets, pruner, merged=merged)
    whole = GROUP in tasks
    asked = list(BENCHMARKS) if whole else [benchmark_of(one) for one in tasks]
    names = [GROUP] if whole else [one.asked or one.task for one in asked]
    lines = [f"# {model.name}: {len(rows)} runs of about {_count(asked)} questions each (from memory)"]
    if any(one.login for one in asked):
        lines.append("# some of the data sets want a login: hf auth login")
    if model.note:
        lines.append(f"# {model.note}")
    inside = set(methods) & set(_kinds()["inside"])
    if inside and any(_inside_budget(model, one) != one for one in model.budgets):
        lines.append(f"# inside the language model budgets are shares of {model.tokens}: packed tiles differ")
    for method, budget in itertools.product(methods, model.budgets if budgets is None else ()):
        if why := impossible(model, method, budget):
            lines.append(f"# no row of {method} at {budget}: {why}")
    for row in rows:
        lines += ["", *command(row, out, names, processes, batch_size)]
    folders = " ".join(shlex.quote(str(PurePosixPath(out) / row.label)) for row in rows)
    lines += ["", f"python -m ocvtp.harness.relative {folders}"]
    return "\n".join(lines)


def _count(asked: Sequence[Benchmark]) -> str:
    return f"{sum(one.questions for one in asked):,}".replace(",", " ")


def _budget(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"tokens, or a share such as 0.25; got {text!r}") from None


def main(given: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ocvtp.harness.commands",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", choices=list(MODELS), help="of the paper")
    parser.add_argument("--list", action="store_true", help="show benchmarks, scores, and what is not known")
    parser.add_argument("--pruner", help="folder, Hub id or official weights; default: the official ones")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[PRUNER],
        metavar="NAME",
        help="pruner, rules and rivals; default: pruner",
    )
    parser.add_argument(
        "--merged", action="store_true", help="also rows whose kept tokens stand for the others"
    )
    parser.add_argument("--keep", nargs="+", type=_budget, help="tokens or shares; default: the paper's")
    parser.add_argument(
        "--tasks", nargs="+", default=[GROUP], help=f"benchmarks; default: {GROUP}, all of them"
    )
    parser.add_argument("--out", default="runs", help="folder of all runs; default: %(default)s")
    parser.add_argument("--gpus", type=int, default=1, help="each with a model of its own; default: 1")
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1, as in the paper")
    options = parser.parse_args(given)
    if options.list:
        print(listing())
        return 0
    if options.model is None:
        parser.error(f"which model? One of {', '.join(MODELS)}")
    if min(options.gpus, options.batch_size) < 1:
        parser.error("--gpus and --batch-size are at least 1")
    try:
        text = script(
            MODELS[options.model],
            methods=options.methods,
            budgets=options.keep,
            pruner=options.pruner,
            tasks=options.tasks,
            out=options.out,
            processes=options.gpus,
            batch_size=options.batch_size,
            merged=options.merged,
        )
    except ValueError as error:
        parser.error(str(error))
    print(text)
    return 0


def listing() -> str:
    """Benchmarks as text."""
    lines = []
    for one in BENCHMARKS:
        scores = "; ".join(
            f"{score.name or 'score'} = {' + '.join(score.metrics)}"
            + (f" ({score.why})" if score.why else "")
            for score in one.scores
        )
        lines.append(f"{one.name:8} {one.task:16} {one.split}, about {one.questions} questions: {scores}")
        asked = f"asked as {one.asked}" if one.asked else ""
        lines += [f"{'':8} {text}" for text in (asked, one.judge, one.note) if text]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
