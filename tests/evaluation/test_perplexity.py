from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from llamamoe.data.encoding import encode
from llamamoe.data.text import Document, read_documents
from llamamoe.errors import CheckpointError, LlamaMoeError, UsageError
from llamamoe.evaluation import scoring
from llamamoe.evaluation.perplexity import evaluate
from llamamoe.evaluation.scores import Counts, differences, model_scores
from llamamoe.models import loading
from tests.paths import SHARED_DATA, needs_shared_data

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "naïve",
    "日本語",
    "dogs",
    "🙂🙂",
    "ran;",
    "x",
    "=",
    "y",
    "+",
    "1\n",
]
CONTEXT = 32


def sentence(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words))


def save_tokenizer(folder: Path, vocabulary: int, bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(seed, 40).replace("🙂", "") for seed in range(20)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, *, vocabulary: int = 320, bos: bool = True, seed: int = 0, family: str = "llama") -> Path:
    tokenizer = save_tokenizer(folder, vocabulary, bos)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # predictions far from uniform, so that mistakes show
    }
    kinds = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)),
    }
    model = kinds[family]()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("with_bos"))


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("no_bos"), vocabulary=300, bos=False, seed=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two domains, documents from two words to several windows."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, sizes in (("prose", (60, 2, 30, 7, 12)), ("code", (25, 3, 90))):
        rows = [{"text": sentence(size, size)} for size in sizes]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def slow_reference(folder: Path, corpus: Path, context: int) -> dict[str, tuple[float, int, int]]:
    """Sum of nats, tokens and bytes by domain: one window at a time, one token at a time, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    byte_of = {char: byte for byte, char in _byte_alphabet().items()}
    sums: dict[str, tuple[float, int, int]] = {}
    for document in read_documents([corpus]):
        ids = tokenizer(document.text)["input_ids"]
        nats, tokens, scored = 0.0, 0, b""
        for start in range(0, len(ids), context):
            window = ids[start : start + context]
            logits = model(torch.tensor([window])).logits[0].double()
            for at in range(1, len(window)):
                nats -= torch.log_softmax(logits[at - 1], 0)[window[at]].item()
                tokens += 1
                scored += bytes(byte_of[char] for char in tokenizer.convert_ids_to_tokens(window[at]))
        before = sums.get(document.domain, (0.0, 0, 0))
        sums[document.domain] = (before[0] + nats, before[1] + tokens, before[2] + len(scored))
    return sums


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(rest)}


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("name", ["with_bos", "no_bos"])
def test_scores_are_those_of_a_plain_loop_at_any_batch_size(name, batch_size, corpus, request):
    folder = request.getfixturevalue(name)
    got = evaluate(folder, [corpus], context_length=CONTEXT, batch_size=batch_size)
    reference = slow_reference(folder, corpus, CONTEXT)
    assert list(got.model.domains) == list(reference) == ["code", "prose"]
    for domain, (nats, tokens, size) in reference.items():
        score = got.model.domains[domain]
        assert score.tokens == tokens
        assert abs(score.bytes - size) <= 3 * 8  # only characters cut by a window's border may differ
        assert score.loss == pytest.approx(nats / tokens, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / score.bytes, rel=1e-5)
    nats, tokens = (sum(sums[i] for sums in reference.values()) for i in (0, 1))
    assert got.model.overall.loss == pytest.approx(nats / tokens, rel=1e-5)
    mean = sum(nats / tokens for nats, tokens, _ in reference.values()) / 2
    assert got.model.mean_over_domains.loss == pytest.approx(mean, rel=1e-5)
    assert got.model.mean_over_domains.perplexity == pytest.approx(math.exp(mean), rel=1e-4)


@pytest.mark.parametrize("stride", [1, 5, CONTEXT - 1])
def test_sliding_windows_score_every_token_once_with_the_context_they_promise(stride, with_bos, corpus):
    got = evaluate(with_bos, [corpus], context_length=CONTEXT, stride=stride, batch_size=4)
    model = AutoModelForCausalLM.from_pretrained(with_bos).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(with_bos)
    nats, tokens, size = 0.0, 0, 0
    for document in read_documents([corpus]):
        ids = tokenizer(document.text)["input_ids"]
        size += len(document.text.encode())
        for at in range(1, len(ids)):
            # The first window that holds the token begins at the smallest multiple of the stride from which it is reached.
            start = max(0, math.ceil((at + 1 - CONTEXT) / stride)) * stride
            logits = model(torch.tensor([ids[start:at]])).logits[0, -1].double()
            nats -= torch.log_softmax(logits, 0)[ids[at]].item()
            tokens += 1
    assert got.model.overall.tokens == tokens
    assert got.model.overall.bytes == size
    assert got.model.overall.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert got.stride == stride
    assert f"starting {stride} tokens after" in got.protocol


def test_several_devices_score_the_same(with_bos, corpus):
    one = evaluate(with_bos, [corpus], context_length=CONTEXT, batch_size=2, device="cpu")
    seen: list[int] = []
    three = evaluate(
        with_bos, [corpus], context_length=CONTEXT, batch_size=2, device="cpu, cpu,cpu",
        progress=lambda step: seen.append(step.done),
    )  # fmt: skip
    assert (three.model, three.device) == (one.model, "cpu,cpu,cpu")
    assert seen == sorted(seen)
    assert seen[-1] == one.model.overall.tokens
    assert evaluate(with_bos, [corpus], context_length=CONTEXT, device="spread").model.overall.loss == pytest.approx(
        one.model.overall.loss, rel=1e-6
    )


def test_an_error_on_one_of_several_devices_ends_the_run(with_bos, corpus, tmp_path):
    shutil.copytree(with_bos, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlamaMoeError, match="not finite"):
        evaluate(tmp_path / "broken", [corpus], context_length=CONTEXT, device="cpu,cpu")


def test_with_a_leading_token_and_one_window_every_byte_is_counted(with_bos, tmp_path):
    text = "naïve 日本語\n🙂🙂  end "
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("the cat")
    got = evaluate(with_bos, [tmp_path / "a.txt", tmp_path / "b.txt"])
    assert got.model.domains["a"].bytes == len(text.encode())
    assert got.model.overall.bytes == len(text.encode()) + 7
    assert got.context_length == 64


def test_logits_in_pieces_give_the_same_loss(with_bos, corpus, monkeypatch):
    whole = evaluate(with_bos, [corpus]).model.overall.loss
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 320 * 7)
    assert evaluate(with_bos, [corpus]).model.overall.loss == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(scoring, "_find_head", lambda *_: None)  # as for a model with a head of its own kind
    assert evaluate(with_bos, [corpus]).model.overall.loss == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["granite", "mixtral"])  # granite scales its logits
def test_other_families_are_scored_by_their_own_logits(tmp_path, corpus, family, dtype):
    folder = save_model(tmp_path / family, family=family)
    got = evaluate(folder, [corpus], context_length=CONTEXT, dtype=dtype)
    assert got.model.dtype == dtype
    nats, tokens, _ = slow_reference(folder, corpus, CONTEXT)["code"]
    assert got.model.domains["code"].loss == pytest.approx(nats / tokens, rel=1e-5 if dtype == "float32" else 0.02)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert scoring._find_head(model, torch.arange(2, 12)[None]) is not None


def test_max_tokens_cuts_every_domain(no_bos, corpus):
    got = evaluate(no_bos, [corpus], max_tokens=70, context_length=64)
    assert got.max_tokens == 70
    for domain in got.model.domains.values():
        assert domain.tokens <= 70 - domain.documents
        assert domain.tokens >= 70 - domain.documents - 2
    assert "until 70 tokens" in got.protocol


def test_max_tokens_scores_the_same_tokens_as_a_shorter_text(with_bos, corpus, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(with_bos)
    text = json.loads((corpus / "prose.jsonl").read_text().splitlines()[0])["text"]
    cut = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:20])
    (tmp_path / "cut.txt").write_text(cut)
    got = evaluate(with_bos, [corpus / "prose.jsonl"], max_tokens=20).model.overall
    want = evaluate(with_bos, [tmp_path / "cut.txt"]).model.overall
    assert (got.tokens, got.bytes) == (want.tokens, want.bytes) == (20, len(cut.encode()))
    assert got.loss == pytest.approx(want.loss, rel=1e-6)


def test_two_models_of_one_tokenizer_compare_by_perplexity(with_bos, corpus, tmp_path):
    other = save_model(tmp_path / "other", seed=5)
    got = evaluate(with_bos, [corpus], against=other, context_length=CONTEXT)
    assert got.comparable == "perplexity"
    assert got.against is not None
    assert got.against.overall == evaluate(other, [corpus], context_length=CONTEXT).model.overall
    assert got.difference is not None
    for mine, theirs, difference in (
        (got.model.overall, got.against.overall, got.difference.overall),
        (got.model.domains["code"], got.against.domains["code"], got.difference.domains["code"]),
        (got.model.mean_over_domains, got.against.mean_over_domains, got.difference.mean_over_domains),
    ):
        assert difference.loss == pytest.approx(mine.loss - theirs.loss)
        assert difference.perplexity_ratio == pytest.approx(mine.perplexity / theirs.perplexity)
        assert difference.bits_per_byte == pytest.approx(mine.bits_per_byte - theirs.bits_per_byte)
    itself = evaluate(with_bos, [corpus], against=with_bos).difference
    assert itself is not None
    assert (itself.overall.loss, itself.overall.loss_stderr) == (0.0, 0.0)


@pytest.mark.parametrize("max_tokens", [None, 50])
def test_other_tokenizers_compare_by_bits_per_byte_on_the_same_text(with_bos, no_bos, corpus, max_tokens):
    got = evaluate(with_bos, [corpus], against=no_bos, max_tokens=max_tokens)
    assert got.comparable == "bits_per_byte"
    assert got.against is not None
    assert got.difference is not None
    assert got.difference.overall.loss is None
    assert got.difference.overall.perplexity_ratio is None
    assert "only bits per byte may be compared" in got.protocol
    for domain, mine in got.model.domains.items():
        unscored = mine.bytes - got.against.domains[domain].bytes  # the first token of a document has no context
        assert 0 <= unscored <= 12 * mine.documents
    assert got.difference.overall.bits_per_byte == pytest.approx(
        got.model.overall.bits_per_byte - got.against.overall.bits_per_byte
    )


def test_one_model_is_gone_before_the_other_comes(with_bos, corpus, monkeypatch):
    import gc

    alive: list[int] = []
    load = loading.load_weights

    def spy(*args: object) -> object:
        alive.append(sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects()))
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "load_weights", spy)
    gc.collect()
    evaluate(with_bos, [corpus], against=with_bos)
    assert alive[1] == alive[0]


def test_the_standard_error_is_that_of_resampled_documents():
    rng = np.random.default_rng(0)

    def counts(n: int) -> Counts:
        tokens = rng.integers(5, 200, n).astype(float)
        return Counts(tokens * rng.normal(3, 0.5, n), tokens, tokens * 4)

    domains = {"a": counts(300), "b": counts(200)}
    losses = []
    for _ in range(2000):
        picks = [rng.integers(0, len(c.nll), len(c.nll)) for c in domains.values()]
        sums = [(c.nll[p].sum(), c.tokens[p].sum()) for c, p in zip(domains.values(), picks, strict=True)]
        losses.append([*(a / b for a, b in sums), sum(a for a, _ in sums) / sum(b for _, b in sums)])
    spread = np.std(losses, axis=0)
    got = model_scores("m", "float32", domains)
    assert got.domains["a"].loss_stderr == pytest.approx(spread[0], rel=0.1)
    assert got.overall.loss_stderr == pytest.approx(spread[2], rel=0.1)
    assert got.mean_over_domains.loss_stderr == pytest.approx(math.hypot(spread[0], spread[1]) / 2, rel=0.1)
    # A constant shift of every token's loss has no error at all, however much documents differ.
    shifted = {name: Counts(c.nll + 0.1 * c.tokens, c.tokens, c.bytes) for name, c in domains.items()}
    difference = differences(shifted, domains, True).overall
    assert difference.loss == pytest.approx(0.1)
    assert difference.loss_stderr == pytest.approx(0, abs=1e-12)
    one = model_scores("m", "float32", {"a": counts(1), "b": counts(9)})
    assert one.domains["a"].loss_stderr is one.overall.loss_stderr is None
    assert one.domains["b"].loss_stderr is not None


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of many small samples of pairs whose true difference is known, 95 % give an interval that holds it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        mine, theirs = {}, {}
        for name, n, spread in (("a", 4, 0.5), ("b", 12, 0.1)):
            tokens = np.full(n, 100.0)
            base = rng.normal(3, 1, n)
            theirs[name] = Counts(base * tokens, tokens, tokens * 4)
            mine[name] = Counts((base + rng.normal(0.2, spread, n)) * tokens, tokens, tokens * 4)
        found = differences(mine, theirs, True).mean_over_domains
        low, high = found.loss_interval
        assert low < found.loss < high
        held += low <= 0.2 <= high
    assert 0.93 <= held / 1000 <= 0.98


def test_the_interval_of_one_domain_is_that_of_a_paired_t_test():
    from scipy.stats import ttest_1samp

    rng = np.random.default_rng(2)
    tokens, base = np.full(7, 50.0), rng.normal(3, 1, 7)
    shift = rng.normal(0.1, 0.3, 7)
    counts = ({"a": Counts((base + add) * tokens, tokens, 4 * tokens)} for add in (shift, 0.0))
    found = differences(*counts, True)
    wanted = ttest_1samp(shift, 0).confidence_interval(0.95)
    assert found.overall.loss_interval == pytest.approx((wanted.low, wanted.high))
    bits = found.overall.bits_per_byte_interval
    assert bits == pytest.approx((wanted.low / math.log(2) / 4, wanted.high / math.log(2) / 4))
    one = {"a": Counts(base[:1], tokens[:1], tokens[:1])}
    assert differences(one, one, True).overall.loss_interval is None
    assert differences(one, one, False).overall.loss_interval is None


class SlowTokenizer:
    """As much of a tokenizer without offsets as `encode` uses: one token for two characters."""

    is_fast = False

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [7] * ((len(text) + 1) // 2)}


def test_bytes_belong_to_exactly_one_token(with_bos):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(with_bos)
    text = " a🙂b 日本 naïve  "
    got = encode(tokenizer, Document(text, "d", "o"), bos=0)
    assert got.byte_ends[0] == 0
    assert got.byte_ends[-1] == len(text.encode())
    assert (np.diff(got.byte_ends) >= 0).all()
    pieces = tokenizer.convert_ids_to_tokens(got.ids.tolist())
    assert "Ġa" in pieces
    assert got.byte_ends[pieces.index("Ġa")] == 2
    smile = pieces.index("ð")  # four tokens, one a byte: the character is complete with the last
    assert np.diff(got.byte_ends)[smile - 1 : smile + 3].tolist() == [0, 0, 0, 4]

    even = encode(SlowTokenizer(), Document("abcdé", "d", "o"), bos=None)
    assert even.byte_ends.tolist() == [1, 3, 6]
    assert encode(SlowTokenizer(), Document("abcdé", "d", "o"), bos=None, limit=2).characters == 3


def test_json_and_progress(with_bos, corpus):
    seen = []
    got = evaluate(with_bos, [corpus], against=with_bos, progress=seen.append)
    document = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert document["comparable"] == "perplexity"
    assert document["model"]["domains"]["prose"]["documents"] == 5
    assert document["difference"]["overall"]["loss"] == 0
    assert "'<s>'" in document["protocol"]
    assert seen[-1].done == seen[-1].total == 2 * got.model.overall.tokens
    done = [step.done for step in seen if step.stage == "evaluate"]
    assert done == sorted(done)
    assert [step.done for step in seen if step.stage == "load"] == [1, 2]


def broken(folder: Path, change: Callable[[Path], object]) -> Path:
    save_model(folder)
    change(folder)
    return folder


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shrink(folder: Path) -> None:
    save_model(folder, vocabulary=260)
    save_tokenizer(folder, 320, True)


def infinite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def remote_code(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.M"}})
    )
    (folder / "mine.py").write_text("raise SystemExit('remote code ran')")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda f: (f / "config.json").unlink(), CheckpointError, "not a model: it has no config.json"),
        (
            lambda f: (f / "config.json").write_text("{"),
            CheckpointError,
            r"not a model: config\.json is not valid JSON",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), CheckpointError, "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), CheckpointError, "tokenizer of .* cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "weights of .* cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), CheckpointError, "weights of"),
        (shrink, CheckpointError, "but the model has only 260 embeddings"),
        (drop_tensor, CheckpointError, r"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"),
        (remote_code, CheckpointError, "without remote code"),
        (pickled, CheckpointError, "weights of .* cannot be loaded"),
        (infinite, LlamaMoeError, r"loss on .*\.jsonl:\d+ is not finite"),
    ],
)
def test_a_broken_model_is_named(tmp_path, corpus, change, kind, message):
    folder = broken(tmp_path / "model", change)
    with pytest.raises(kind, match=message) as caught:
        evaluate(folder, [corpus])
    assert "model" in str(caught.value) or "weights" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, with_bos, corpus, name):
    folder = shutil.copytree(with_bos, tmp_path / "model")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link out of the folder"):
        evaluate(folder, [corpus])


def test_calls_that_cannot_be(with_bos, corpus, tmp_path):
    for bad in ("/no/such/folder", "./nowhere", tmp_path / "a" / "b", "~/nothing", "", "gone", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"does not exist|is empty"):
            evaluate(bad, [corpus])
    with pytest.raises(CheckpointError, match="neither a folder nor a"):
        evaluate(with_bos / "config.json", [corpus])
    with pytest.raises(UsageError, match="has only 64 positions"):
        evaluate(with_bos, [corpus], context_length=65)
    for name, value in (("max_tokens", 1), ("context_length", 1), ("batch_size", 0), ("dtype", "int8")):
        with pytest.raises(UsageError, match=f"{name} is"):
            evaluate(with_bos, [corpus], **{name: value})
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match=f"device '{device}' is not available"):
            evaluate(with_bos, [corpus], device=device)
    with pytest.raises(UsageError, match="No file, folder or glob"):
        evaluate(with_bos, [tmp_path / "none.txt"])


def test_strides_and_devices_that_cannot_be(with_bos, corpus):
    for stride in (0, CONTEXT):
        with pytest.raises(UsageError, match=f"stride is {stride}"):
            evaluate(with_bos, [corpus], context_length=CONTEXT, stride=stride)
    with pytest.raises(UsageError, match="'abc' is not available"):
        evaluate(with_bos, [corpus], device="cpu,abc")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="finds none"):
            evaluate(with_bos, [corpus], device="all")


def test_text_too_short_to_score(no_bos, with_bos, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a"}\n')
    with pytest.raises(LlamaMoeError, match="domain 'short' has nothing to score"):
        evaluate(no_bos, [short])
    assert evaluate(with_bos, [short]).model.overall.tokens == 1
    with pytest.raises(LlamaMoeError, match="nothing to score"):
        evaluate(with_bos, [short], against=no_bos)
    short.write_text('{"text": "a"}\n{"text": "the cat sat"}\n')
    got = evaluate(no_bos, [short])
    assert (got.skipped_documents, got.model.overall.documents) == (1, 1)
    short.write_text("\n")
    with pytest.raises(LlamaMoeError, match="contains no document"):
        evaluate(no_bos, [short])


def test_nothing_heavy_is_imported_and_nothing_printed(with_bos, corpus, capfd):
    code = "import sys, llamamoe.evaluation.perplexity; print({'torch', 'transformers'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True) == "set()\n"
    evaluate(with_bos, [corpus])
    assert capfd.readouterr() == ("", "")


@needs_shared_data
def test_stories260k_predicts_held_out_stories_and_not_other_text():
    pytest.importorskip("zstandard")
    model = SHARED_DATA / "models" / "stories260k"
    stories = SHARED_DATA / "tinystories" / "valid.jsonl"
    # All 200 stories: 1.658, each on its own (a plain loop gives the same), or 1.693 concatenated.
    got = evaluate(model, [stories], max_tokens=30_000)
    assert got.model.overall.loss == pytest.approx(1.704, abs=0.002)
    assert got.model.overall.documents > 50
    got = evaluate(model, [SHARED_DATA / "slimpajama" / "valid", stories], max_tokens=2000)
    assert len(got.model.domains) == 8
    bits = {name: score.bits_per_byte for name, score in got.model.domains.items()}
    own = bits.pop("TinyStories")
    assert min(bits.values()) > 1.5 * own
    assert got.model.overall.loss_stderr is None  # the held-out book is one book
