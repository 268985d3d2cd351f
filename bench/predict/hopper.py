"""An H100 SXM in numbers: what the model divides by.

NVIDIA, "H100 Tensor Core GPU Architecture" (2022) for processors, tensor cores and L2; "CUDA C++ Programming
Guide", technical specifications of compute capability 9.0, for what fits on a multiprocessor; where
a number is not published, it says what it is taken from.
"""

from __future__ import annotations

PROCESSORS = 132
#: Clocks in a microsecond: 1755 MHz, what an H100 SXM holds under tensor-core load (its boost is 1980).
CLOCK = 1755.0
#: Instructions that a multiprocessor issues in a clock, one for each of its schedulers.
SCHEDULERS = 4
#: Multiply-adds of 16-bit operands a clock and multiprocessor on tensor cores; of TF32, half as many.
MULTIPLY_ADDS = 2048
TF32 = 0.5
#: Bytes a second from memory, HBM3: 3.35 TB/s, in bytes a microsecond.
DRAM = 3.35e6
#: Bytes that L2 holds.
L2 = 50 * 1024**2
#: Bytes a microsecond from L2 to one multiprocessor. Inferred, not published for an H100: 64 bytes a clock and
#: multiprocessor are 112 KB; microbenchmarks of the whole L2 (Chips and Cheese, "Nvidia's H100", 2023) give
#: 5.5 to 7 TB/s, that is 42 to 53 KB, good GEMMs need 60 to 80. Both ends of that are computed.
L2_RATES = (80e3, 60e3)

REGISTERS = 65536
#: A thread's registers are given out in such steps.
REGISTER_UNIT = 8
SHARED = 228 * 1024
#: What the driver keeps of each program's shared memory.
SHARED_OWN = 1024
THREADS = 2048
PROGRAMS = 32

#: Byte offsets in constant bank 0 of a program's three sizes and the grid's three (read off compiled code).
DIMENSIONS = (0x00, 0x04, 0x08, 0x0C, 0x10, 0x14)
