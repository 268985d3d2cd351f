# No postponed annotations: the interpreter looks for the very object tl.constexpr.
"""All iterations of Slot Attention in one launch, for few images in float16.

At B=1 a launch for each step keeps a few of a GPU's processors busy for two microseconds and then starts the
next. Here every tile of every step is a task, numbered so that a task needs only tasks with lower numbers. A
program takes the next number (an atomic ticket), waits until the tiles that it reads are there (counters, one
for each image or row tile and step), computes its tile (steps.py, as the launches do), and counts it.

The holder of the lowest unfinished number never waits, so however many programs there are, however the GPU
schedules them and whoever runs beside: it ends. No cooperative launch is needed, and one program after the
other can do it, as the interpreter does. No float atomics; a tile doesn't depend on who computes it when.

What a step overwrites has been read by then: the chain of counters that leads to the writer passes each
reader, since a row tile waits for all images that it has rows of, and an image for all its row tiles.
tests/races/ proves each pair of accesses ordered, in the interpreter and in any order of tasks.

The counters start at zero: the launch before leaves them so. Floor at (B, N, K) = (1, 576, 64), three
iterations: 0.9 GFLOP are 1 us; 13 steps that wait for each other, each a block's chain of products long.
"""

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ocvtp_kernels._jit import after_launches_before
from ocvtp_kernels._launch import Phase, launch_in_phases
from ocvtp_kernels._tiles import Tile, tile_of_rows
from ocvtp_kernels.slot_attention.cut import Cut, padded_slots
from ocvtp_kernels.slot_attention.folded import FoldedWeights, SlotStart
from ocvtp_kernels.slot_attention.reference import NORM_EPS
from ocvtp_kernels.slot_attention.shapes import Assigned
from ocvtp_kernels.slot_attention.steps import (
    PART,
    attend_tile,
    gru_tile,
    linear_tile,
    parts_of,
    update_tile,
)

#: More slots would need more than one tile of attention.
MAX_SLOTS = 64
# From here on the tasks' tickets and counters cost more than the launches they save, by the prediction of
# docs/kernels.md; a GPU has to tell.
_MOST_IMAGES = 4


@triton.jit
def _wait(counter_ptr, want):
    """Until ``want`` tiles are there; what they wrote can be read then."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < want:
        pass


@triton.jit
def _done(counter_ptr):
    """This tile is there: what all threads wrote before the barrier comes before the count."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["B", "START", "N", "K", "T", "R", "ITERATIONS"])
