"""What the hub repositories of each family hold: published fields and spellings, sizes shrunk.

Written from memory, without access to the repositories: a field may be missing or out of date.
``Id("<image>")`` stands for that token's id in the small tokenizer. Chat templates are ours, in each
family's format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCAB = 512
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]


class Id(str):
    """A token that stands for its id."""


@dataclass(frozen=True)
class Family:
    """One hub repository.

    Attributes:
        config: ``config.json``.
        files: other JSON files by name.
        tokenizer: ``"llama"``, ``"gemma"`` (both SentencePiece-like) or ``"bytes"`` (byte-level).
        special: tokens that are not text, in the order of their ids, after the tokenizer's first ones.
        names: ``(prefix of a parameter in the model, prefix in the checkpoint)``, the first that fits.
        samples: some names of the published checkpoint.
        image: the placeholder.
        tokenizer_config: ``tokenizer_config.json``, without the list of added tokens.
        chat: the chat template; empty for a repository without one.
        prompt: what is asked where there is no chat template.
        width: of the vision encoder.
        unit: patches along each side of a token.
        video: whether its processor also takes videos, for which transformers needs torchvision.
        pillow: the first transformers known to process its images without torchvision.
        since: the first transformers the patch serves it on.
    """

    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    tokenizer: str
    special: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    samples: tuple[str, ...]
    image: str
    tokenizer_config: dict[str, Any]
    chat: str = ""
    prompt: str = "what is this?"
    width: int = 32
    unit: int = 1
    video: bool = False
    pillow: str = "5.0"
    since: str = "5.0"


def _clip(side: int, image_processor: str, processor: str, **more: Any) -> dict[str, Any]:
    """``preprocessor_config.json`` of CLIP's kind."""
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": image_processor,
        "image_std": CLIP_STD,
        "processor_class": processor,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": side},
        **more,
    }


# Sizes of a small language model and a small tower. What is not a size is as published.
SMALL_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}
SMALL_TOWER = {
    "hidden_size": 32,
    "image_size": 56,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
}

# ------------------------------------------------------------------------------------------------- LLaVA

LLAVA_NAMES = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
LLAVA_SAMPLES = (
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "multi_modal_projector.linear_1.bias",
    "vision_tower.vision_model.embeddings.position_embedding.weight",
    "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias",
)
LLAVA_CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() }}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL_CHAT = (
    "{% for message in messages %}[INST] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% endfor %}"
)
LLAMA_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "<pad>",
    "padding_side": "left",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}
LLAVA_PROCESSOR = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
}
CLIP_TOWER = {
    **SMALL_TOWER,
    "model_type": "clip_vision_model",
    "patch_size": 14,
    "projection_dim": 32,
    "vocab_size": 32000,
}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def _llava_next(text: dict[str, Any], chat: str) -> Family:
    return Family(
        config={
            "architectures": ["LlavaNextForConditionalGeneration"],
            "ignore_index": -100,
            "image_grid_pinpoints": PINPOINTS,
            "image_token_index": Id("<image>"),
            "model_type": "llava_next",
            "projector_hidden_act": "gelu",
            "text_config": {**text, **SMALL_TEXT},
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.39.0.dev0",
            "use_image_newline_parameter": True,
            "vision_config": CLIP_TOWER,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": VOCAB,
        },
        files={
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": Id("<pad>"),
                "transformers_version": "4.39.0.dev0",
            },
            "preprocessor_config.json": _clip(
                56,
                "LlavaNextImageProcessor",
                "LlavaNextProcessor",
                aspect_ratio_setting="anyres",
                do_pad=True,
                image_grid_pinpoints=PINPOINTS,
            ),
            "processor_config.json": {**LLAVA_PROCESSOR, "processor_class": "LlavaNextProcessor"},
        },
        tokenizer="llama",
        special=("<image>", "<pad>"),
        names=LLAVA_NAMES,
        samples=(*LLAVA_SAMPLES, "image_newline"),
        image="<image>",
        tokenizer_config={**LLAMA_TOKENIZER, "processor_class": "LlavaNextProcessor"},
        chat=chat,
    )


