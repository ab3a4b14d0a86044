"""Tiny random models of images and text, each with an image and a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

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
    "qwen3_5": ({"vision_config": _QWEN}, (24, 96), 6),
    "qwen3_vl": ({"vision_config": {**_QWEN, "deepstack_visual_indexes": [0, 1]}}, (24, 96), 6),
}
"""Configuration keys beside the text model's, the shape of an image, and the number of its tokens."""


def make_multimodal(folder: Path, wrapper: str = "llava", variant: str = "llama", **options: Any) -> Path:
    """Save a random model with a tokenizer and an image processor's file; return the folder.

    Args:
        folder: Where to.
        wrapper: A key of `WRAPPERS`.
        variant: A key of `tests.dense.VARIANTS`: the text model.
        options: Arguments of ``save_pretrained``.
    """
    text = {**COMMON, **VARIANTS[variant], **_TEXTS.get(wrapper, {})}
    keys = {"image_token_id": IMAGE, "image_token_index": IMAGE, "tie_word_embeddings": variant.endswith("tied")}
    config = AutoConfig.for_model(wrapper, text_config=text, **keys, **WRAPPERS[wrapper][0])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(folder, **options)
    (make_qwen_tokenizer if wrapper == "qwen3_5" else make_tokenizer)(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 16}')
    return folder


def inputs(wrapper: str) -> dict[str, Any]:
    """Return a prompt with an image."""
    _, shape, count = WRAPPERS[wrapper]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE, (1, 24), generator=generator)
    ids[:, 2 : 2 + count] = IMAGE
    given: dict[str, Any] = {"input_ids": ids, "pixel_values": torch.randn(shape, generator=generator)}
    if wrapper in ("llava_next", "llava_onevision", "mistral3"):
        given["image_sizes"] = torch.tensor([shape[-2:]])
    if wrapper.startswith("qwen3"):
        given["image_grid_thw"] = torch.tensor([[1, 4, 6]])  # patches, of which 2 x 2 are one token
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    return given
