"""LLaVA-1.5 and its relatives: ``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ocvtp.selection import Selection
from ocvtp.vlm.adapter import Begun, ImageRows, Settings, TowerFacts
from ocvtp.vlm.errors import UnsupportedModelError
from ocvtp.vlm.timing import Clock, stage
from ocvtp.vlm.tower import TOWERS, TowerRun, root, run_tower
from ocvtp_kernels.selection import gather_tokens


class LlavaAdapter:
    """Tower -> pruner -> projector on the kept rows (``LlavaModel.get_image_features``, pruned).

    Candidates are the patch tokens. With ``vision_feature_select_strategy="default"`` the first token of a
    tower is dropped, as upstream does: CLIP's class token, or SigLIP's first patch. With ``"full"`` CLIP's
    class token is always kept and does not count against the budget.
    """

    pixel_keys = ("pixel_values",)
    vision_keys = ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def __init__(self, model: Any) -> None:
        inner: Any = getattr(model, "model", None)
        if not hasattr(model, "generate") or not hasattr(inner, "vision_tower"):
            raise UnsupportedModelError(
                f"can't prune a {type(model).__name__}: pass the LlavaForConditionalGeneration itself"
            )
        kind = inner.vision_tower.config.model_type
        if kind not in TOWERS:
            raise UnsupportedModelError(
                f"can't prune a llava model with a {kind!r} vision tower; "
                f"supported: {', '.join(sorted(TOWERS))}"
            )
        self.model = model

    @property
    def image_token_id(self) -> int:
        """The placeholder."""
        return self.model.config.image_token_id

    def facts(self, arguments: Mapping[str, Any]) -> TowerFacts:
        """The vision side under the model's configuration and per-call ``arguments``.

        Raises:
            ValueError: a feature layer or select strategy that the tower does not have.
        """
        tower = self.model.model.vision_tower
        config = tower.config
        device = next(tower.parameters()).device
        prefix, class_rows = self._prefix(arguments)
        patches = root(tower).embeddings.num_patches
        return TowerFacts(
            tower=config.model_type,
            width=config.hidden_size,
            num_layers=config.num_hidden_layers,
            consumed_layers=self._consumed(arguments),
            tokens=patches + TOWERS[config.model_type] - prefix,
            extra_rows=class_rows,
            attention=str(config._attn_implementation),
            device=torch.device("cpu") if device.type == "meta" else device,  # offloaded weights
        )

    def bypassed_methods(self) -> list[tuple[str, torch.nn.Module, str]]:
        """Upstream methods on the way from pixels to rows, which :meth:`encode` replaces."""
        inner = self.model.model
        tower = inner.vision_tower
        found = [
            ("get_image_features", self.model, "get_image_features"),
            ("model.get_image_features", inner, "get_image_features"),
            ("model.vision_tower.forward", tower, "forward"),
            ("model.vision_tower.encoder.forward", root(tower).encoder, "forward"),
        ]
        if root(tower) is not tower:
            found.append(("model.vision_tower.vision_model.forward", root(tower), "forward"))
        return found

    def encode(self, arguments: Mapping[str, Any], settings: Settings, clock: Clock | None) -> ImageRows:
        """Run tower, pruner and projector on ``arguments["pixel_values"]`` ``[images, 3, H, W]``.

        Raises:
            ValueError: arguments that don't describe images of this tower, or a per-call feature layer that
                the pruner's layer is not below.
        """
        if arguments.get("image_sizes") is not None:
            raise ValueError("image_sizes belongs to Pixtral towers; this model's images have one size")
        prefix, class_rows = self._prefix(arguments)
        consumed = self._consumed(arguments)
        run, begun = self._start(arguments["pixel_values"], settings, clock, consumed, prefix)
        outputs = [run.outputs[layer] for layer in consumed]
        with stage(clock, "pruner", outputs[0].device):
            if begun is None:  # timed apart from the tower
                begun = settings.begin(run.outputs[settings.read_layer][:, prefix:])
            scores = self._scores(run, settings, prefix)
            choice = begun.get()
            if len(outputs) == 1 and not class_rows:
                selection, features = choice.select_rows(scores, outputs[0][:, prefix:])
                indices = selection.indices + prefix
            else:
                indices = choice.select(scores).indices + prefix
                if class_rows:
                    indices = torch.cat([indices.new_zeros(indices.shape[0], 1), indices], dim=1)
                taken = [gather_tokens(output, indices.to(output.device)) for output in outputs]
                features = torch.cat(taken, dim=-1)
        with stage(clock, "projector", features.device):
            rows = self.model.model.multi_modal_projector(features)
        first = prefix - class_rows  # token that the first placeholder stands for
        total = outputs[0].shape[1] - first
        return ImageRows(rows, indices - first, total)

    def select(self, pixel_values: torch.Tensor, settings: Settings, *, return_attention: bool) -> Selection:
        """Run tower and pruner only."""
        prefix, _ = self._prefix({})
        consumed = self._consumed({})
        run, begun = self._start(
            pixel_values, settings, None, consumed, prefix, return_attention=return_attention
        )
        assert begun is not None
        return begun.get().select(self._scores(run, settings, prefix))

    def _start(
        self,
        pixel_values: torch.Tensor,
        settings: Settings,
        clock: Clock | None,
        consumed: tuple[int, ...],
        prefix: int,
        *,
        return_attention: bool = False,
    ) -> tuple[TowerRun, Begun | None]:
        """Run the tower, with the pruner beside it from the layer that it reads on, unless a clock runs."""
        read = settings.read_layer
        check_layers(read, consumed)
        begun: list[Begun] = []

        def begin(layer: int, output: torch.Tensor) -> None:
            if layer == read:
                begun.append(settings.begin(output[:, prefix:], return_attention=return_attention))

        tower = self.model.model.vision_tower
        taps = {read, *consumed}
        with stage(clock, "vision tower", pixel_values.device):
            run = run_tower(tower, pixel_values, taps, begin if clock is None else None)
        return run, begun[0] if begun else None

    def _scores(self, run: TowerRun, settings: Settings, prefix: int) -> torch.Tensor:
        """Fill scores of the candidates, where the pruner is."""
        scores = run.received_attention(settings.backend)[:, prefix:]
        return scores.to(run.outputs[settings.read_layer].device)

    def _consumed(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """Layers the projector reads, in its order; ``hidden_states[i + 1]`` is the output of layer ``i``."""
        wanted = arguments.get("vision_feature_layer")
        if wanted is None:
            wanted = self.model.config.vision_feature_layer
        layers = self.model.model.vision_tower.config.num_hidden_layers
        consumed = []
        for index in [wanted] if isinstance(wanted, int) else list(wanted):
            if not -layers <= index <= layers or index == 0:
                raise ValueError(
                    f"vision_feature_layer={wanted!r} needs outputs of encoder layers; this tower has "
                    f"{layers} layers, so indices are 1..{layers} or -{layers}..-1"
                )
            consumed.append(index % (layers + 1) - 1)
        return tuple(consumed)

    def _prefix(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens before the first candidate, and how many of them are handed over nevertheless."""
        strategy = arguments.get("vision_feature_select_strategy")
        if strategy is None:
            strategy = self.model.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f'vision_feature_select_strategy must be "default" or "full"; got {strategy!r}')
        has_class_token = TOWERS[self.model.model.vision_tower.config.model_type]
        if strategy == "default":
            return 1, 0
        return int(has_class_token), int(has_class_token)


def check_layers(read: int, consumed: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the pruner reads a layer below the deepest consumed one."""
    if not 0 <= read < max(consumed):
        raise ValueError(
            f"the pruner reads encoder layer {read}, which must be below the deepest layer the language "
            f"model consumes ({max(consumed)}); use a pruner trained on an earlier layer, or another "
            "vision_feature_layer"
        )
