"""Every operation under every transform of torch.func, and with dual numbers: as the reference, or refused.

A derivative that is silently zero is the one thing that must not happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from ocvtp_kernels import BackendUnavailableError, _library
from ocvtp_kernels.coverage import coverage_error, refine
from ocvtp_kernels.diversity import farthest_points, largest_volume
from ocvtp_kernels.merge import merge_tokens, nearest_kept
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.reconstruction import area_weighted_mse
from ocvtp_kernels.selection import gather_tokens, select_from_keys, select_rows, select_tokens
from ocvtp_kernels.selection import triton as selection_kernels
from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    SlotAttentionWeights,
    SlotStart,
    slot_assignment,
    slot_attention,
    top_tokens,
)
from tests.kernels.test_selection import keys_of
from tests.kernels.test_slot_attention_triton import TINY, problem
from tests.kernels.triton_device import DEVICE, ON_GPU, randn

Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(selection_kernels, "processors", lambda _: 1)


class Operation(NamedTuple):
    """A public function of the tensors that transforms take; ``backend`` comes first."""

    function: Callable[..., torch.Tensor]
    inputs: Tensors
    #: Why Triton has no derivative, and no vmap: what the error says.
    no_derivative: str | None = None
    no_vmap: str | None = None


# Small: a Jacobian calls an operation once with as many images as there are numbers in its inputs.
MAP, FILL, X = randn(2, 3, 5, seed=0).softmax(dim=1), randn(2, 5, seed=1), randn(2, 5, 2, seed=2)
INDICES = torch.tensor([[0, 3, 3], [1, 2, 4]], device=DEVICE)
Q, K = randn(2, 1, 3, 2, seed=3), randn(2, 1, 4, 2, seed=4)
LSE = torch.logsumexp(Q @ K.mT * 2**-0.5, dim=-1)
BOUNDS = torch.tensor([0, 2, 4], device=DEVICE)
KEPT = torch.tensor([[0, 4], [2, 3]], device=DEVICE)
SLOTS = problem(2, 3, 9, TINY)
FEATURES, START, FOLDED = SLOTS.arguments(torch.float32)
TRAINED = SlotAttentionWeights(*(tensor.float() for tensor in SLOTS.weights))


def slot_map(backend: str, features: torch.Tensor, slots: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    start, folded = START._replace(slots=slots), FOLDED._replace(encoder_fc1_bias=bias)
    return slot_assignment(features, SlotStart(*start), FoldedWeights(*folded), backend=backend)


def largest(backend: str, features: torch.Tensor) -> torch.Tensor:
    return top_tokens(features, START, FOLDED, backend=backend).largest


def trained(backend: str, features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weights = TRAINED._replace(query_weight=weight)
    slots, attention = slot_attention(features, START.slots, weights, num_iters=2, backend=backend)
    return torch.cat([slots.flatten(1), attention.flatten(1)], dim=1)


NO_GRADIENT = "it has no gradient: use torch.no_grad"
NO_RULES = "it has no rules for torch.func and dual numbers"
OPERATIONS = {
    "select_tokens": Operation(lambda b, a, f: select_tokens(a, 4, f, backend=b)[0], (MAP, FILL)),
    "select_tokens alone": Operation(lambda b, a: select_tokens(a, 4, backend=b)[1], (MAP,)),
    "select_rows of a map": Operation(lambda b, a, x: select_rows(a, 4, None, x, backend=b)[2], (MAP, X)),
    "select_rows by scores": Operation(lambda b, x, f: select_rows(MAP, 4, f, x, backend=b)[2], (X, FILL)),
    "select_from_keys": Operation(
        lambda b, f: select_from_keys(keys_of(MAP, 2), 4, f, backend=b)[0], (FILL,)
    ),
    "rows_from_keys": Operation(
        lambda b, x, f: select_from_keys(keys_of(MAP, 2), 4, f, x, backend=b)[2],  # type: ignore[arg-type, return-value]
        (X, FILL),
    ),
    "gather_tokens": Operation(lambda b, x: gather_tokens(x, INDICES, backend=b), (X,)),
    "received_attention": Operation(lambda b, q, k: received_attention(q, k, backend=b), (Q, K)),
    "received_attention of one": Operation(lambda b, q: received_attention(q, q, backend=b), (Q,)),
    "received_attention with lse": Operation(
        lambda b, q, k, lse: received_attention(q, k, lse=lse, backend=b), (Q, K, LSE)
    ),
    "received_attention packed": Operation(
        lambda b, q, k: received_attention(q, k, cu_seqlens=BOUNDS, backend=b), (K[:1], K[1:])
    ),
    "area_weighted_mse": Operation(
        lambda b, y, x, a: area_weighted_mse(y, x, a, reduction="none", backend=b),
        (X, randn(2, 5, 2, seed=5), MAP),
    ),
    "area_weighted_mse of one": Operation(
        lambda b, x: area_weighted_mse(x, x.square(), MAP, empty_slots="official", backend=b), (X,)
    ),
    "coverage_error": Operation(lambda b, x: coverage_error(x, KEPT, backend=b), (X,)),
    "refine": Operation(lambda b, x: refine(x, KEPT, 1, backend=b), (X,)),
    "nearest_kept": Operation(lambda b, x: nearest_kept(x, KEPT, KEPT < 4, backend=b)[1], (X,)),
    "merge_tokens": Operation(lambda b, x, c: merge_tokens(x, KEPT, c, backend=b).rows, (X, X.square())),
    "farthest_points": Operation(lambda b, x: farthest_points(x, 4, backend=b), (X,)),
    "largest_volume": Operation(lambda b, x: largest_volume(x, 3, backend=b), (X,)),
    "slot_assignment": Operation(slot_map, (FEATURES, START.slots, FOLDED.encoder_fc1_bias), NO_GRADIENT),
    "top_tokens": Operation(largest, (FEATURES,), NO_GRADIENT),
    "slot_attention": Operation(trained, (FEATURES, TRAINED.query_weight), NO_RULES, NO_RULES),
}

Function = Callable[..., torch.Tensor]


def numbers(shape: torch.Size, start: int) -> torch.Tensor:
    """Between -1 and 1, without a generator, which ``vmap`` does not allow."""
    return (torch.arange(shape.numel(), device=DEVICE) * 7.0 + start).sin().reshape(shape)


def tangents(inputs: Tensors) -> Tensors:
    return tuple(numbers(tensor.shape, i + 11) for i, tensor in enumerate(inputs))


def several(inputs: Tensors, of: int = 10**9) -> Tensors:
    """Three examples of the first so many inputs."""
    return tuple(
        tensor + 0.1 * numbers(torch.Size((3, *tensor.shape)), i) if i < of else tensor
        for i, tensor in enumerate(inputs)
    )


def scalar(f: Function) -> Function:
    def total(*inputs: torch.Tensor) -> torch.Tensor:
        out = f(*inputs)
        return (out * numbers(out.shape, 7)).sum()

    return total


def everything(inputs: Tensors) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def dual(f: Function, inputs: Tensors) -> Any:
    with forward_ad.dual_level():
        out = f(*map(forward_ad.make_dual, inputs, tangents(inputs)))
        primal, tangent = forward_ad.unpack_dual(out)
        return primal, torch.zeros(()) if tangent is None else tangent


def dual_and_backward(f: Function, inputs: Tensors) -> Any:
    """A directional derivative of the gradient, without torch.func."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with forward_ad.dual_level():
        total = scalar(f)(*map(forward_ad.make_dual, leaves, tangents(inputs)))
        if not total.requires_grad:
            return total.detach()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        tangent = [None if g is None else forward_ad.unpack_dual(g).tangent for g in found]
        return [torch.zeros(()) if t is None or not t.any() else t.detach() for t in tangent]


