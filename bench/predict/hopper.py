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
#: Bytes a microsecond from L2 to one multiprocessor. Not published for an H100; a port takes 64 bytes a clock
#: (112 KB), and an A100's L2 5120 bytes a clock (NVIDIA's paper on it), which would be 68 KB for each of 132.
#: Inferred, with a value above and one below; the first hours on a GPU are to decide (bench/first).
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

#: (warps that a scheduler has, instructions it issues a clock): one warp waits for its own results, 4 to 6
#: clocks of arithmetic and 20 to 30 of shared memory. Assumed; the largest uncertainty of instruction-bound
#: kernels.
ISSUE = ((4, 1.0), (3, 1.0), (2, 0.8), (0, 0.45))
#: What of the tensor cores' peak a good main loop reaches.
TENSOR_SHARE = 0.85
#: Microseconds from one kernel of a CUDA graph to the next, both small: 1.3 between them (HazyResearch,
#: "Look Ma, No Bubbles", 2025, on an H100) and as much until programs have filled the GPU and begun to load.
START = 2.6
#: Among kernels that fill the GPU several times: filling up is part of their own time.
START_LARGE = 1.5
FEW_IMAGES = 8
#: With programmatic dependent launch: what is in front of the wait has run by then.
START_DEPENDENT = 1.4
#: Between phases of one launch: a release, a trip to L2 and back, an acquire.
PHASE = 1.2
#: FLOP a microsecond of a good GEMM in 16 bit, and outputs of one of its tiles, 128 x 64 where they are few.
GEMM = 790e6
GEMM_TILE = 128 * 64