LLAVA = Family(
    config={
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 16,
        "image_token_index": Id("<image>"),
        "model_type": "llava",
        "pad_token_id": Id("<pad>"),
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            **SMALL_TEXT,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": CLIP_TOWER,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": VOCAB,
    },
    files={
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": Id("<pad>"),
            "transformers_version": "4.36.0.dev0",
        },
        "preprocessor_config.json": _clip(56, "CLIPImageProcessor", "LlavaProcessor"),
        "processor_config.json": {**LLAVA_PROCESSOR, "processor_class": "LlavaProcessor"},
    },
    tokenizer="llama",
    special=("<image>", "<pad>"),
    names=LLAVA_NAMES,
    samples=LLAVA_SAMPLES,
    image="<image>",
    tokenizer_config={**LLAMA_TOKENIZER, "processor_class": "LlavaProcessor"},
    chat=LLAVA_CHAT,
)

VICUNA = _llava_next(
    {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
    },
    LLAVA_CHAT,
)

MISTRAL = _llava_next(
    {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "architectures": ["MistralForCausalLM"],
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    },
    MISTRAL_CHAT,
)

# -------------------------------------------------------------------------------------------------- Qwen

CHATML_PARTS = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n"
    "{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_TOKENIZER = {
    "add_prefix_space": False,
    "additional_special_tokens": list(QWEN_SPECIAL[1:]),
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": "<|endoftext|>",
    "padding_side": "left",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
QWEN_CHAT = CHATML_PARTS.format(
    image="<|vision_start|><|image_pad|><|vision_end|>", video="<|vision_start|><|video_pad|><|vision_end|>"
)
QWEN_NAMES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
QWEN_SAMPLES = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "visual.patch_embed.proj.weight",
    "visual.blocks.0.attn.qkv.weight",
    "visual.merger.ln_q.weight",
    "visual.merger.mlp.0.weight",
)
QWEN_GENERATION = {
    "bos_token_id": Id("<|endoftext|>"),
    "do_sample": True,
    "eos_token_id": [Id("<|im_end|>"), Id("<|endoftext|>")],
    "pad_token_id": Id("<|endoftext|>"),
    "repetition_penalty": 1.05,
    "temperature": 1e-06,
    "transformers_version": "4.49.0",
}


def _qwen2(model: str, version: str, processor: str, vision: dict[str, Any], **more: Any) -> Family:
    """Qwen2-VL and Qwen2.5-VL: the language model's fields lie beside the vision ones, not nested."""
    return Family(
        config={
            "architectures": [f"{model}ForConditionalGeneration"],
            "attention_dropout": 0.0,
            "bos_token_id": Id("<|endoftext|>"),
            "eos_token_id": Id("<|im_end|>"),
            "vision_start_token_id": Id("<|vision_start|>"),
            "vision_end_token_id": Id("<|vision_end|>"),
            "vision_token_id": Id("<|vision_pad|>"),
            "image_token_id": Id("<|image_pad|>"),
            "video_token_id": Id("<|video_pad|>"),
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": version,
            "use_cache": True,
            "use_sliding_window": False,
            "vision_config": vision,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            **SMALL_TEXT,
            **more,
        },
        files={
            "generation_config.json": QWEN_GENERATION,
            "preprocessor_config.json": {
                "min_pixels": 3136,
                "max_pixels": 12845056,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD,
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": processor,
            },
        },
        tokenizer="bytes",
        special=QWEN_SPECIAL,
        names=QWEN_NAMES,
        samples=QWEN_SAMPLES,
        image="<|image_pad|>",
        tokenizer_config=QWEN_TOKENIZER,
        chat=QWEN_CHAT,
        unit=2,
        video=True,
        since="5.10",
    )


