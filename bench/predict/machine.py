"""Runs the integer part of machine code, to count what a launch executes and moves.

Addresses, masks and loops of our kernels follow from arguments and from a program's place in the grid, all of
which are known before a launch; what kernels compute in floating point, and what they read from memory, is
not, and needn't be. So registers hold integers or "not known", all threads of many programs go through the
code at once, and every access to memory is seen with its address.

A branch that depends on what is not known is taken neither as a loop (its body counts once) nor as a way
around (what it would skip is counted); :attr:`Counted.undecided` says where that happened. That is right for
a loop that waits for others, whose waiting is no work, and a guess elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bench.predict import integers
from bench.predict.instructions import KNOWN
from bench.predict.integers import Predicate, Value
from bench.predict.sass import Instruction, following, is_predicate, register

WARP = 32
#: Bytes that L2 and a multiprocessor exchange at least: one sector of a line.
SECTOR = 32
_MOST_STEPS = 3_000_000
_NO_RESULT = frozenset(
    {"STG", "ST", "STS", "STSM", "RED", "REDG", "LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG"}
    | {"LDGDEPBAR", "DEPBAR", "BAR", "MEMBAR", "FENCE", "WARPGROUP", "WARPSYNC", "BSSY", "BSYNC", "BREAK"}
    | {"NOP", "NANOSLEEP", "ERRBAR", "CGAERRBAR", "CCTL", "YIELD", "SYNCS", "ACQBULK", "PREEXIT"}
)
_PREDICATES_ALONE = frozenset(
    {"ISETP", "FSETP", "DSETP", "HSETP2", "FCHK", "PLOP3", "PSETP", "UISETP", "UPLOP3"}
)
_ATOMIC = frozenset({"ATOM", "ATOMG"})
_STORES = frozenset({"STG", "ST", "RED", "REDG"})
_GLOBAL = frozenset({"LDG", "LD", "LDGSTS"}) | _STORES | _ATOMIC


class Partly(NamedTuple):
    """A value that is known for some lanes."""

    value: Any
    known: Any


class UnknownCodeError(ValueError):
    """Machine code that can't be followed: a call, an indirect branch, or an end that isn't reached."""


@dataclass
class Counted:
    """What lanes did, all together.

    Attributes:
        executed: how many warps executed each instruction.
        read: bytes of whole sectors read from global memory, by warps' accesses; ``written`` likewise.
        stored: bytes that threads themselves wrote, by the number of the buffer.
        read_tensors: numbers of the buffers that were read.
        unknown: bytes of accesses whose addresses or masks are not known, as if all lanes made them. They are
            in none of the others.
        undecided: indices of branches that depend on data.
    """

    executed: list[int]
    read: int = 0
    written: int = 0
    stored: Counter[int] = field(default_factory=Counter)
    read_tensors: set[int] = field(default_factory=set)
    unknown: int = 0
    undecided: set[int] = field(default_factory=set)


#: Buffer number k lies at ``(k + 1) << REGION``: an address tells whose it is.
REGION = 40


class Machine:
    """Registers of many threads, and the code they go through.

    Args:
        code: of one kernel.
        constants: words of the constant bank, by their byte offset.
        special: special register -> value, an array of all lanes or a number for all.
        programs: how many of them, all with as many
        threads: whole warps.
        tickets: the result of each lane's first atomic addition to global memory, where launches give out
            tasks that way; ``None``: not known.
    """

    def __init__(
        self,
        code: Sequence[Instruction],
        constants: Mapping[int, int],
        special: Mapping[str, Value],
        programs: int,
        threads: int,
        tickets: Value = None,
    ) -> None:
        if threads % WARP:
            raise ValueError(f"{threads} threads are no whole number of warps")
        lanes = programs * threads
        self._code, self._constants, self._special = code, constants, special
        self._programs, self._lanes, self._warp_of = programs, lanes, np.arange(lanes) // WARP
        self._registers: dict[str, Value] = {}
        self._predicates: dict[str, Predicate] = {}
        self._tickets = tickets
        self._shared: dict[int, Value] = {}
        self._active: Any = None  # lanes at this place of the code; None: all of them
        self._where: Any = None  # and of those, the ones that an instruction's predicate lets work
        self._warps = lanes // WARP
        self.counted = Counted([0] * len(code))

    # ------------------------------------------------------------------------------------------ control flow

    def run(self) -> Counted:
        """Let all lanes run to their end.

        Raises:
            UnknownCodeError: they don't get there.
        """
        waiting: dict[int, Any] = {0: None}  # place -> lanes that go on there; the lowest place goes first
        steps = 0
        while waiting:
            first = min(waiting)
            self._activate(waiting.pop(first))
            place: int | None = first
            while place is not None:
                if place in waiting:  # others have been waiting here
                    self._activate(_union(self._active, waiting.pop(place)))
                steps += 1
                if steps > _MOST_STEPS or place >= len(self._code):
                    raise UnknownCodeError(f"no end after {steps} instructions")
                place = self._step(place, waiting)
        return self.counted

    def _step(self, place: int, waiting: dict[int, Any]) -> int | None:
        """Execute one instruction; where the lanes at work go on, ``None`` if that is elsewhere."""
        one = self._code[place]
        self.counted.executed[place] += self._warps
        if one.name in ("CALL", "RET", "BRX", "JMP", "JMX") or "CONV" in one.options:
            raise UnknownCodeError(f"{one.name} can't be followed")
        if one.name not in ("BRA", "EXIT"):
            self._execute(one)
            return place + 1
        stays, leaves = self._split(one, place)
        if leaves is not False and one.target is not None:
            waiting[one.target] = _union(leaves, waiting.get(one.target, False))
        if stays is False:
            return None
        if waiting and min(waiting) <= place:  # they come by here later
            waiting[place + 1] = _union(stays, waiting.get(place + 1, False))
            return None
        self._activate(stays)
        return place + 1

    def _activate(self, lanes: Any) -> None:
        self._active = lanes
        busy = self._lanes if lanes is None else WARP * lanes.reshape(-1, WARP).any(axis=1).sum()
        self._warps = int(busy) // WARP

    def _split(self, one: Instruction, place: int) -> tuple[Any, Any]:
        """Active lanes that go on behind a branch, and those that take it."""
        taken = self._guard(one)
        self._where = self._active
        for operand in one.operands:
            if is_predicate(operand):
                taken = integers.both(taken, self.predicate(operand))
        if "DIV" in one.options:  # for warps whose lanes have parted, which are lanes of their own here
            taken = False
        if taken is None:
            again = place in self.counted.undecided
            self.counted.undecided.add(place)
            taken = again and one.target is not None and one.target > place
        leaves = _both(self._active, taken)
        stays = _both(self._active, integers.negated(taken))
        return stays, leaves

    # --------------------------------------------------------------------------------------------- operands

    def _guard(self, one: Instruction) -> Predicate:
        self._where = self._active
        if one.guard is None:
            return True
        name, inverted = one.guard
        value = self.predicate(name)
        value = integers.negated(value) if inverted else value
        self._where = _both(self._active, value)
        return value

    def _seen(self, value: Any) -> Any:
        """What the lanes at work see of a register."""
        if not isinstance(value, Partly):
            return value
        if self._where is False:
            return value.value
        known = value.known.all() if self._where is None else value.known[self._where].all()
        return value.value if known else None

    def predicate(self, operand: str) -> Predicate:
        """Of ``P0``, ``!UP1``, ``PT``."""
        inverted, name = operand.startswith("!"), operand.lstrip("!")
        value = True if name.endswith("T") else self._seen(self._predicates.get(name))
        return integers.negated(value) if inverted else value

    def value(self, operand: str) -> Value:
        """Of a register, a constant or a number; ``-R5`` is taken from 2^32."""
        sign = operand[0] if operand[0] in "-~|" else ""
        name = operand.strip("-~|") if sign else operand
        value: Value
        if name in ("RZ", "URZ"):
            value = 0
        elif name.startswith("c["):
            value = self.constant(name)
        elif name.startswith("0x"):
            value = int(name, 16)
        else:
            value = self._seen(self._registers.get(name))
        if value is None or not sign:
            return value
        if sign == "~":
            return value ^ integers.WORD
        if sign == "|":
            return None
        return integers.word(-value) if name.startswith("0x") else (1 << 32) - value

    def constant(self, operand: str, offset: int = 0) -> Value:
        """A word of the constant bank, ``c[0x0][0x210]``, some bytes on."""
        bank, _, place = operand.removeprefix("c[").partition("][")
        try:
            return self._constants.get(int(place.rstrip("]"), 16) + offset) if int(bank, 16) == 0 else None
        except ValueError:  # by a register
            return None

    def pair(self, operand: str) -> Value:
        """64 bits, as a signed number."""
        name = register(operand)
        if operand.startswith(("-", "~")):
            return None
        if name is None:
            low = self.value(operand)
            return None if low is None else integers.signed(low)
        low, high = (self._seen(self._registers.get(following(name, offset))) for offset in (0, 1))
        return None if low is None or high is None else integers.wide(low, high)

    def special(self, name: str) -> Value:
        """A special register, ``SR_TID.X``."""
        return self._special.get(name)

    # ---------------------------------------------------------------------------------------------- results

    def set(self, operand: str, value: Value) -> None:
        """Write a register, of the lanes at work."""
        name = register(operand) if not is_predicate(operand) else None
        if name is not None:
            self._registers[name] = self._merged(self._registers.get(name), value)

    def set_predicate(self, operand: str, value: Predicate) -> None:
        """Write a predicate, of the lanes at work."""
        name = operand.lstrip("!")
        if not name.endswith("T"):
            self._predicates[name] = self._merged(self._predicates.get(name), value)

    def _merged(self, old: Any, new: Any) -> Any:
        """``new`` for the lanes at work, ``old`` for the others."""
        if self._where is None or (old is None and new is None):
            return new
        if self._where is False:
            return old
        if old is not None and new is not None and not isinstance(old, Partly):
            return np.where(self._where, new, old)
        if old is None:
            return Partly(np.broadcast_to(new, (self._lanes,)), self._where)
        value, known = old if isinstance(old, Partly) else (old, np.ones(self._lanes, dtype=bool))
        if new is None:
            known = known & ~self._where
            return Partly(np.broadcast_to(value, (self._lanes,)), known) if known.any() else None
        value, known = np.where(self._where, new, value), known | self._where
        return value if known.all() else Partly(value, known)

    # --------------------------------------------------------------------------------------------- execution

    def _execute(self, one: Instruction) -> None:
        guard = self._guard(one)
        if guard is None:  # who does it is not known: afterwards, nor is what it writes
            self._execute_perhaps(one)
            return
        if self._where is False:
            return
        if one.name in _GLOBAL:
            self._access(one, known=True)
        if one.name == "STS":
            self._store_shared(one)
        if one.name in _NO_RESULT:
            return
        name = one.name[1:] if one.name[0] == "U" and one.name[1:] in KNOWN else one.name
        known = KNOWN.get(name)
        if known is None or not known(self, one):
            self._forget(one)

    def _execute_perhaps(self, one: Instruction) -> None:
        if one.name in _GLOBAL:
            self._access(one, known=False)
        if one.name == "STS":
            self._shared.clear()
        if one.name not in _NO_RESULT:
            self._forget(one)

    def _forget(self, one: Instruction) -> None:
        """What this instruction writes is not known from here on."""
        in_front = one.name in _PREDICATES_ALONE
        seen = False
        for operand in one.operands[: 2 if in_front else None]:
            if is_predicate(operand):
                self.set_predicate(operand, None)
                continue
            if in_front or seen or operand.startswith(("[", "desc")):
                break
            seen = True
            name = register(operand)
            if name is not None:
                for offset in range(_width(one)):
                    self.set(following(name, offset), None)

    # ------------------------------------------------------------------------------------------------ memory

    def _access(self, one: Instruction, known: bool) -> None:
        """Count an access to global memory. ``known``: whether it is known who makes it."""
        if one.name == "LDGSTS" and is_predicate(one.operands[-1]):  # false: zeros, and nothing is read
            filled = self.predicate(one.operands[-1])
            known = known and filled is not None
            self._where = _both(self._where, filled)
        if self._where is False:
            return
        place = [operand for operand in one.operands if operand.startswith(("[", "desc"))][-1]
        address = self._address(place)
        if address is None or not known:
            self.counted.unknown += self._warps * WARP * one.nbytes
            return
        address, warp = np.broadcast_to(address, (self._lanes,)), self._warp_of
        if self._where is not None:
            address, warp = address[self._where], warp[self._where]
            if not len(address):
                return
        moved = len(np.unique(address // SECTOR * (self._lanes // WARP) + warp)) * SECTOR
        tensors, counts = np.unique((address >> REGION) - 1, return_counts=True)
        if one.name not in _STORES:
            self.counted.read += moved
            self.counted.read_tensors.update(int(tensor) for tensor in tensors)
        if one.name in _STORES or one.name in _ATOMIC:
            self.counted.written += moved
            for tensor, count in zip(tensors, counts, strict=True):
                self.counted.stored[int(tensor)] += int(count) * one.nbytes

    def _address(self, operand: str) -> Value:
        """``desc[UR16][R2.64+0x10]``, ``[R2.64+UR4+-0x10]``, ``[R5+UR4]``."""
        total: Value = 0
        for part in operand.rsplit("[", 1)[1].rstrip("]").split("+"):
            if part.startswith("-0x"):
                number: Value = -int(part[1:], 16)
            elif part.endswith(".64"):
                number = self.pair(part.removesuffix(".64"))
            else:
                number = self.value(part.partition(".")[0])
            if number is None:
                return None
            total = total + number
        return total

    # Of shared memory what one thread of each program leaves for the others: a ticket.

    def _store_shared(self, one: Instruction) -> None:
        address, value = self._address(one.operands[0]), self.value(one.operands[-1])
        if address is None or value is None or one.nbytes != 4 or self._where is None:
            self._shared.clear()
            return
        writers = self._where.reshape(self._programs, -1)
        if not (writers.sum(axis=1) == 1).all():
            self._shared.clear()
            return
        thread = writers.argmax(axis=1) + np.arange(self._programs) * writers.shape[1]
        places = np.broadcast_to(address, (self._lanes,))[thread]
        if (places != places[0]).any():
            self._shared.clear()
            return
        self._shared[int(places[0])] = np.broadcast_to(value, (self._lanes,))[thread]

    def load_shared(self, one: Instruction) -> bool:
        """``LDS`` of what :meth:`_store_shared` kept."""
        address = self._address(one.operands[-1])
        if address is None or one.nbytes != 4 or not self._shared:
            return False
        if not isinstance(address, int):
            if (address != address[0]).any():
                return False
            address = int(address[0])
        if address not in self._shared:
            return False
        self.set(one.operands[0], np.repeat(self._shared[address], self._lanes // self._programs))
        return True

    def vote(self, condition: Predicate) -> Value:
        """Of each lane's warp, a bit for every lane at work for which ``condition`` holds."""
        lanes = np.ones(self._lanes, dtype=bool) if self._where is None else self._where
        warps = (lanes & condition).reshape(-1, WARP)
        bits = (warps * (np.int64(1) << np.arange(WARP, dtype=np.int64))).sum(axis=1)
        return np.repeat(bits, WARP)

    def shuffle(self, one: Instruction) -> bool:
        """``SHFL``, within whole warps: what each lane reads of another."""
        _, target, source, by, limits = one.operands
        value, lane, limit = self._registers.get(source), self.value(by), self.value(limits)
        if value is None or lane is None or one.options not in (("IDX",), ("BFLY",)) or limit != WARP - 1:
            return False
        value, known = value if isinstance(value, Partly) else (value, np.ones(self._lanes, dtype=bool))
        own = np.arange(self._lanes)
        from_lane = own % WARP ^ lane if one.options == ("BFLY",) else lane % WARP
        read = own // WARP * WARP + from_lane
        if not (known[read] if self._where is None else known[read][self._where]).all():
            return False
        self.set(target, np.broadcast_to(value, (self._lanes,))[read])
        return True

    def take_ticket(self, one: Instruction) -> bool:
        """The first atomic addition gives each program its place in the line."""
        if self._tickets is None or "ADD" not in one.options:
            return False
        target = next(operand for operand in one.operands if not is_predicate(operand))
        self.set(target, self._tickets)
        self._tickets = None
        return True


def _width(one: Instruction) -> int:
    """How many registers an instruction may write, one after another."""
    if one.name.endswith("GMMA"):
        sizes = next((option for option in one.options if option.count("x") == 2), "0x0x0")
        return int(sizes.split("x")[1]) // 2
    if one.name in ("HMMA", "IMMA", "QMMA", "LDSM", "MOVM"):
        return 4
    if one.name in ("DADD", "DMUL", "DFMA", "CS2R") or {"F64", "WIDE"} & set(one.options):
        return 2
    return max(1, one.nbytes // 4)


# Sets of lanes: an array of bool, ``None`` for all of them, ``False`` for none.


def _both(lanes: Any, condition: Predicate) -> Any:
    """Those for which ``condition`` holds, or may hold."""
    if condition is None:
        return lanes
    if isinstance(condition, (bool, np.bool_)):
        return lanes if condition else False
    both = condition if lanes is None else lanes & condition
    return both if both.any() else False


def _union(lanes: Any, others: Any) -> Any:
    if lanes is None or others is None:
        return None
    if lanes is False or others is False:
        return others if lanes is False else lanes
    both = lanes | others
    return None if both.all() else both
