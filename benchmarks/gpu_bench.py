"""Sizes and models of `gpu.py`, which are made when a check first asks for them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import llamamoe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.dense import make_tokenizer
from tests.training.runs import make_text


@dataclass(frozen=True)
class Sizes:
    """Sizes of the checks.

    Attributes:
        wide: Configuration of the model that is compared with the CPU.
        small: Configuration of the model that is converted, aligned and trained.
        blocks: Hidden size, FFN size and tokens of the FFN blocks that are timed.
        shapes: Their numbers of experts and of selected ones.
        tokens: Tokens of a comparison of logits.
        calibration: Tokens of calibration text.
        alignment: Tokens of alignment.
        turns: Repetitions of what is timed.
    """

    wide: dict[str, int]
    small: dict[str, int]
    blocks: tuple[int, int, int]
    shapes: tuple[tuple[int, int], ...]
    tokens: int
    calibration: int
    alignment: int
    turns: int


def _config(hidden: int, ffn: int, layers: int, heads: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "vocab_size": vocab, "max_position_embeddings": 1024,
    }  # fmt: skip


FULL = Sizes(
    wide=_config(4096, 11264, 2, 32, 32000),
    small=_config(576, 1536, 12, 8, 512),
    blocks=(4096, 11264, 8192),
    shapes=((16, 4), (64, 24), (88, 36)),
    tokens=256,
    calibration=16384,
    alignment=16384,
    turns=10,
)
TINY = Sizes(
    wide=_config(64, 128, 2, 4, 256),
    small=_config(64, 96, 2, 4, 256),
    blocks=(64, 176 * 8, 32),
    shapes=((16, 4), (88, 36)),
    tokens=24,
    calibration=1024,
    alignment=4096,
    turns=2,
)


@dataclass
class Bench:
    """The folder of the checks, and the models that they share."""

    device: str
    sizes: Sizes
    work: Path

    @cached_property
    def wide(self) -> Path:
        """A converted model of the wide sizes: 4 of 8 experts."""
        return self.split("wide", "wide-moe", {"num_experts": 8, "top_k": 4, "method": "random"})

    @cached_property
    def small(self) -> Path:
        """A converted model of the small sizes."""
        return self.split("small", "small-moe", {"num_experts": 8, "top_k": 4, "method": "random"})

    @cached_property
    def text(self) -> Path:
        """Text in two domains that a small model can learn from."""
        make_text(self.work / "text", 0, documents=3000)
        return self.work / "text"

    @cached_property
    def tokens(self) -> Path:
        """The same as tokens of the small model."""
        given = {"tokenizer": str(self.parent("small")), "text": [str(self.text)], "workers": 1}
        llamamoe.tokenize(llamamoe.load_tokenize_recipe(given=given), self.work / "tokens")
        return self.work / "tokens"

    def parent(self, name: str) -> Path:
        """The dense model of these sizes: random weights whose products keep the size of their inputs."""
        folder = self.work / f"{name}-dense"
        if not folder.exists():
            torch.manual_seed(0)
            config = LlamaConfig(**getattr(self.sizes, name), tie_word_embeddings=False)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim == 2:
                        weight.normal_(std=weight.shape[-1] ** -0.5)
            model.save_pretrained(folder)
            make_tokenizer(folder, config.vocab_size)
        return folder

    def split(self, name: str, out: str, given: dict[str, Any]) -> Path:
        """A conversion of the dense model of these sizes."""
        recipe = llamamoe.load_recipe(given={"card": False, "target": "mixtral"} | given)
        llamamoe.split(self.parent(name), self.work / out, recipe, verify=False)
        return self.work / out

    def calibration(self, device: str) -> dict[str, Any]:
        """Return the recipe keys of the small model for text, device and shared neurons."""
        return {
            "calibration": [str(self.text)], "calibration_tokens": self.sizes.calibration, "calibration_length": 64,
            "device": device, "shared": self.sizes.small["intermediate_size"] // 4,
        }  # fmt: skip

    def load(self, folder: Path, dtype: torch.dtype, device: str | None = None, **keys: Any) -> Any:
        """A model in plain transformers."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **keys).to(device or self.device).eval()

    def pretrain(self, out: str, **given: Any) -> list[dict[str, Any]]:
        """A short run of training; its lines of metrics."""
        base: dict[str, Any] = {
            "model": str(self.small), "data": {"train": str(self.tokens), "block_length": 64}, "steps": 4, "batch_size": 8,
            "micro_batch_size": 4, "device": self.device, "log_every": 1, "optimizer": {"lr": 1e-3},
            "lr_schedule": {"warmup": 0}, "precision": {"compute": "bfloat16"}, "save_every": 2,
        }  # fmt: skip
        resume = given.pop("resume", False)
        llamamoe.pretrain(llamamoe.load_pretrain_recipe(given=base | given), self.work / out, resume=resume)
        lines = (self.work / out / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]

    def seconds(self, function: Callable[[], Any]) -> float:
        """The median time of a call, after two that warm up."""
        times = []
        for turn in range(self.sizes.turns + 2):
            self.wait()
            began = time.perf_counter()
            function()
            self.wait()
            if turn >= 2:
                times.append(time.perf_counter() - began)
        return median(times)

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device == "cuda":
            torch.cuda.synchronize()