QWEN2 = _qwen2(
    "Qwen2VL",
    "4.41.2",
    "Qwen2VLProcessor",
    {
        "depth": 4,
        "embed_dim": 32,
        "mlp_ratio": 4,
        "num_heads": 2,
        "in_chans": 3,
        "hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    model_type="qwen2_vl",
    max_position_embeddings=32768,
)

QWEN2_5 = _qwen2(
    "Qwen2_5_VL",
    "4.41.2",
    "Qwen2_5_VLProcessor",
    {
        "depth": 4,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    model_type="qwen2_5_vl",
    max_position_embeddings=128000,
)

QWEN3 = Family(
    config={
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": Id("<|image_pad|>"),
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": Id("<|endoftext|>"),
            "dtype": "bfloat16",
            "eos_token_id": Id("<|im_end|>"),
            "head_dim": 16,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            **SMALL_TEXT,
            "num_hidden_layers": 4,  # DeepStack features enter the first three
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": Id("<|video_pad|>"),
        "vision_config": {
            "deepstack_visual_indexes": [0, 1, 2],
            "depth": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 48,
            "model_type": "qwen3_vl",
            "num_heads": 2,
            "num_position_embeddings": 2304,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": Id("<|vision_end|>"),
        "vision_start_token_id": Id("<|vision_start|>"),
    },
    files={
        "generation_config.json": {
            **QWEN_GENERATION,
            "repetition_penalty": 1.0,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "transformers_version": "4.56.0",
        },
        "preprocessor_config.json": {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": HALF,
            "image_std": HALF,
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": HALF,
            "image_std": HALF,
            "processor_class": "Qwen3VLProcessor",
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    },
    tokenizer="bytes",
    special=QWEN_SPECIAL,
    names=(("", ""),),
    samples=(
        "lm_head.weight",
        "model.language_model.layers.0.self_attn.q_norm.weight",
        "model.visual.blocks.0.mlp.linear_fc1.weight",
        "model.visual.deepstack_merger_list.0.norm.weight",
        "model.visual.merger.linear_fc2.bias",
        "model.visual.pos_embed.weight",
    ),
    image="<|image_pad|>",
    tokenizer_config=QWEN_TOKENIZER,
    chat=QWEN_CHAT,
    unit=2,
    video=True,
    since="5.18",
)

# ---------------------------------------------------------------------------------------------- the rest

ONEVISION_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
ONEVISION_PINPOINTS = [[56 * i, 56 * j] for i in range(1, 7) for j in range(1, 7)]
ONEVISION = Family(
    config={
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": ONEVISION_PINPOINTS,
        "image_token_index": Id("<image>"),
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "Qwen/Qwen2-7B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": Id("<|endoftext|>"),
            "eos_token_id": Id("<|im_end|>"),
            "max_window_layers": 28,
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "torch_dtype": "bfloat16",
            **SMALL_TEXT,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.45.0.dev0",
        "use_image_newline_parameter": True,
        "video_token_index": Id("<video>"),
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            **SMALL_TOWER,
            "model_type": "siglip_vision_model",
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    files={
        "generation_config.json": {
            "bos_token_id": Id("<|endoftext|>"),
            "do_sample": True,
            "eos_token_id": [Id("<|im_end|>"), Id("<|endoftext|>")],
            "pad_token_id": Id("<|endoftext|>"),
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "transformers_version": "4.45.0.dev0",
        },
        "preprocessor_config.json": {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": ONEVISION_PINPOINTS,
            "image_mean": HALF,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_std": HALF,
            "processor_class": "LlavaOnevisionProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 56, "width": 56},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_image_tokens": 16,
            "processor_class": "LlavaOnevisionProcessor",
            "video_token": "<video>",
            "vision_feature_select_strategy": "full",
        },
    },
    tokenizer="bytes",
    special=ONEVISION_SPECIAL,
    names=LLAVA_NAMES,
    samples=(*LLAVA_SAMPLES, "image_newline"),
    image="<image>",
    tokenizer_config={
        **QWEN_TOKENIZER,
        "additional_special_tokens": list(ONEVISION_SPECIAL[1:3]),
        "processor_class": "LlavaOnevisionProcessor",
    },
    chat=CHATML_PARTS.format(image="<image>", video="<video>"),
    video=True,
)

IDEFICS_NAMES = (("", ""),)
IDEFICS_SAMPLES = (
    "lm_head.weight",
    "model.connector.modality_projection.proj.weight",
    "model.text_model.layers.0.mlp.down_proj.weight",
    "model.vision_model.embeddings.patch_embedding.weight",
    "model.vision_model.encoder.layers.0.self_attn.out_proj.weight",
)
IDEFICS_CHAT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _idefics3(
    *,
    side: int,
    scale: int,
    text: dict[str, Any],
    special: tuple[str, ...],
    tokenizer: dict[str, Any],
    **more: Any,
) -> Family:
    ends = {"bos_token_id": Id(special[0]), "eos_token_id": Id("<end_of_utterance>")}
    return Family(
        config={
            "architectures": ["Idefics3ForConditionalGeneration"],
            "image_token_id": Id("<image>"),
            "model_type": "idefics3",
            "scale_factor": scale,
            "text_config": {**text, **SMALL_TEXT},
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.46.0",
            "use_cache": True,
            "vision_config": {
                "model_type": "idefics3",
                "patch_size": 14,
                **SMALL_TOWER,
                "image_size": side,
                "max_image_size": {"longest_edge": side},
                "size": {"longest_edge": 4 * side},
            },
            **more,
        },
        files={
            "generation_config.json": {
                "_from_model_config": True,
                "pad_token_id": 0,
                "transformers_version": "4.46.0",
                **ends,
            },
            "preprocessor_config.json": {
                "do_convert_rgb": True,
                "do_image_splitting": True,
                "do_normalize": True,
                "do_pad": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": HALF,
                "image_processor_type": "Idefics3ImageProcessor",
                "image_std": HALF,
                "max_image_size": {"longest_edge": side},
                "processor_class": "Idefics3Processor",
                "resample": 1,
                "rescale_factor": 0.00392156862745098,
                "size": {"longest_edge": 4 * side},
            },
            "processor_config.json": {
                "image_seq_len": (side // 14 // scale) ** 2,
                "processor_class": "Idefics3Processor",
            },
        },
        tokenizer="bytes",
        special=special,
        names=IDEFICS_NAMES,
        samples=IDEFICS_SAMPLES,
        image="<image>",
        tokenizer_config={
            "clean_up_tokenization_spaces": True,
            "processor_class": "Idefics3Processor",
            **tokenizer,
        },
        chat=special[0] + IDEFICS_CHAT,
        unit=scale,
        pillow="5.18",
    )


IDEFICS_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>")
IDEFICS_IMAGE = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
IDEFICS3 = _idefics3(
    side=56,
    scale=2,
    text={
        "bos_token_id": Id("<|begin_of_text|>"),
        "eos_token_id": [Id("<|end_of_text|>"), Id("<|eot_id|>")],
        "max_position_embeddings": 131072,
        "model_type": "llama",
        "pad_token_id": Id("<|finetune_right_pad_id|>"),
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    },
    special=(*IDEFICS_SPECIAL, *IDEFICS_IMAGE),
    tokenizer={
        "additional_special_tokens": list(IDEFICS_IMAGE),
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<end_of_utterance>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "pad_token": "<|finetune_right_pad_id|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
)

SMOLVLM = _idefics3(
    side=84,
    scale=3,
    text={
        "_flash_attn_2_enabled": True,
        "architectures": ["VLlama3ForCausalLM"],
        "is_llama_config": True,
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "pad_token_id": Id("<|im_end|>"),
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 273768.0,
        "torch_dtype": "bfloat16",
        "use_resampler": False,
    },
    special=("<|im_start|>", "<|endoftext|>", "<|im_end|>", *IDEFICS_IMAGE),
    tokenizer={
        "add_prefix_space": False,
        "additional_special_tokens": list(IDEFICS_IMAGE),
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "legacy": False,
        "model_max_length": 16384,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "truncation_side": "left",
        "unk_token": "<|endoftext|>",
        "vocab_size": VOCAB,
    },
    image_seq_len=4,
    pad_token_id=Id("<|im_end|>"),
    vocab_size=VOCAB,
)

INTERNVL_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
)
INTERNVL_EXTRA = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
INTERNVL = Family(
    config={
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 4,
        "image_token_id": Id("<IMG_CONTEXT>"),
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": Id("<|endoftext|>"),
            "eos_token_id": Id("<|im_end|>"),
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            **SMALL_TEXT,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0.dev0",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "initializer_factor": 0.1,
            "initializer_range": 1e-10,
            "layer_norm_eps": 1e-06,
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "norm_type": "layer_norm",
            "num_channels": 3,
            "patch_size": [14, 14],
            "projection_dropout": 0.0,
            "torch_dtype": "bfloat16",
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
            **SMALL_TOWER,
            "image_size": [56, 56],
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    },
    files={
        "generation_config.json": {
            "bos_token_id": Id("<|endoftext|>"),
            "eos_token_id": Id("<|im_end|>"),
            "transformers_version": "4.52.0.dev0",
        },
        "preprocessor_config.json": {
            "crop_size": None,
            "crop_to_patches": False,
            "data_format": "channels_first",
            "default_to_square": True,
            "do_center_crop": None,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "image_std": [0.229, 0.224, 0.225],
            "max_patches": 12,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 56, "width": 56},
        },
        "processor_config.json": {"image_seq_length": 4, "processor_class": "InternVLProcessor"},
    },
    tokenizer="bytes",
    special=INTERNVL_SPECIAL,
    names=(("model.vision_tower.", "vision_tower."), *LLAVA_NAMES),
    samples=(
        "language_model.lm_head.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "multi_modal_projector.layer_norm.weight",
        "vision_tower.embeddings.cls_token",
        "vision_tower.encoder.layer.0.attention.q_proj.weight",
        "vision_tower.encoder.layer.0.lambda_1",
    ),
    image="<IMG_CONTEXT>",
    tokenizer_config={
        **QWEN_TOKENIZER,
        **INTERNVL_EXTRA,
        "additional_special_tokens": list(INTERNVL_SPECIAL[1:]),
        "extra_special_tokens": INTERNVL_EXTRA,
        "processor_class": "InternVLProcessor",
    },
    chat=CHATML_PARTS.format(image="<IMG_CONTEXT>\n", video="<video>\n"),
    unit=2,
    video=True,
)

GEMMA_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "<pad>",
    "sp_model_kwargs": None,
    "spaces_between_special_tokens": False,
    "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}
GEMMA_IMAGE = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
SIGLIP_PROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": HALF,
    "image_std": HALF,
    "rescale_factor": 0.00392156862745098,
}
GEMMA3 = Family(
    config={
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": Id("<start_of_image>"),
        "eoi_token_index": Id("<end_of_image>"),
        "eos_token_id": [1, Id("<end_of_turn>")],
        "image_token_index": Id("<image_soft_token>"),
        "initializer_range": 0.02,
        "mm_tokens_per_image": 16,
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **SMALL_TEXT,
            "head_dim": 16,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "patch_size": 14,
            "vision_use_head": False,
            **SMALL_TOWER,
            "image_size": 112,
        },
    },
    files={
        "generation_config.json": {
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "do_sample": True,
            "eos_token_id": [1, Id("<end_of_turn>")],
            "pad_token_id": 0,
            "top_k": 64,
            "top_p": 0.95,
            "transformers_version": "4.50.0.dev0",
        },
        "preprocessor_config.json": {
            **SIGLIP_PROCESSOR,
            "do_pan_and_scan": None,
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 16,
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "size": {"height": 112, "width": 112},
        },
        "processor_config.json": {"image_seq_length": 16, "processor_class": "Gemma3Processor"},
    },
    tokenizer="gemma",
    special=(
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ),
    names=LLAVA_NAMES,
    samples=(
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.pre_feedforward_layernorm.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    ),
    image="<image_soft_token>",
    tokenizer_config={
        **GEMMA_TOKENIZER,
        **GEMMA_IMAGE,
        "extra_special_tokens": GEMMA_IMAGE,
        "processor_class": "Gemma3Processor",
    },
    chat=(
        "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    unit=2,
    since="5.18",
)

PALIGEMMA2 = Family(
    config={
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": 64,
        "image_token_index": Id("<image>"),
        "model_type": "paligemma",
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "projection_dim": 64,
        "text_config": {
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 107],
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "model_type": "gemma2",
            "num_image_tokens": 16,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "torch_dtype": "bfloat16",
            **SMALL_TEXT,
            "head_dim": 16,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0.dev0",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_image_tokens": 16,
            "num_positions": 16,
            "patch_size": 14,
            "projection_dim": 64,
            "torch_dtype": "bfloat16",
            "vision_use_head": False,
            **SMALL_TOWER,
        },
    },
    files={
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": 1,
            "pad_token_id": 0,
            "transformers_version": "4.47.0.dev0",
        },
        "preprocessor_config.json": {
            **SIGLIP_PROCESSOR,
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": 16,
            "processor_class": "PaliGemmaProcessor",
            "resample": 3,
            "size": {"height": 56, "width": 56},
        },
    },
    tokenizer="gemma",
    special=("<image>",),
    names=LLAVA_NAMES,
    samples=(
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.post_feedforward_layernorm.weight",
        "multi_modal_projector.linear.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
    ),
    image="<image>",
    tokenizer_config={
        **GEMMA_TOKENIZER,
        "additional_special_tokens": ["<image>"],
        "processor_class": "PaliGemmaProcessor",
    },
    prompt="<image>caption en",
    since="5.18",
)

FAMILIES: dict[str, Family] = {
    "llava-hf/llava-1.5-7b-hf": LLAVA,
    "llava-hf/llava-v1.6-vicuna-7b-hf": VICUNA,
    "llava-hf/llava-v1.6-mistral-7b-hf": MISTRAL,
    "Qwen/Qwen2.5-VL-7B-Instruct": QWEN2_5,
    "Qwen/Qwen2-VL-7B-Instruct": QWEN2,
    "Qwen/Qwen3-VL-8B-Instruct": QWEN3,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": ONEVISION,
    "HuggingFaceM4/Idefics3-8B-Llama3": IDEFICS3,
    "HuggingFaceTB/SmolVLM-Instruct": SMOLVLM,
    "OpenGVLab/InternVL3-8B-hf": INTERNVL,
    "google/gemma-3-4b-it": GEMMA3,
    "google/paligemma2-3b-pt-224": PALIGEMMA2,
}
