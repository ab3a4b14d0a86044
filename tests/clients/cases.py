"""The conversions that other programs are shown: every target as it comes out by default, small and random."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llamamoe
from tests.dense import make_byte_level, make_dense

from .loading import expect

SIZES = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
"""Heads as wide as programs take them, and rows that divide into blocks of 256 and 32, so that all can be quantised."""


@dataclass(frozen=True)
class Case:
    """One conversion.

    Attributes:
        target: The architecture.
        variant: A key of `tests.dense.VARIANTS`.
        given: The recipe beyond its target; a ``calibration`` of True means text.
        flags: Those that make it another entry of a client's results, see `llamamoe.architectures.targets.clients`.
    """

    target: str
    variant: str = "llama"
    given: dict[str, Any] = field(default_factory=dict)
    flags: str = ""

    @property
    def kind(self) -> str:
        """The entry of a client's results that it must be like."""
        return f"{self.target} {self.flags}".strip()


_RANDOM = {"method": "random", "shared_by": "weight_norm"}
_PLAIN = {**_RANDOM, "num_experts": 8, "top_k": 4, "shared": 0}
_SHARED = {**_RANDOM, "num_experts": 7, "top_k": 3, "shared": "1x"}
_FITTED = {"calibration": True, "num_experts": 8, "top_k": 4}
CASES = {
    "mixtral": Case("mixtral", given=_PLAIN),
    "mixtral-calibrated": Case("mixtral", given=_FITTED | {"shared": 0}),
    "qwen2_moe": Case("qwen2_moe", "llama-tied", _SHARED),
    "qwen2_moe-unit": Case("qwen2_moe", "llama", _SHARED | {"rescale": "unit"}, "--rescale unit"),
    "qwen3_moe": Case("qwen3_moe", "qwen3", _PLAIN),
    "granitemoeshared": Case("granitemoeshared", "llama-tied", _PLAIN | {"shared": 0.25}),
    "granitemoeshared-calibrated": Case("granitemoeshared", "llama-tied", _FITTED | {"shared": 0.25}),
    "hunyuan_v1_moe": Case("hunyuan_v1_moe", "hunyuan_v1_dense", _SHARED),
    "flex_olmo": Case("flex_olmo", "olmo2", _PLAIN),
    "qwen3_5_moe_text": Case("qwen3_5_moe_text", "qwen3_5_text", _SHARED),
    "cohere2_moe": Case("cohere2_moe", "cohere2", _SHARED),
    "granitemoe_swa": Case("granitemoe_swa", "llama-tied", _PLAIN | {"shared": 0.25}),
    "glm4_moe": Case("glm4_moe", "llama-tied", _SHARED),
    "glm4_moe-none": Case("glm4_moe", "llama", _PLAIN),
    "glm4_moe-calibrated": Case("glm4_moe", "llama", _FITTED | {"num_experts": 7, "top_k": 3, "shared": "1x"}),
    "glm4_moe-2x": Case("glm4_moe", "llama", _SHARED | {"num_experts": 6, "shared": "2x"}, "--shared 2x"),
    "ernie4_5_moe": Case("ernie4_5_moe", "llama-tied", _SHARED),
    "jetmoe": Case("jetmoe", given={"method": "random", "dtype": "float32"}),
    "dense": Case("dense", "llama-tied", {"method": "static", "shared": 0.5, "shared_by": "weight_norm"}),
}


def build(root: Path) -> list[Path]:
    """Convert every case below ``root``, with what is expected of it, and ``model.gguf`` where that can be written."""
    text = root / "text"
    text.mkdir()
    for path in Path(__file__).parent.glob("run_*.py"):
        (text / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8"))
    folders = []
    for name, case in CASES.items():
        given = case.given | {"target": case.target}
        if given.get("calibration"):
            given |= {"calibration": [str(text)], "calibration_tokens": 2048, "calibration_length": 64}
        out = root / name
        llamamoe.split(_parent(root, case.variant), out, llamamoe.load_recipe(given=given), verify=False)
        expect(out)
        try:
            llamamoe.export_gguf(out, root / f"{name}.gguf", dtype="f32").out.rename(out / "model.gguf")
        except llamamoe.LlamaMoeError as error:
            (out / "refused.txt").write_text(str(error))
        folders.append(out)
    return folders


def _parent(root: Path, variant: str) -> Path:
    folder = root / "parents" / variant
    if not folder.exists():
        make_dense(folder, variant, **SIZES)
        if not variant.startswith("qwen3_5"):  # whose class has a tokenizer of its own
            make_byte_level(folder, "llama-bpe")
    return folder
