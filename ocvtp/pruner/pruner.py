"""The pruner: encoder features in, kept tokens out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from typing_extensions import Self

from ocvtp.checks import check_fill_scores, check_finite
from ocvtp.pruner import checkpoint
from ocvtp.pruner.assignment import Assignment, Plan
from ocvtp.pruner.budget import check_budgets, share_of, smallest_budget
from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.decoder import ReconstructionDecoder
from ocvtp.pruner.folding import FoldedState, fingerprint
from ocvtp.pruner.hub import PrunerFiles
from ocvtp.pruner.noise import seeded_normal
from ocvtp.pruner.refinement import Refinement
from ocvtp.pruner.topup import Fill, TopUp
from ocvtp.selection import Selection
from ocvtp.stored.tensors import save_sealed
from ocvtp_kernels._backend import resolve_backend
from ocvtp_kernels._checks import as_float, as_int, require_count, require_floating, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._transforms import is_traced, transformed, transforms_active
from ocvtp_kernels.coverage import check_rounds
from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    SlotAttentionWeights,
    SlotStart,
    fold,
    slot_attention,
    start_from_slots,
    why_no_kernel,
)

__all__ = ["OCPruner", "PrunerConfig", "Reconstruction"]

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_OFFICIAL_WEIGHTS = "weights.pth"
_MAX_SEED = 2**63 - 1
#: What ``precision="auto"`` is in Triton.
DEFAULT_PRECISION = "fp16"


@dataclass
class Reconstruction:
    """What training compares with the features.

    Attributes:
        slots: ``[B, K, D]`` after the last iteration.
        slot_attention: ``[B, K, N]``, softmax over slots of the last iteration.
        reconstruction: ``[B, N, C]``.
    """

    slots: torch.Tensor
    slot_attention: torch.Tensor
    reconstruction: torch.Tensor


class _TokenEncoder(nn.Module):
    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.in_dim)
        self.fc1 = nn.Linear(config.in_dim, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, config.slot_dim)


class _SlotAttention(nn.Module):
    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        width = config.slot_dim
        self.input_norm = nn.LayerNorm(width)
        self.slot_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gru = nn.GRUCell(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_fc1 = nn.Linear(width, config.ffn_dim)
        self.mlp_fc2 = nn.Linear(config.ffn_dim, width)


class OCPruner(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ocvtp",
    license="mit",
    paper_url="https://arxiv.org/abs/2511.20439",
    tags=["token-pruning", "vision-language-model", "slot-attention"],
):
    """Object-centric vision-token pruner (OC-VTP, arXiv 2511.20439).

    Reads the tokens of one encoder layer, groups them into slots and keeps every slot's most
    representative token, filled up to the budget. 7.6 M parameters at the default size.

    Args:
        config: sizes; the default is the official pruner for CLIP-L/14-336. Weights are random until
            loaded: see :meth:`from_official` and :meth:`from_pretrained`.
    """

    def __init__(self, config: PrunerConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else PrunerConfig()
        self._hub_mixin_config = self.config  # what save_pretrained writes to config.json
        self.encoder = _TokenEncoder(self.config)
        self.slot_mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, self.config.slot_dim)))
        self.slot_log_std = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, self.config.slot_dim)))
        self.slot_attention = _SlotAttention(self.config)
        self.decoder = ReconstructionDecoder(self.config) if self.config.decoder_layers else None
        self._folded_state: FoldedState | None = None

    # ------------------------------------------------------------------------------------ inference

    @torch.no_grad()
    def forward(
        self,
        features: torch.Tensor,
        keep: float | Literal["auto"] = 64,
        fill_scores: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        num_slots: int | None = None,
        backend: str = "auto",
        precision: str = "auto",
        return_attention: bool = False,
        *,
        batch_invariant: bool = True,
        refine: int = 0,
        coverage: bool = False,
        fill: Fill = "attention",
        max_error: float | None = None,
        budgets: Sequence[int] | None = None,
    ) -> Selection:
        """Choose which tokens of each image to keep. Computes in at least float32, autocast or not.

        Same features, seed and machine: same bits, whatever the batch around them. Weights are folded on the
        first call and kept (not in training mode); see :meth:`refold` for what goes unnoticed.

        Args:
            features: ``[B, N, in_dim]`` floating point, CLS dropped: the output of encoder layer
                ``config.layer``.
            keep: tokens to keep, ``1 <= keep <= N``; or a share of them, a float ``0 < keep <= 1.0``; or
                ``"auto"``: for each image the smallest of ``budgets`` whose coverage error is at most
                ``max_error``. Every budget costs a selection.
            fill_scores: ``[B, N]`` attention each token receives in the layer the language model reads
                (:func:`ocvtp_kernels.received_attention.received_attention`); ranks the tokens that top
                up the budget when slots agree on one. ``None``: a token's largest slot attention.
            noise: ``[B or 1, num_slots, slot_dim]`` standard normal; ``None`` draws it from ``seed``, the
                same for every image.
            seed: of the noise, ``0 <= seed < 2**63``.
            num_slots: slots that compete for the tokens; default ``keep``. One slot alone owns everything
                alike and picks token 0: for ``keep=1`` let several compete.
            backend: ``"auto"``, ``"torch"`` or ``"triton"``.
            precision: of the matrix products, which are accumulated in float32: ``"auto"``, ``"fp32"``,
                ``"tf32"`` or ``"fp16"``; the last two are Triton's. ``"auto"`` is :data:`DEFAULT_PRECISION`
                in Triton, and in PyTorch float32 as ``torch.set_float32_matmul_precision`` has it.
            return_attention: also return the slot attention map.
            batch_invariant: in PyTorch, compute image by image, so that matrix shapes, and with them
                rounding, do not depend on the batch. ``False`` computes the batch at once: fewer launches,
                and a graph that does not grow with ``B`` under ``torch.compile``. Triton's bits never do.
            refine: rounds that move kept tokens to where they cover more of the features, 0 as published; see
                :func:`ocvtp_kernels.coverage.refine`. An image's coverage error never rises.
            coverage: also return the coverage error.
            fill: what tops up the budget: ``"attention"``, the tokens of the largest ``fill_scores``, as
                published; or ``"farthest_point"``: slots that own no token name none, and the tokens least
                like those kept by ``features`` follow (:mod:`ocvtp.pruner.topup`). ``fill_scores`` are not
                read then.
            max_error: for ``keep="auto"``.
            budgets: for ``keep="auto"``, ascending.

        Returns:
            A :class:`~ocvtp.selection.Selection`. With ``keep="auto"`` it has ``budgets[-1]`` columns, a
            ``mask`` that tells which are kept, and ``met``, false where even the largest budget misses
            ``max_error``.

        Raises:
            TypeError, ValueError: a wrong type, width, shape or budget, or NaN or Inf in an input. On a
                GPU, and in compiled code, NaN and Inf are caught by an asynchronous assertion instead,
                which costs no synchronisation.
            BackendUnavailableError: an explicit backend that can't run.
        """
        if (own := check_budgets(keep, max_error, budgets)) is not None:
            error, counts = own
            if return_attention:
                raise ValueError('keep="auto" makes a slot attention map for every budget: ask without it')
            self._check_inputs(features, counts[-1], fill_scores, None, num_slots)

            def select(budget: int) -> Selection:
                return self.forward(
                    features,
                    budget,
                    fill_scores,
                    noise,
                    seed,
                    num_slots,
                    backend,
                    precision,
                    batch_invariant=batch_invariant,
                    refine=refine,
                    coverage=True,
                    fill=fill,
                )

            return smallest_budget(select, error, counts)
        assert not isinstance(keep, str)
        seed = check_options(seed, precision)
        keep = self._count(keep, features)
        num_slots = self._check_inputs(features, keep, fill_scores, noise, num_slots)
        plan = self._plan(
            features,
            keep,
            noise,
            seed,
            num_slots,
            backend,
            precision,
            return_attention,
            batch_invariant,
            refine,
            coverage,
            fill,
        )
        return plan.run(features).finish(fill_scores)

    @torch.no_grad()
    def assign(
        self,
        features: torch.Tensor,
        keep: float = 64,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        num_slots: int | None = None,
        backend: str = "auto",
        precision: str = "auto",
        return_attention: bool = False,
        *,
        batch_invariant: bool = True,
        refine: int = 0,
        coverage: bool = False,
        fill: Fill = "attention",
    ) -> Assignment:
        """The first half of :meth:`forward`, which needs no fill scores: they may still be on their way.

        Arguments and errors are those of :meth:`forward`; ``pruner.assign(x, keep).select(fill_scores)`` is
        ``pruner(x, keep, fill_scores)``.
        """
        return self.prepare(
            features,
            keep,
            noise,
            seed,
            num_slots,
            backend,
            precision,
            return_attention,
            batch_invariant=batch_invariant,
            refine=refine,
            coverage=coverage,
            fill=fill,
        ).run(features)

    @torch.no_grad()
    def prepare(
        self,
        features: torch.Tensor,
        keep: float = 64,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        num_slots: int | None = None,
        backend: str = "auto",
        precision: str = "auto",
        return_attention: bool = False,
        *,
        batch_invariant: bool = True,
        refine: int = 0,
        coverage: bool = False,
        fill: Fill = "attention",
    ) -> Plan:
        """Everything of :meth:`assign` that does not read the features' values: checks, folded weights.

        While parameters and arguments stay the same, so do the tensors in the plan.
        """
        seed = check_options(seed, precision)
        keep = self._count(keep, features)
        num_slots = self._check_inputs(features, keep, None, noise, num_slots)
        return self._plan(
            features,
            keep,
            noise,
            seed,
            num_slots,
            backend,
            precision,
            return_attention,
            batch_invariant,
            refine,
            coverage,
            fill,
        )

    def _plan(
        self,
        features: torch.Tensor,
        keep: int,
        noise: torch.Tensor | None,
        seed: int,
        num_slots: int | None,
        backend: str,
        precision: str,
        return_attention: bool,
        batch_invariant: bool,
        refine: int,
        coverage: bool,
        fill: Fill,
    ) -> Plan:
        refine = check_rounds(refine)
        if fill not in get_args(Fill):
            raise ValueError(f'fill must be "attention" or "farthest_point"; got {fill!r}')
        if fill == "farthest_point" and num_slots is not None and num_slots > keep:
            raise ValueError(
                f"{num_slots} slots may name more than keep={keep} tokens, which nothing ranks without fill "
                'scores: use fewer slots, or fill="attention"'
            )
        resolved, dtype, tf32 = self.arithmetic(features.device, backend, precision, images=features.shape[0])
        with without_autocast(features.device):
            weights, start = self._folded(noise, seed, keep if num_slots is None else num_slots, dtype)
        return Plan(
            keep,
            backend,
            resolved,
            tf32,
            weights,
            start,
            self.config.num_iters,
            self.config.eps,
            return_attention,
            batch_invariant,
            Refinement(refine, coverage, resolved, batch_invariant) if refine or coverage else None,
            TopUp(resolved, batch_invariant) if fill == "farthest_point" else None,
        )

    def arithmetic(
        self, device: torch.device, backend: str = "auto", precision: str = "auto", *, images: int = 1
    ) -> tuple[str, torch.dtype, bool]:
        """What :meth:`forward` computes with: ``"triton"`` or ``"torch"``, dtype of matrices, TF32 or not.

        Raises:
            ValueError: a precision that the backend does not have.
            BackendUnavailableError: an explicit backend that can't run.
        """
        wide = self.slot_mean.dtype == torch.float64

        def unsupported() -> str | None:
            if wide:
                return "it multiplies in float32 and float16, and the pruner is float64"
            return why_no_kernel(images, self.config.in_dim)

        resolved = resolve_backend(backend, "slot_attention", device, unsupported)
        if resolved == "triton":
            precision = DEFAULT_PRECISION if precision == "auto" else precision
            return resolved, torch.float16 if precision == "fp16" else torch.float32, precision == "tf32"
        if precision in ("tf32", "fp16"):
            raise ValueError(f'precision="{precision}" needs the Triton kernels; here PyTorch computes')
        if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
            raise ValueError(
                'precision="fp32" in PyTorch needs torch.set_float32_matmul_precision("highest"); '
                f"it is {torch.get_float32_matmul_precision()!r}"
            )
        return resolved, torch.float64 if wide else torch.float32, False

    def weights(self) -> SlotAttentionWeights:
        """The parameters of encoder and Slot Attention, in the form the kernels take."""
        enc, att = self.encoder, self.slot_attention
        return SlotAttentionWeights(
            encoder_norm_weight=enc.norm.weight,
            encoder_norm_bias=enc.norm.bias,
            encoder_fc1_weight=enc.fc1.weight,
            encoder_fc1_bias=enc.fc1.bias,
            encoder_fc2_weight=enc.fc2.weight,
            encoder_fc2_bias=enc.fc2.bias,
            input_norm_weight=att.input_norm.weight,
            input_norm_bias=att.input_norm.bias,
            slot_norm_weight=att.slot_norm.weight,
            slot_norm_bias=att.slot_norm.bias,
            query_weight=att.query.weight,
            key_weight=att.key.weight,
            value_weight=att.value.weight,
            gru_input_weight=att.gru.weight_ih,
            gru_hidden_weight=att.gru.weight_hh,
            gru_input_bias=att.gru.bias_ih,
            gru_hidden_bias=att.gru.bias_hh,
            mlp_norm_weight=att.mlp_norm.weight,
            mlp_norm_bias=att.mlp_norm.bias,
            mlp_fc1_weight=att.mlp_fc1.weight,
            mlp_fc1_bias=att.mlp_fc1.bias,
            mlp_fc2_weight=att.mlp_fc2.weight,
            mlp_fc2_bias=att.mlp_fc2.bias,
        )

    def initial_slots(self, noise: torch.Tensor) -> torch.Tensor:
        """``mean + exp(log_std) * noise`` in the noise's dtype, ``[..., K, D]``; differentiable."""
        return self.slot_mean.to(noise.dtype) + self.slot_log_std.to(noise.dtype).exp() * noise

    def refold(self) -> None:
        """Forget the folded weights; the next call makes them anew.

        Needed only after parameters of a pruner in eval mode changed unseen: through ``.data``, a fused
        optimizer, a write to inference tensors, or any in-place write where ``forward`` is compiled.
        Training mode, ``load_state_dict`` and ``.to()`` take care of themselves.
        """
        self._folded_state = None

    # ------------------------------------------------------------------------------------- training

    def reconstruct(
        self,
        features: torch.Tensor,
        num_slots: int = 64,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        mask: torch.Tensor | None = None,
        backend: str = "auto",
        *,
        truncate: bool = True,
    ) -> Reconstruction:
        """Slots, their attention and the decoder's reconstruction, all differentiable (the training path).

        Args:
            features: ``[B, N, in_dim]`` floating point; converted to the parameters' dtype.
            num_slots: slots that compete for the tokens.
            noise: ``[B or 1, num_slots, slot_dim]`` standard normal, or ``None`` to draw it from ``seed``.
            seed: of the noise; the same for every image.
            mask: ``[B or 1, N]`` bool, True where the decoder must not see the token; ``None`` hides none.
            backend: ``"auto"``, ``"torch"`` or ``"triton"``.
            truncate: gradients skip all iterations but the last, as published; ``False``: they take them all.

        Raises:
            TypeError, ValueError: a wrong type or shape, or a pruner without a decoder.
            BackendUnavailableError: an explicit backend that can't run.
        """
        if self.decoder is None:
            raise ValueError(
                "this pruner has no decoder: build it with PrunerConfig(decoder_layers=4), "
                "or load a checkpoint that has one"
            )
        seed = check_options(seed)
        num_slots = self._check_inputs(features, 1, None, noise, num_slots)
        self.decoder.check(features, mask)
        slots, attention = self._slots(features, num_slots, noise, seed, backend, truncate)
        return Reconstruction(slots, attention, self.decode(features, slots, mask))

    def slots(
        self,
        features: torch.Tensor,
        num_slots: int = 64,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        backend: str = "auto",
        *,
        truncate: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first half of :meth:`reconstruct`, whose arguments and errors these are.

        Returns:
            Slots ``[B, K, slot_dim]`` and their attention ``[B, K, N]``.
        """
        seed = check_options(seed)
        num_slots = self._check_inputs(features, 1, None, noise, num_slots)
        return self._slots(features, num_slots, noise, seed, backend, truncate)

    def _slots(
        self,
        features: torch.Tensor,
        num_slots: int,
        noise: torch.Tensor | None,
        seed: int,
        backend: str,
        truncate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features = features.to(self.slot_mean.dtype)
        return slot_attention(
            features,
            self.initial_slots(self._noise(noise, seed, num_slots, features.dtype)),
            self.weights(),
            num_iters=self.config.num_iters,
            eps=self.config.eps,
            truncate=truncate,
            dropout=self.config.dropout if self.training else 0.0,
            backend=backend,
        )

    def decode(
        self, features: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The second half of :meth:`reconstruct`: ``[B, N, in_dim]`` from ``slots`` and unmasked tokens."""
        if self.decoder is None:
            raise ValueError("this pruner has no decoder")
        features = features.to(self.slot_mean.dtype)
        return self.decoder(features, slots, mask) * self.config.feature_scale

    # ---------------------------------------------------------------------------------- checkpoints

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Any],
        num_iters: int = 3,
        decoder_heads: int = 4,
        layer: int = 8,
    ) -> Self:
        """A pruner from the published weights: 25 keys (pruner) or 69 (with decoder), any sizes.

        Args:
            source: a ``.pth`` or ``.safetensors`` file, or a state dict; bare or in ``{"state_dict": ...}``.
            num_iters: Slot Attention iterations; the file does not tell.
            decoder_heads: attention heads of the decoder; the file does not tell.
            layer: encoder layer it was trained on; the file does not tell.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: a key missing, unexpected, misshapen, not finite or not a tensor; names it.
        """
        if isinstance(source, Mapping):
            official = checkpoint.unwrap_state_dict(source)
        else:
            official = checkpoint.read_state_dict(source)
        with contextlib.nullcontext() if isinstance(source, Mapping) else checkpoint.naming(source):
            config = checkpoint.config_from_official(official, num_iters, decoder_heads, layer)
            state = checkpoint.from_official_keys(official)
            return cls._from_state(config, state, official_names=True)

    def to_official(self) -> dict[str, torch.Tensor]:
        """The state dict in the official layout (copies); :meth:`from_official` reads it back exactly.

        That layout has no place for ``config.feature_scale``: a decoder that has one reconstructs features
        divided by it for whoever reads the state dict.
        """
        state = {key: tensor.detach().clone() for key, tensor in self.state_dict().items()}
        return checkpoint.to_official_keys(state)

    @classmethod
    def _from_state(
        cls, config: PrunerConfig, state: Mapping[str, torch.Tensor], *, official_names: bool
    ) -> Self:
        with torch.device("meta"):
            pruner = cls(config)
        checkpoint.check_state(state, pruner.state_dict(), official_names=official_names)
        # Copies, so that the caller's tensors are not the module's parameters; laid out alike, so that they
        # multiply to the same bits whatever a file or a caller did.
        copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
        pruner.load_state_dict(copies, assign=True)
        for parameter in pruner.parameters():
            parameter.requires_grad_(True)
        return pruner.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {key: tensor.contiguous() for key, tensor in self.state_dict().items()}
        save_sealed(save_directory / _WEIGHTS, state, {"config": self.config.to_dict()})

    # The mixin's version takes any keyword and drops it; here an unknown argument raises.
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder_or_repo_id: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str | torch.device = "cpu",
        layer: int | None = None,
    ) -> Self:
        """A pruner from ``config.json`` and ``model.safetensors``, or from official ``weights.pth`` alone.

        Args:
            folder_or_repo_id: a local folder, or a repository on the Hugging Face Hub.
            revision: branch, tag or commit of the repository.
            cache_dir: where downloads are kept.
            force_download: download even what is cached.
            local_files_only: use only what is cached.
            token: for private repositories.
            map_location: device of the pruner.
            layer: encoder layer that official weights were trained on; ``None`` is 8. Our own format says it.

        Raises:
            FileNotFoundError: no such folder, no weights in it, or the Hub can't be reached.
            ValueError: an empty name, or a ``layer`` that ``config.json`` contradicts.
            CheckpointError: a file instead of a folder, ``config.json`` that this version does not
                understand or that was altered since it was saved, or a key missing, unexpected, misshapen,
                altered or not finite; names it.
        """
        files = PrunerFiles(
            folder_or_repo_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        if (weights := files.find(_WEIGHTS)) is not None:
            config_file = files.find(_CONFIG)
            if config_file is None:
                raise checkpoint.CheckpointError(f"{folder_or_repo_id} has {_WEIGHTS} but no {_CONFIG}")
            config = checkpoint.read_config(config_file)
            if layer not in (None, config.layer):
                raise ValueError(
                    f"{folder_or_repo_id} reads encoder layer {config.layer}, as its {_CONFIG} says, "
                    f"not {layer}; give a layer for official weights only"
                )
            with checkpoint.naming(weights):
                state = checkpoint.read_own_weights(weights, config_file, config)
                pruner = cls._from_state(config, state, official_names=False)
        elif (weights := files.find(_OFFICIAL_WEIGHTS)) is not None:
            pruner = cls.from_official(weights, layer=PrunerConfig.layer if layer is None else layer)
        else:
            raise files.missing(_WEIGHTS, _OFFICIAL_WEIGHTS)
        return pruner.to(map_location)

    # ------------------------------------------------------------------------------------ internals

    def train(self, mode: bool = True) -> Self:
        """Set training mode, and forget folded weights: in training mode none are kept."""
        self.refold()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded_state": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.refold()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.refold()
        return super()._apply(fn, recurse)

    def _count(self, keep: float, features: torch.Tensor) -> int:
        """``keep`` as a number of tokens."""
        require_shape(
            "features", require_floating("features", features), (None, None, None), "[B, N, in_dim]"
        )
        share = as_float(keep)
        if share is not None:
            return share_of(share, features.shape[1])
        count = as_int(keep)
        if count is None:
            raise TypeError(f"keep must be an int, or a float for a share; got {type(keep).__name__}")
        return count  # too many or too few: see _check_inputs

    def _check_inputs(
        self,
        features: torch.Tensor,
        keep: int,
        fill_scores: torch.Tensor | None,
        noise: torch.Tensor | None,
        num_slots: int | None,
    ) -> int:
        """Raise for bad arguments; the number of slots, which without another is ``keep``."""
        require_floating("features", features)
        require_shape("features", features, (None, None, self.config.in_dim), "[B, N, in_dim]")
        batch, tokens, _ = features.shape
        if batch == 0 or tokens == 0:
            raise ValueError(f"features needs at least one image and one token; got {list(features.shape)}")
        require_count("keep", keep, tokens, "the number of tokens")
        slots = keep
        if num_slots is not None:
            slots = require_count("num_slots", num_slots, 1_000_000, "a sane number of slots")
        if features.device != self.slot_mean.device:
            raise ValueError(
                f"features are on {features.device}, the pruner on {self.slot_mean.device}; "
                "move one with .to(device)"
            )
        if fill_scores is not None:
            check_fill_scores(fill_scores, batch, tokens)
        if noise is not None:
            require_floating("noise", noise)
            require_shape(
                "noise", noise, (None, slots, self.config.slot_dim), "[B or 1, num_slots, slot_dim]"
            )
            if noise.shape[0] not in (1, batch):
                raise ValueError(f"noise must have batch size 1 or {batch}; got {noise.shape[0]}")
            check_finite("noise", noise)
        return slots

    def _noise(
        self, noise: torch.Tensor | None, seed: int, num_slots: int, dtype: torch.dtype
    ) -> torch.Tensor:
        if noise is None:
            noise = seeded_normal(num_slots, self.config.slot_dim, seed)[None]
        return noise.to(self.slot_mean.device, dtype)

    def _folded(
        self, noise: torch.Tensor | None, seed: int, num_slots: int, dtype: torch.dtype
    ) -> tuple[FoldedWeights, SlotStart]:
        """Folded weights and first-iteration constants, kept while parameters are unchanged."""
        state = self._folded_state
        compiling = torch.compiler.is_compiling()
        # Nor may what a trace or a transform makes outlive it: fake weights, or tangents of another call.
        keeps = not (compiling or self.training or transforms_active() or is_traced(self.slot_mean))
        # A compiled graph can't look at version counters: it takes what the last eager call left, or
        # folds by itself. Whatever may outdate that must call refold().
        if not compiling and not self.training:
            folded_parameters = (*self.weights(), self.slot_mean, self.slot_log_std)
            current = None if transformed(*folded_parameters) else fingerprint(folded_parameters)
            if state is None or state.fingerprint != current:
                state = None
                if keeps:
                    assert current is not None
                    state = self._folded_state = FoldedState(current, self.slot_mean.device)

        def make_weights() -> FoldedWeights:
            return fold(self.weights(), dtype)

        if state is None:
            weights = make_weights()
        elif not keeps:
            known = state.known_weights(dtype)
            weights = make_weights() if known is None else known
        else:
            weights = state.weights(dtype, make_weights)

        def make_start() -> SlotStart:
            vectors = weights.mlp_fc2_bias.dtype
            return start_from_slots(self.initial_slots(self._noise(noise, seed, num_slots, vectors)), weights)

        if noise is not None or state is None:
            return weights, make_start()
        if not keeps:
            known_start = state.known_start(dtype, num_slots, seed)
            return weights, make_start() if known_start is None else known_start
        return weights, state.start(dtype, num_slots, seed, make_start)


def check_options(seed: int, precision: str = "auto") -> int:
    """The seed; ``ValueError`` for a seed or a precision that no call could use."""
    count = as_int(seed)
    if count is None or not 0 <= count <= _MAX_SEED:
        raise ValueError(f"seed must be an int in [0, 2**63); got {seed!r}")
    if precision not in ("auto", "fp32", "tf32", "fp16"):
        raise ValueError(f'precision must be "auto", "fp32", "tf32" or "fp16"; got {precision!r}')
    return count
