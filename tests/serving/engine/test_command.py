"""Lines that documents and ``ocvtp serve`` print are lines that vLLM accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_commands import run

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

ROOT = Path(__file__).parents[3]
OURS = ("--keep", "--pruner")


def parsers() -> tuple[Any, Any]:
    """vLLM's own, and that of ``vllm serve``."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve = ServeSubcommand().subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    return parser, serve


def parsed(words: list[str]) -> Any:
    """As ``vllm serve`` reads them, which ends on what it doesn't know."""
    return parsers()[0].parse_args(["serve", *words])


def documented(command: str) -> list[list[str]]:
    lines = (ROOT / "docs/serving.md").read_text().splitlines()
    return [shlex.split(line) for line in lines if line.startswith(f"{command} serve ")]


@pytest.mark.quick
def test_what_is_printed() -> None:
    assets = ROOT / "assets"
    arguments = [str(assets / "testbed"), "--keep", "28", "--pruner", str(assets / "testbed-pruner")]
    words = shlex.split(run("serve", *arguments, "--port", "8000", "--print").strip())
    found = parsed(words[2:])
    assert found.model_tag == str(assets / "testbed")
    assert found.port == 8000
    assert found.hf_overrides["ocvtp"]["keep"] == 28
    assert found.hf_overrides["architectures"] == ["OcvtpLlavaForConditionalGeneration"]


@pytest.mark.quick
def test_the_documented_line_of_vllm() -> None:
    (words,) = documented("vllm")
    assert set(parsed(words[2:]).hf_overrides) == {"architectures", "ocvtp"}


@pytest.mark.quick
def test_the_documented_lines_of_ocvtp() -> None:
    """vLLM's part of them: ours is tested where it is printed."""
    lines = documented("ocvtp")
    assert len(lines) >= 6
    for words in lines:
        rest = words[2:]
        for option in OURS:
            if option in rest:
                at = rest.index(option)
                del rest[at : at + 2]
        parsed(rest)


@pytest.mark.quick
def test_our_options_are_none_of_vllms() -> None:
    """A name that both had would be taken by us, and vLLM would never see it."""
    theirs = {name for action in parsers()[1]._actions for name in action.option_strings}
    ours = set(re.findall(r"--[a-z][a-z-]+", run("serve", "--help"))) - {"--help"}
    assert "--keep" in ours
    mentioned = {"--tensor-parallel-size", "--port"}  # in the help's own words
    assert ours & theirs <= mentioned
