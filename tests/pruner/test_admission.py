"""Which shapes get a graph: few captures whatever comes, and none too few for what comes often."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import pytest

from ocvtp.pruner.admission import SIGHTINGS, WINDOW, Admission

PLACES = 8


class Run(NamedTuple):
    captured: list[int]
    evicted: list[int]
    hits: int


def run(calls: Iterable[int], admission: Admission[int] | None = None) -> Run:
    """As the runner uses it, every capture succeeding."""
    admission = Admission(PLACES) if admission is None else admission
    inside: set[int] = set()
    captured, evicted, hits = [], [], 0
    for key in calls:
        admission.note(key)
        if key in inside:
            hits += 1
        elif admission.due(key):
            captured.append(key)
            gone = admission.admit(key)
            inside.add(key)
            if gone is not None:
                evicted.append(gone)
                inside.remove(gone)
        assert len(inside) <= PLACES
    return Run(captured, evicted, hits)


def test_the_third_sighting_counts() -> None:
    found = run([5] * SIGHTINGS)
    assert found.captured == [5]
    assert run([5] * (SIGHTINGS - 1)).captured == []
    assert run([5, 6, 5, 6, 5, 7]).captured == [5]


def test_sightings_of_long_ago_do_not_count() -> None:
    others = range(100, 100 + WINDOW)
    assert run([5, 5, *others, 5, 5]).captured == []
    assert run([5, 5, *others, 5, 5, 5]).captured == [5]


@pytest.mark.parametrize("shapes", [2, 8, 9, 10, 16, 21, 40])
def test_no_storm_with_shapes_in_turn(shapes: int) -> None:
    found = run(i % shapes for i in range(4000))
    assert len(found.captured) <= shapes + len(found.evicted) / 8
    if shapes <= 21:  # each comes three times in 64 calls: those that are in stay in
        assert len(found.captured) == min(shapes, PLACES)
        assert found.hits >= 0.95 * 4000 * min(shapes, PLACES) / shapes


@pytest.mark.parametrize("shapes", [9, 12, 30, 100])
def test_no_storm_in_disorder(shapes: int) -> None:
    generator = random.Random(shapes)
    found = run(generator.randrange(shapes) for _ in range(6400))
    assert len(found.captured) <= 2 * PLACES + 6400 / WINDOW


def test_hot_shapes_get_in_whatever_else_comes() -> None:
    generator = random.Random(0)
    found = run(generator.choice([1, 2, 3, generator.randrange(10, 1000)]) for _ in range(2000))
    assert set(found.captured) >= {1, 2, 3}
    assert found.hits >= 0.7 * 2000


def test_new_shapes_take_the_places_of_those_that_come_no_more() -> None:
    found = run([i % 8 for i in range(400)] + [8 + i % 8 for i in range(400)])
    assert found.captured == list(range(16))
    assert sorted(found.evicted) == list(range(8))
    assert found.hits >= 800 - 16 * SIGHTINGS - WINDOW


def test_who_went_is_not_back_at_once() -> None:
    admission: Admission[int] = Admission(1)
    run([1, 1, 1, 2, 2, 2, 2, 2, 2], admission)
    for key in (1, 1):
        admission.note(key)
        assert not admission.due(key)
    assert admission.unseen() == []


def test_a_failure_delays_longer_each_time() -> None:
    admission: Admission[int] = Admission(PLACES)
    pauses = []
    for _ in range(12):
        calls = 0
        while not admission.due(1):
            admission.note(1)
            calls += 1
        pauses.append(calls)
        admission.failed()
    assert pauses == [SIGHTINGS, 32, 64, 128, 256, 512, 1024, 2048, *[4096] * 4]
    while not admission.due(1):
        admission.note(1)
    admission.admit(1)
    admission.dismiss(1)
    for _ in range(SIGHTINGS):
        admission.note(1)
    assert admission.due(1)


def test_anothers_capture_delays_a_little() -> None:
    admission: Admission[int] = Admission(PLACES)
    for _ in range(5):
        calls = 0
        while not admission.due(1):
            admission.note(1)
            calls += 1
        assert calls <= 4
        admission.busy()


def test_what_is_inside_and_not_seen_any_more() -> None:
    admission: Admission[int] = Admission(PLACES)
    run([1, 1, 1, 2, 2, 2], admission)
    for _ in range(WINDOW - 4):
        admission.note(3)
    assert admission.unseen() == []
    admission.note(3)
    assert admission.unseen() == [1]
    for _ in range(3):
        admission.note(3)
    assert admission.unseen() == [1, 2]