def gradient_outside_vmap(f: Function, inputs: Tensors) -> Any:
    leaves = [tensor.detach().requires_grad_() for tensor in several(inputs)]
    out = vmap(f)(*leaves)
    if not out.requires_grad:
        return out
    (out * numbers(out.shape, 8)).sum().backward()
    return [torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves]


def through_a_module(f: Function, inputs: Tensors) -> Any:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(()))

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return scalar(f)(inputs[0] * (1 + self.shift), *inputs[1:])

    shift = torch.tensor(0.1, device=DEVICE)
    return grad(lambda shift: functional_call(Module(), {"shift": shift}, inputs))(shift)


def linearized(f: Function, inputs: Tensors) -> Any:
    out, tangent = linearize(f, *inputs)
    return out, tangent(*tangents(inputs))


DERIVATIVES: dict[str, Callable[[Function, Tensors], Any]] = {
    "jvp": lambda f, xs: jvp(f, xs, tangents(xs)),
    "dual numbers": dual,
    "dual numbers and backward": dual_and_backward,
    "jacfwd": lambda f, xs: jacfwd(f, everything(xs))(*xs),
    "jacrev": lambda f, xs: jacrev(f, everything(xs))(*xs),
    "vjp": lambda f, xs: vjp(scalar(f), *xs)[1](torch.ones((), device=DEVICE)),
    "grad": lambda f, xs: grad(scalar(f), everything(xs))(*xs),
    "grad of grad": lambda f, xs: grad(
        lambda *xs: sum(g.square().sum() for g in grad(scalar(f), everything(xs))(*xs)), everything(xs)
    )(*xs),
    "hessian": lambda f, xs: hessian(scalar(f), everything(xs))(*xs),
    "jvp of jvp": lambda f, xs: jvp(
        lambda *ys: jvp(f, ys, tuple(y * t for y, t in zip(ys, tangents(xs), strict=True)))[1],
        xs,
        tangents(xs),
    )[1],
    "jvp of vmap": lambda f, xs: jvp(vmap(f), several(xs), tangents(several(xs))),
    "reverse over forward": lambda f, xs: jacrev(jacfwd(scalar(f)))(*xs),
    "vmap of grad": lambda f, xs: vmap(grad(scalar(f), everything(xs)))(*several(xs)),
    "vmap of grad, one of them": lambda f, xs: vmap(
        grad(scalar(f), everything(xs)), in_dims=(0, *[None] * (len(xs) - 1))
    )(*several(xs, 1)),
    "vmap of jvp": lambda f, xs: vmap(lambda *ys: jvp(f, ys, tangents(xs))[1])(*several(xs)),
    "grad of vmap": lambda f, xs: grad(lambda *ys: scalar(vmap(f))(*ys), everything(xs))(*several(xs)),
    "gradient outside vmap": gradient_outside_vmap,
    "functional_call": through_a_module,
    "linearize": linearized,
}
VMAPS: dict[str, Callable[[Function, Tensors], Any]] = {
    "vmap": lambda f, xs: vmap(f)(*several(xs)),
    "vmap, last dimension": lambda f, xs: vmap(f, in_dims=-1, out_dims=-1)(
        *(tensor.movedim(0, -1) for tensor in several(xs))
    ),
    "vmap of the first": lambda f, xs: vmap(f, in_dims=(0, *[None] * (len(xs) - 1)))(*several(xs, 1)),
    "vmap of vmap": lambda f, xs: vmap(vmap(f))(*(torch.stack([x, 2 * x]) for x in several(xs))),
}
DISCRETE = (
    "select_tokens",
    "select_tokens alone",
    "select_from_keys",
    "refine",
    "nearest_kept",
    "farthest_points",
    "largest_volume",
)
TRANSFORMS = {**DERIVATIVES, **VMAPS}

