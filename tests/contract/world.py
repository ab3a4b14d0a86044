"""One calibrated layer, small and real, and what the contract tests of all kinds share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llamamoe.architectures.dense_checkpoint import understand
from llamamoe.calibration.clusters import text_clusters
from llamamoe.calibration.compute import Compute
from llamamoe.calibration.gradients import ffn_gradients
from llamamoe.calibration.text import CalibrationText, calibration_text
from llamamoe.calibration.walk import Walk, cast_ffn, read_ffn
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.methods.layer import FfnWeights, LayerContext, LayerInputs
from llamamoe.methods.moe_layer import dense_outputs
from llamamoe.plugins import Needs, Plugin
from tests.dense import make_dense
from tests.paths import SHARED_DATA

SEQUENCES, LENGTH, LAYER, KINDS = 16, 128, 1, 12


@dataclass(frozen=True)
class World:
    """A layer of a dense model, and what its FFN sees on some text.

    Attributes:
        folder: The dense checkpoint.
        ids_ST: int64, the text.
        ffn: The layer's weights in float32, 172 neurons on 64 dimensions.
        inputs: Its inputs on the text, with gradients of the model's loss.
        other: Its inputs on other text.
        vocab_size: Of the model.
        trained: Whether it is a model that was trained on text.
    """

    folder: Path
    ids_ST: np.ndarray
    ffn: FfnWeights
    inputs: LayerInputs
    other: LayerInputs
    vocab_size: int
    trained: bool

    def context(
        self, num_experts: int, top_k: int, width: int, *, seed: int = 0, inputs: LayerInputs | None = None
    ) -> LayerContext:
        """N experts of width W, and fresh inputs with as many text clusters as experts."""
        given = self.inputs if inputs is None else inputs
        sequences = given.num_tokens // LENGTH
        clusters = text_clusters(self.ids_ST[:sequences], self.vocab_size, min(num_experts, sequences), 0)
        clusters_T = torch.from_numpy(clusters).repeat_interleave(LENGTH)
        return LayerContext(LAYER, num_experts, top_k, width, seed, replace(given, clusters_T=clusters_T))

    def part(self, sequences: int, inputs: LayerInputs | None = None) -> LayerInputs:
        """The inputs (or others) on the first sequences alone."""
        tokens, given = sequences * LENGTH, self.inputs if inputs is None else inputs
        assert given.gradients_TH is not None
        return replace(
            given,
            x_TH=given.x_TH[:tokens],
            residual_scale_T=given.residual_scale_T[:tokens],
            gradients_TH=given.gradients_TH[:tokens],
        )


def make_world(folder: Path) -> World:
    """The trained model of the shared data where it lies beside the project; elsewhere one made on the spot."""
    if SHARED_DATA.is_dir():
        return _calibrated(SHARED_DATA / "models" / "stories260k", _stories(), folder)
    rng = np.random.default_rng(0)
    # Four kinds of text, each with words of its own and a few that are far more frequent than others.
    words = rng.permutation(125).reshape(5, 25) + 3
    share = 1 / np.arange(1, 51)
    ids = [
        rng.choice(np.concatenate([words[4], words[i % 4]]), LENGTH, p=share / share.sum())
        for i in range(2 * SEQUENCES)
    ]
    return _calibrated(_structured(make_dense(folder / "dense")), np.stack(ids), folder)


def _structured(dense: Path) -> Path:
    """Give a random model what a trained one has: words, and neurons that answer to them, in kinds that overlap.

    A layer of independent random neurons is one that nothing is learned about from a few thousand tokens.
    """
    g = torch.Generator().manual_seed(0)
    tensors = load_file(dense / "model.safetensors")
    kinds = torch.randn(KINDS, 64, generator=g)
    embedding = kinds[torch.arange(128) % KINDS] + 0.4 * torch.randn(128, 64, generator=g)
    tensors["model.embed_tokens.weight"] = 3 * embedding
    kind = torch.arange(172) % KINDS
    mixed = kinds[kind] + 0.7 * kinds[torch.randint(KINDS, (172,), generator=g)]
    size = torch.randn(172, 1, generator=g).mul(0.7).exp()
    for part, strength in (("gate", 0.15), ("up", 0.1), ("down", 0.1)):
        rows = strength * size * (mixed + 0.7 * torch.randn(172, 64, generator=g))
        tensors[f"model.layers.{LAYER}.mlp.{part}_proj.weight"] = (rows.T if part == "down" else rows).contiguous()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    return dense


def _stories() -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "models" / "stories260k")
    text = calibration_text(
        [SHARED_DATA / "tinystories" / "valid.jsonl"],
        tokenizer,
        num_tokens=2 * SEQUENCES * LENGTH,
        length=LENGTH,
        weights=None,
        seed=0,
        vocab_size=512,
    )
    return text.ids_ST


def _calibrated(source: Path, ids_ST: np.ndarray, folder: Path) -> World:
    model = understand(open_checkpoint(locate(source)))
    seen = []
    for half in (ids_ST[:SEQUENCES], ids_ST[SEQUENCES:]):
        text = CalibrationText(half, ("a",) * SEQUENCES, None, {}, ())
        gradients = ffn_gradients(model, torch.from_numpy(half), folder=folder / f"gradients.{len(seen)}")
        walk = Walk(
            model,
            text,
            Compute(torch.device("cpu"), torch.float32),
            weights_dtype=torch.float32,
            gradients=gradients,
        )
        walk.start()
        for layer in range(LAYER + 1):
            inputs = walk.enter(layer)
            if layer < LAYER:
                walk.leave(layer, dense_outputs(inputs, read_ffn(model, layer)))
        assert inputs.gradients_TH is not None
        seen.append(replace(inputs, gradients_TH=inputs.gradients_TH.clone()))
    ffn = cast_ffn(read_ffn(model, LAYER), torch.float32)
    return World(source, ids_ST[:SEQUENCES], ffn, seen[0], seen[1], model.spec.vocab_size, SHARED_DATA.is_dir())


# ---- plug-ins -----------------------------------------------------------------------------------------------------


def variants(cls: type[Plugin], needed: dict[str, dict[str, Any]] | None = None) -> Iterator[dict[str, Any]]:
    """The default options, and for every flag and choice of words each other value of it.

    Args:
        cls: The plug-in.
        needed: For an option that means nothing by itself, the others that it is given with.
    """
    yield {}
    for key, field in cls.Options.model_fields.items():
        values: Sequence[Any] = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        values = (True, False) if field.annotation is bool else values
        for value in values:
            if value != field.default:
                yield {**(needed or {}).get(key, {}), key: value}


def made(cls: type[Plugin], options: dict[str, Any] | None = None) -> Any:
    """The plug-in with these options."""
    return cls(cls.Options(**options or {}))


def quick(cls: type[Plugin]) -> dict[str, Any]:
    """Few steps for a plug-in that counts them: enough where only the form of a result is looked at."""
    return {key: value for key, value in {"steps": 4, "epochs": 1}.items() if key in cls.Options.model_fields}


def shown(context: LayerContext, needs: Needs) -> LayerContext:
    """The context of a method that declares its needs: without activations for one that needs none."""
    return replace(context, calibration=None) if needs in ("nothing", "weights") else context


def check_needs(
    needs: Needs,
    result: Callable[[FfnWeights, LayerInputs], str],
    ffn: FfnWeights,
    inputs: LayerInputs,
    other: LayerInputs,
) -> None:
    """Another result for other weights, activations and gradients as far as a method declares that it needs them."""
    zeros = replace(ffn, **{part: torch.zeros_like(getattr(ffn, part)) for part in ("gate_FH", "up_FH", "down_HF")})
    changed = {
        "weights": (zeros, inputs),
        "activations": (ffn, replace(other, gradients_TH=inputs.gradients_TH)),
        "gradients": (ffn, replace(inputs, gradients_TH=other.gradients_TH)),
    }
    base, order = result(ffn, inputs), get_args(Needs)
    for what, given in changed.items():
        assert (result(*given) != base) == (order.index(what) <= order.index(needs)), what


def digest(*values: Any) -> str:
    """SHA-256 of arrays, tensors and plain data, with shape and dtype."""
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous().numpy()
        if isinstance(value, np.ndarray):
            state.update(f"{value.shape} {value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            state.update(repr(value).encode())
    return state.hexdigest()


def disturb() -> None:
    """Move every generator that is not a plug-in's own."""
    torch.manual_seed(torch.initial_seed() + 1)
    torch.rand(7)
    np.random.seed(int(np.random.randint(2**31)))
