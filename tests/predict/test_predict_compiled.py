"""What the model counts in compiled kernels is what they are known to do: products, and bytes of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")

# Sizes that are no multiples of a tile, so that padding and masks matter.
CODE = """
import json, math
import torch
from bench.launches import _empty, _folded_weights
from bench.predict.kernel import Counter, buffer_number
from bench.predict.model import kernel as time_of
from bench.predict.timed import times
from ocvtp_kernels import _launch
from ocvtp_kernels._arch import pretend
from ocvtp_kernels.slot_attention import SlotStart, triton as slots
from tests.predict.waiting import two_phases

half, (B, N, K, C, H, D) = torch.float16, (1, 333, 50, 192, 224, 96)
with pretend("sm90"), _launch.recording() as made:
    cut = slots.arithmetic(torch.device("meta"), half, False)
    features, hidden = _empty(B, N, C, dtype=half), _empty(N, H, dtype=half)
    slots._linear("encode-1", features, _empty(H, C, dtype=half), _empty(H), hidden, cut, GELU=True)
    slots._normalise(_empty(B, N + 1, C, dtype=half)[:, 1:], features, cut)
    z = _empty(B, N, D, dtype=half)
    found = slots._room_for_results(B, K, N, cut, None)
    slots._launch_attend(z, _empty(1, K, D, dtype=half), _empty(1, K), cut, found=found)
counter = Counter()
linear, normalise, attend = made
rows = {}
for launch in made:
    counts = counter.of(launch)
    rows[launch.kernel.fn.__name__] = [2 * counts.multiply_adds, counts.notes, counts.followed, launch.tile]
expected = {"linear": [(linear, hidden)], "normalise": [(normalise, features)], "attend": [
    (attend, found.keys), (attend, found.largest), (attend, found.finite)]}
stored = {
    name: [
        [counter.of(launch).outputs[buffer_number(launch, t)], t.numel() * t.element_size()]
        for launch, t in pairs
    ]
    for name, pairs in expected.items()
}
extra = {name: len(counter.of(pairs[0][0]).outputs) - len(pairs) for name, pairs in expected.items()}

x, y, counters = _empty(3 * 128), _empty(20 * 128), _empty(2, dtype=torch.int32)
phases = (_launch.Phase("write", 3), _launch.Phase("copy", 5))
tile = dict(FIRST=3, BLOCK=128, TIMES=4, num_warps=4, num_stages=1)
waiting = _launch.Launch(two_phases, (8,), (x, y, counters), tile, phases)
first, second = counter.of(waiting, range(3)), counter.of(waiting, range(3, 8))
part = times(waiting, 1, counter)
from bench.aot import TARGETS, compiled_for
from bench.first.checks.kernels import add_one, in_turn

options = {"DEPENDENT": True, "num_warps": 4, "PDL": True}
dependent = _launch.Launch(add_one, (1,), (counters,), options)
words, sums = _empty(15, dtype=torch.int32), _empty(14, dtype=torch.int32)
turns = {"PHASES": 13, "TASKS": 9, "num_warps": 4}
phases = tuple(_launch.Phase(str(i), 9) for i in range(13))
turn = _launch.Launch(in_turn, (13 * 9,), (words, sums), turns, phases)
ptx = compiled_for(dependent, TARGETS["sm_90"]).asm["ptx"]
print(json.dumps({
    "dependent": [word in ptx for word in ("griddepcontrol.wait", "griddepcontrol.launch_dependents")],
    "dependent counts": [counter.of(dependent).dependent, counter.of(dependent).stored],
    "turns": [counter.of(turn, range(9 * i, 9 * i + 9)).outputs[buffer_number(turn, sums)] for i in (0, 12)],
    "rows": rows, "stored": stored, "extra": extra,
    "first": [first.outputs.get(buffer_number(waiting, t), 0) for t in (x, y)],
    "second": [second.outputs.get(buffer_number(waiting, t), 0) for t in (x, y)],
    "phases": [phase.name for phase in part.phases], "waits": part.waits, "notes": part.counts.notes,
}))
"""


@pytest.fixture(scope="module")
def counted() -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def test_products_are_those_of_whole_tiles(counted: dict) -> None:
    flops, _, _, tile = counted["rows"]["linear"]
    assert flops == 2 * padded(333, tile["BM"]) * padded(224, tile["BO"]) * padded(192, tile["BC"])
    flops, _, _, tile = counted["rows"]["attend"]
    assert flops == 2 * padded(333, tile["BM"]) * padded(50, tile["BK"]) * padded(96, tile["BC"])
    assert counted["rows"]["normalise"][0] == 0


def test_every_byte_of_a_result_is_written_once(counted: dict) -> None:
    for name, pairs in counted["stored"].items():
        for got, want in pairs:
            assert got == want, name
    assert counted["extra"] == {"linear": 0, "normalise": 0, "attend": 0}


def test_all_of_it_could_be_derived(counted: dict) -> None:
    for name, (_, notes, followed, _) in counted["rows"].items():
        assert notes == [], name
        assert followed > 1


def test_programs_that_wait_do_the_tasks_of_their_tickets(counted: dict) -> None:
    assert counted["first"] == [3 * 128 * 4, 0]
    assert counted["second"] == [0, 5 * 4 * 128 * 4]
    assert counted["phases"] == ["1 write", "2 copy"]
    assert counted["waits"] == pytest.approx(2 * 1.2)
    assert counted["notes"] == []


def test_kernels_of_the_first_minutes_compile(counted: dict) -> None:
    """The interpreter has neither dependent launches nor programs that wait."""
    assert counted["dependent"] == [True, True]
    assert counted["dependent counts"] == [True, 4]
    assert counted["turns"] == [4, 4]  # one task of each phase adds up