# What `make test` leaves to `make test-thorough`: it takes other routes to rules that run there as well.
#: With the function of another operation: here only what depends on the inputs.
SIBLINGS = ("select_rows of a map", "rows_from_keys", "received_attention of one", "area_weighted_mse of one")
OF_SIBLINGS = (
    *("jvp", "dual numbers", "dual numbers and backward", "grad", "jacrev", "hessian"),
    *("vmap", "vmap of the first", "grad of vmap", "gradient outside vmap"),
)
#: One for each way to write a rule for vmap: an operator's, a function's of itself or not, one by one.
NESTED = (
    *("select_tokens", "gather_tokens", "select_rows by scores", "area_weighted_mse"),
    *("merge_tokens", "received_attention", "received_attention packed", "slot_attention"),
)
#: `jvp`, of which PyTorch keeps the linear part.
LINEARIZED = ("gather_tokens", "received_attention", "area_weighted_mse", "slot_attention")


def is_thorough(name: str, transform: str) -> bool:
    if transform in ("vmap of vmap", "vmap, last dimension"):
        return name not in NESTED
    if transform == "linearize":
        return name not in LINEARIZED
    if transform == "jacfwd" and name == "merge_tokens":  # forty tangents at once; "vmap of jvp" has three
        return True
    return name in SIBLINGS and transform not in OF_SIBLINGS