def slot_loop(
    z_ptr, start_q_ptr, start_bias_ptr, start_s_ptr, gates_ptr,
    wi_ptr, wh_ptr, bi_ptr, bm_ptr, bh_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, wq_ptr, dot_ptr,
    p_ptr, sums_ptr, u_ptr, mass_ptr, e_ptr, half_e_ptr, e_parts_ptr, hidden_ptr, s_ptr, half_s_ptr,
    s_parts_ptr, q_ptr, bias_ptr, keys_ptr, largest_ptr, finite_ptr, counters_ptr,
    B, START, N, K, KS, D, M, T, R, ITERATIONS, eps, norm_eps,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    BJ: tl.constexpr, BO1: tl.constexpr, BO2: tl.constexpr, BOQ: tl.constexpr, BC: tl.constexpr,
    BCG: tl.constexpr,
    PARTS: tl.constexpr, PP: tl.constexpr,
    EVEN: tl.constexpr, EVEN_G: tl.constexpr, EVEN_M: tl.constexpr,
    SCALE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tasks). ITERATIONS updates of the slots and the attention after them, from tokens ``z``
    ``[B, N, D]`` and START = 1 or B images' initial slots, queries, bias and hidden gates.

    ``counters``, int32, zero: of each image, how many tiles of attention and of means there are; of each row
    tile, of GRU, first and second layer and queries; the next ticket. Results: as ``triton.attend``, LAST.
    """
    after_launches_before(PDL)
    rows = tl.cdiv(R, BR)
    slot_tiles = tl.cdiv(K, BK)
    columns = tl.cdiv(D, BD)
    gru_columns, first_columns = tl.cdiv(D, BJ), tl.cdiv(M, BO1)
    second_columns, query_columns = tl.cdiv(D, BO2), tl.cdiv(D, BOQ)
    attends, updates = B * T, B * slot_tiles * columns
    grus, firsts, seconds = rows * gru_columns, rows * first_columns, rows * second_columns
    each = attends + updates + grus + firsts + seconds + rows * query_columns
    updated_ptr = counters_ptr + B
    entered_ptr = updated_ptr + B
    first_ptr = entered_ptr + rows
    second_ptr = first_ptr + rows
    asked_ptr = second_ptr + rows

    ticket = tl.atomic_add(asked_ptr + rows, 1, sem="relaxed", scope="gpu")
    # Only with counters that were not zero are there others, who would wait for ever.
    if ticket < tl.num_programs(0):
        iteration = ticket // each
        task = ticket - iteration * each
        if task < attends:
            image = task // T
            part = task - image * T
            wide = image.to(tl.int64)
            if iteration == 0:
                start = tl.minimum(image, START - 1).to(tl.int64)
                attend_tile(
                    part, T, wide, start, z_ptr, start_q_ptr, start_bias_ptr, p_ptr, sums_ptr, keys_ptr,
                    largest_ptr, finite_ptr, N, K, KS, D, BM, BK, BC, EVEN, True, False, SCALE, PRECISION,
                )  # fmt: skip
                _done(counters_ptr + image)
            else:
                for row in tl.range(image * K // BR, (image * K + K - 1) // BR + 1):
                    _wait(asked_ptr + row, iteration * query_columns)
                tl.debug_barrier()
                if iteration == ITERATIONS:
                    attend_tile(
                        part, T, wide, wide, z_ptr, q_ptr, bias_ptr, p_ptr, sums_ptr, keys_ptr, largest_ptr,
                        finite_ptr, N, K, KS, D, BM, BK, BC, EVEN, True, True, SCALE, PRECISION,
                    )  # fmt: skip
                else:
                    attend_tile(
                        part, T, wide, wide, z_ptr, q_ptr, bias_ptr, p_ptr, sums_ptr, keys_ptr, largest_ptr,
                        finite_ptr, N, K, KS, D, BM, BK, BC, EVEN, True, False, SCALE, PRECISION,
                    )  # fmt: skip
                    _done(counters_ptr + image)
        else:
            task -= attends
            if task < updates:
                image = task // (slot_tiles * columns)
                inner = task - image * slot_tiles * columns
                _wait(counters_ptr + image, (iteration + 1) * T)
                tl.debug_barrier()
                update_tile(
                    inner % columns, inner // columns, image.to(tl.int64), p_ptr, sums_ptr, z_ptr, u_ptr,
                    mass_ptr, N, K, KS, D, T, eps, BK, BN, BD, True, SCALE, PRECISION,
                )  # fmt: skip
                _done(updated_ptr + image)
            else:
                task -= updates
                row = task % rows
                if task < grus:
                    for image in tl.range(row * BR // K, (tl.minimum(row * BR + BR, R) - 1) // K + 1):
                        _wait(updated_ptr + image, (iteration + 1) * slot_tiles * columns)
                    tl.debug_barrier()
                    if iteration == 0:
                        gru_tile(
                            row, task // rows, u_ptr, mass_ptr, start_s_ptr, half_s_ptr, gates_ptr, wi_ptr,
                            wh_ptr, bi_ptr, bm_ptr, bh_ptr, e_ptr, half_e_ptr, e_parts_ptr, R, START * K, D,
                            BR, BJ, BCG, PARTS, EVEN_G, True, True, PRECISION,
                        )  # fmt: skip
                    else:
                        gru_tile(
                            row, task // rows, u_ptr, mass_ptr, s_ptr, half_s_ptr, gates_ptr, wi_ptr, wh_ptr,
                            bi_ptr, bm_ptr, bh_ptr, e_ptr, half_e_ptr, e_parts_ptr, R, R, D,
                            BR, BJ, BCG, PARTS, EVEN_G, False, True, PRECISION,
                        )  # fmt: skip
                    _done(entered_ptr + row)
                else:
                    task -= grus
                    if task < firsts:
                        _wait(entered_ptr + row, (iteration + 1) * gru_columns)
                        tl.debug_barrier()
                        linear_tile(
                            row, task // rows, half_e_ptr, w1_ptr, b1_ptr, e_ptr, hidden_ptr, half_s_ptr,
                            e_parts_ptr, s_parts_ptr, dot_ptr, bias_ptr, R, M, D, norm_eps,
                            BR, BO1, BC, PARTS, PP, EVEN, True, True, False, False, True, FAST, PRECISION,
                        )  # fmt: skip
                        _done(first_ptr + row)
                    else:
                        task -= firsts
                        if task < seconds:
                            _wait(first_ptr + row, (iteration + 1) * first_columns)
                            tl.debug_barrier()
                            linear_tile(
                                row, task // rows, hidden_ptr, w2_ptr, b2_ptr, e_ptr, s_ptr, half_s_ptr,
                                e_parts_ptr, s_parts_ptr, dot_ptr, bias_ptr, R, D, M, norm_eps,
                                BR, BO2, BC, PARTS, PP, EVEN_M, False, False, True, False, True, FAST,
                                PRECISION,
                            )  # fmt: skip
                            _done(second_ptr + row)
                        else:
                            task -= seconds
                            _wait(second_ptr + row, (iteration + 1) * second_columns)
                            tl.debug_barrier()
                            linear_tile(
                                row, task // rows, half_s_ptr, wq_ptr, b2_ptr, e_ptr, q_ptr, half_s_ptr,
                                s_parts_ptr, e_parts_ptr, dot_ptr, bias_ptr, R, D, D, norm_eps,
                                BR, BOQ, BC, PARTS, PP, EVEN, True, False, False, True, True, FAST, PRECISION,
                            )  # fmt: skip
                            _done(asked_ptr + row)


@contextlib.contextmanager
def up_to(images: int) -> Iterator[None]:
    """Use the loop for up to so many images, 0 for none: to compare it with the launches."""
    global _MOST_IMAGES
    before, _MOST_IMAGES = _MOST_IMAGES, images
    try:
        yield
    finally:
        _MOST_IMAGES = before


def serves(batch: int, slots: int, num_iters: int, cut: Cut) -> bool:
    """Whether the loop is for such a call: of few images, and with an update."""
    few = 0 < batch <= _MOST_IMAGES and slots <= MAX_SLOTS
    return few and num_iters > 1 and cut.dtype == torch.float16


def counters(batch: int, slots: int, cut: Cut) -> torch.Tensor:
    """Room for what :func:`assign` counts with, int32; it must be zero by then."""
    row_tiles = triton.cdiv(batch * slots, _tile(batch * slots, cut)["BR"])
    return torch.empty(1 + 2 * batch + 4 * row_tiles, dtype=torch.int32, device=cut.device)


def phases(
    batch: int, tokens: int, slots: int, width: int, mlp: int, updates: int, size: Tile
) -> list[Phase]:
    """The tiles of every step, in the order of their tickets."""
    rows = triton.cdiv(batch * slots, size["BR"])
    attend = Phase("attend", batch * triton.cdiv(tokens, size["BM"]))
    update = (
        attend,
        Phase("update", batch * triton.cdiv(slots, size["BK"]) * triton.cdiv(width, size["BD"])),
        Phase("gru", rows * triton.cdiv(width, size["BJ"])),
        Phase("mlp-1", rows * triton.cdiv(mlp, size["BO1"])),
        Phase("mlp-2", rows * triton.cdiv(width, size["BO2"])),
        Phase("queries", rows * triton.cdiv(width, size["BOQ"])),
    )
    return [*update * updates, attend]


def assign(
    z: torch.Tensor,
    start: SlotStart,
    w: FoldedWeights,
    num_iters: int,
    eps: float,
    counters: torch.Tensor,
    found: Assigned,
    cut: Cut,
) -> None:
    """Fill ``found`` with what the last iteration over ``z`` ``[B, N, D]`` leaves; ``counters`` are zero."""
    batch, tokens, width = z.shape
    starts, slots, _ = start.queries.shape
    mlp, rows, padded = w.mlp_fc1_weight.shape[0], batch * slots, padded_slots(slots)
    size = _tile(rows, cut)
    parts, columns = triton.cdiv(tokens, size["BM"]), triton.cdiv(width, PART)

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=cut.device)

    scratch = (
        room(batch, tokens, padded, dtype=cut.dtype),  # attention as weights
        room(batch, parts, padded),  # its sums
        room(rows, width, dtype=cut.dtype),  # means
        room(rows),  # mass
        room(rows, width),  # slots after the GRU
        room(rows, width, dtype=cut.dtype),
        room(2, rows, columns),
        room(rows, mlp, dtype=cut.dtype),  # hidden layer
        room(rows, width),  # slots after the MLP
        room(rows, width, dtype=cut.dtype),
        room(3, rows, columns),
        room(rows, width, dtype=cut.dtype),  # queries
        room(rows),  # their bias
    )
    updates = num_iters - 1
    steps = phases(batch, tokens, slots, width, mlp, updates, size)
    launch_in_phases(
        steps, slot_loop, (sum(step.tasks for step in steps),), cut.device,
        z, start.queries, start.query_bias, start.slots, start.gates_hidden,
        w.gru_input_weight, w.gru_hidden_weight, w.gru_input_bias, w.gru_mass_bias, w.gru_hidden_bias,
        w.mlp_fc1_weight, w.mlp_fc1_bias, w.mlp_fc2_weight, w.mlp_fc2_bias,
        w.query_weight, w.query_bias_weight,
        *scratch, found.keys, found.largest, found.finite.view(torch.uint8), counters,
        batch, starts, tokens, slots, padded, width, mlp, parts, rows, updates, eps, NORM_EPS,
        **parts_of(width), EVEN=width % size["BC"] == 0, EVEN_G=width % size["BCG"] == 0,
        EVEN_M=mlp % size["BC"] == 0,
        SCALE=cut.scale, FAST=cut.dtype == torch.float16, PRECISION=cut.precision, **size,
    )  # fmt: skip


def _tile(rows: int, cut: Cut) -> dict[str, int]:
    return dict(tile_of_rows("slot_attention.slot_loop", cut.arch, f"K<={MAX_SLOTS}-16bit", rows))
