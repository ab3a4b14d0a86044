"""Tiny random models of images (or sound) and text, each with an image (or sound) and a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from llamamoe.checkpoint.text_part import OF_SOUND
from tests.dense import COMMON, VARIANTS, make_qwen_tokenizer, make_tokenizer

_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
_TEXTS = {"qwen3_vl": {"model_type": "qwen3_vl_text", "rope_parameters": _SECTIONS}}
"""Keys of text models that differ from those of the causal language models that they are like."""
IMAGE = 127
"""The id of an image's tokens, the last of the tokenizer's."""
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = {**_VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16}
_SIGLIP = {**_VISION, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8}
_QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
         "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 16}  # fmt: skip
_SOUND = {"d_model": 16, "encoder_ffn_dim": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "num_mel_bins": 8,
          "max_source_positions": 16}  # fmt: skip
_VOXTRAL = {"model_type": "voxtral_encoder", "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 16}  # fmt: skip
_GRID = {"image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1}
WRAPPERS: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "llava": ({"vision_config": _CLIP}, (1, 3, 16, 16), 4),
    "vipllava": ({"vision_config": _CLIP, "vision_feature_layers": [-1, -2]}, (1, 3, 16, 16), 4),
    "llava_next": ({"vision_config": _CLIP, **_GRID}, (1, 2, 3, 16, 16), 10),
    "llava_onevision": ({"vision_config": _SIGLIP, **_GRID}, (1, 2, 3, 16, 16), 10),
    "mistral3": (
        {"vision_config": {**_VISION, "model_type": "pixtral", "image_size": 32, "patch_size": 8, "head_dim": 8}},
        (1, 3, 32, 32),
        4,
    ),
    "internvl": (
        {"vision_config": {**_VISION, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]}},
        (1, 3, 16, 16),
        1,
    ),
    "idefics3": (
        {"vision_config": {**_SIGLIP, "model_type": "idefics3_vision"}, "scale_factor": 2},
        (1, 1, 3, 16, 16),
        1,
    ),
    "smolvlm": (
        {"vision_config": {**_SIGLIP, "model_type": "smolvlm_vision"}, "scale_factor": 2},
        (1, 1, 3, 16, 16),
        1,
    ),
    "qwen2_audio": ({"audio_config": _SOUND | {"model_type": "qwen2_audio_encoder"}}, (1, 8, 32), 8),
    "voxtral": ({"audio_config": _VOXTRAL}, (1, 8, 32), 4),
    "qwen3_5": ({"vision_config": _QWEN}, (24, 96), 6),
    "qwen3_vl": ({"vision_config": {**_QWEN, "deepstack_visual_indexes": [0, 1]}}, (24, 96), 6),
}
"""Configuration keys beside the text model's, the shape of an image or of sound, and the number of its tokens."""


def make_multimodal(folder: Path, wrapper: str = "llava", variant: str = "llama", **options: Any) -> Path:
    """Save a random model with a tokenizer and an image processor's file; return the folder.

    Args:
        folder: Where to.
        wrapper: A key of `WRAPPERS`.
        variant: A key of `tests.dense.VARIANTS`: the text model.
        options: Arguments of ``save_pretrained``.
    """
    text = {**COMMON, **VARIANTS[variant], **_TEXTS.get(wrapper, {})}
    sound = wrapper in OF_SOUND
    names = ("audio_token_id", "audio_token_index") if sound else ("image_token_id", "image_token_index")
    keys = {**dict.fromkeys(names, IMAGE), "tie_word_embeddings": variant.endswith("tied")}
    config = AutoConfig.for_model(wrapper, text_config=text, **keys, **WRAPPERS[wrapper][0])
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(folder, **options)
    (make_qwen_tokenizer if wrapper == "qwen3_5" else make_tokenizer)(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 16}')
    return folder


def other_input(wrapper: str) -> str:
    """Return the name of the image or the sound."""
    return "input_features" if wrapper in OF_SOUND else "pixel_values"


def inputs(wrapper: str) -> dict[str, Any]:
    """Return a prompt with an image."""
    _, shape, count = WRAPPERS[wrapper]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE, (1, 24), generator=generator)
    ids[:, 2 : 2 + count] = IMAGE
    given: dict[str, Any] = {"input_ids": ids, other_input(wrapper): torch.randn(shape, generator=generator)}
    if wrapper in ("llava_next", "llava_onevision", "mistral3"):
        given["image_sizes"] = torch.tensor([shape[-2:]])
    if wrapper == "qwen2_audio":
        given["feature_attention_mask"] = torch.ones(1, shape[-1], dtype=torch.long)
    if wrapper.startswith("qwen3"):
        given["image_grid_thw"] = torch.tensor([[1, 4, 6]])  # patches, of which 2 x 2 are one token
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    return given