def cases() -> Iterator[Any]:
    """A discrete operation has no derivative; of one input, the first is all there are."""
    of_the_first = ("vmap of the first", "vmap of grad, one of them")
    for name, operation in OPERATIONS.items():
        for transform in TRANSFORMS:
            discrete = name in DISCRETE and transform in DERIVATIVES
            again = len(operation.inputs) == 1 and transform in of_the_first
            if not (discrete or again):
                marks = [pytest.mark.thorough] if is_thorough(name, transform) else []
                yield pytest.param(name, transform, marks=marks, id=f"{name}-{transform}")


def at(name: str, backend: str) -> Function:
    return lambda *inputs: OPERATIONS[name].function(backend, *inputs)


def assert_same(got: Any, want: Any) -> None:
    got, want = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "transform"), list(cases()))
def test_as_the_reference_or_refused(name: str, transform: str) -> None:
    operation, run = OPERATIONS[name], TRANSFORMS[transform]
    reason = operation.no_derivative if transform in DERIVATIVES else operation.no_vmap
    if reason is not None:
        with pytest.raises(BackendUnavailableError, match=f'{reason}.*backend="torch"'):
            run(at(name, "triton"), operation.inputs)
    else:
        assert_same(run(at(name, "triton"), operation.inputs), run(at(name, "torch"), operation.inputs))


def test_every_operator_is_reached_here() -> None:
    """A new one needs a row above."""
    reached: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reached.add(func.name())
            return func(*args, **(kwargs or {}))

    for operation in OPERATIONS.values():
        leaves = [tensor.detach().requires_grad_() for tensor in operation.inputs]
        with Names(), torch.set_grad_enabled(operation.no_derivative != NO_GRADIENT):
            out = operation.function("triton", *leaves)
            if out.requires_grad:
                out.sum().backward()
    assert set(_library.launchers()) <= reached


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", **options)


COMPILED: dict[str, Callable[[Function, Tensors], Any]] = {
    "compiled grad": lambda f, xs: compiled(grad(scalar(f), everything(xs)))(*xs),
    "compiled jvp": lambda f, xs: compiled(lambda *ys: jvp(f, ys, tangents(xs)))(*xs),
    "compiled vmap": lambda f, xs: compiled(vmap(f))(*several(xs)),
    "grad of compiled": lambda f, xs: grad(compiled(scalar(f)), everything(xs))(*xs),
    "jvp of compiled": lambda f, xs: jvp(compiled(f), xs, tangents(xs)),
    "vmap of compiled": lambda f, xs: vmap(compiled(f))(*several(xs)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize(
    "name", ["gather_tokens", pytest.param("area_weighted_mse", marks=pytest.mark.thorough)]
)
def test_compiled(name: str, transform: str) -> None:
    run, inputs = COMPILED[transform], OPERATIONS[name].inputs
    assert_same(run(at(name, "triton"), inputs), run(at(name, "torch"), inputs))


@pytest.mark.parametrize("name", ["gather_tokens", "slot_attention"])
def test_a_whole_graph_with_a_transform_in_it_says_what_to_do(name: str) -> None:
    """Dynamo can't trace a rule: it would trace the kernel, which has no derivative."""
    inputs = OPERATIONS[name].inputs
    run = compiled(grad(scalar(at(name, "triton")), everything(inputs)), fullgraph=True)
    with pytest.raises(Exception, match=r'transform of torch\.func.*backend="torch"'):
        run(*inputs)


def test_a_compiled_function_notices_dual_numbers() -> None:
    """It has no graph for them, and takes not the one without."""
    run = compiled(at("gather_tokens", "triton"))
    run(X)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(BackendUnavailableError, match=r'torch\.func.*backend="torch"'):
            run(x)
    run(X)


def test_what_no_transform_holds_runs_as_ever() -> None:
    found: list[torch.Tensor] = []

    def total(x: torch.Tensor) -> torch.Tensor:
        found.append(top_tokens(FEATURES, START, FOLDED, backend="triton").largest)
        return gather_tokens(x, INDICES, backend="triton").sum()

    grad(total)(X)
    jvp(total, (X,), (X,))
    want = top_tokens(FEATURES, START, FOLDED, backend="triton").largest
    assert len(found) == 2
    assert all(torch.equal(largest, want) for largest in found)


def test_vmap_of_more_images_than_a_launch_takes() -> None:
    x = torch.zeros(4096, 16, 1, 1, device=DEVICE)
    indices = torch.zeros(16, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(BackendUnavailableError, match=r'4096 x 16 images.*chunk_size=, or backend="torch"'):
        vmap(lambda x: gather_tokens(x, indices, backend="triton"))(x)
