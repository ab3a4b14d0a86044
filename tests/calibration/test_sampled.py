from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe.architectures.dense_checkpoint import DenseModel, understand
from llamamoe.calibration.sampled import _draw, open_tokenizer, sample_text
from llamamoe.checkpoint.locate import Location, open_checkpoint
from llamamoe.errors import CheckpointError, LlamaMoeError, UsageError
from llamamoe.progress import Progress
from tests.dense import make_dense, make_tokenizer

FEW = {"num_tokens": 256, "length": 16, "seed": 0}


def opened(folder: Path) -> DenseModel:
    return understand(open_checkpoint(Location(folder, folder.name)))


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> DenseModel:
    return opened(make_dense(tmp_path_factory.mktemp("parent"), num_hidden_layers=1))


class Tokenizer:
    """Special tokens, and whether a beginning is added to a text: what sampling looks at."""

    def __init__(self, bos: int | None, eos: int | None, adds: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self.adds = bos, eos, adds

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id, 5] if self.adds else [5]}


def test_each_token_is_drawn_from_the_models_own_distribution(parent):
    """Plainly: the whole model on each prefix again, and the cumulative distribution walked through by hand."""
    text = sample_text(parent, Tokenizer(1, 2), **FEW, temperature=0.7, batch_size=5)
    assert text.ids_ST.shape == (16, 16)
    assert text.ids_ST.dtype == np.int64
    model = AutoModelForCausalLM.from_pretrained(parent.checkpoint.path, dtype=torch.float32)
    uniform = np.random.default_rng([0, *b"sampled text"]).random((16, 16))
    for s in (0, 7, 15):
        ids = [1]
        for t in range(1, 16):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double().numpy() / 0.7
            weights = np.exp(logits - logits.max())
            total, token = 0.0, -1
            while total <= uniform[s, t] * weights.sum():
                token += 1
                total += weights[token]
            ids.append(token)
        assert text.ids_ST[s].tolist() == ids


def test_draws_have_the_distributions_frequencies():
    logits = torch.tensor([0.0, math.log(2.0), -math.inf, math.log(5.0)]).expand(8000, 4)
    tokens = _draw(logits, (np.arange(8000) + 0.5) / 8000)
    assert np.bincount(tokens, minlength=4).tolist() == [1000, 2000, 0, 5000]
    assert _draw(torch.tensor([[-math.inf, 0.0, -math.inf]] * 2), np.array([0.0, 1 - 2**-53])).tolist() == [1, 1]


def test_a_low_temperature_takes_the_likeliest_token(parent):
    text = sample_text(parent, Tokenizer(1, 2), **FEW, temperature=1e-4)
    model = AutoModelForCausalLM.from_pretrained(parent.checkpoint.path, dtype=torch.float32)
    with torch.no_grad():
        greedy = model(torch.from_numpy(text.ids_ST[:1])).logits.argmax(-1)
    assert np.array_equal(greedy[0, :-1], text.ids_ST[0, 1:])


def test_text_depends_on_the_seed_but_not_on_the_batch(parent):
    texts = [
        sample_text(parent, Tokenizer(1, 2), **(FEW | {"seed": s}), batch_size=b) for s, b in ((3, 4), (3, 7), (4, 4))
    ]
    assert np.array_equal(texts[0].ids_ST, texts[1].ids_ST)
    assert texts[0].facts == texts[1].facts
    assert not np.array_equal(texts[0].ids_ST, texts[2].ids_ST)
    assert len(np.unique(texts[0].ids_ST, axis=0)) == 16  # sequences differ from each other


def test_facts_say_where_the_text_comes_from(parent):
    text = sample_text(parent, Tokenizer(1, 2), num_tokens=300, length=40, seed=7, temperature=0.5)
    assert text.facts.pop("sha256_of_ids")
    assert text.facts == {
        "source": "sampled from the parent",
        "tokens": 280,
        "sequences": 7,
        "length": 40,
        "seed": 7,
        "temperature": 0.5,
        "first_token": 1,
        "dtype": "float32",
    }
    assert text.domains_S == ("sampled",) * 7
    assert text.document_hashes == frozenset()


def test_sequences_start_as_documents_do(parent):
    assert set(sample_text(parent, Tokenizer(1, 2), **FEW).ids_ST[:, 0]) == {1}
    assert set(sample_text(parent, Tokenizer(None, 2), **FEW).ids_ST[:, 0]) == {2}
    random = sample_text(parent, Tokenizer(None, None), **FEW)
    assert len(set(random.ids_ST[:, 0])) > 8
    assert random.facts["first_token"] is None


def test_after_an_end_comes_the_beginning_that_the_tokenizer_adds(parent):
    ids = sample_text(parent, Tokenizer(1, None), **FEW).ids_ST
    common = int(np.bincount(ids[:, 1:-1].ravel()).argmax())  # play that this frequent token ends documents
    forced = sample_text(parent, Tokenizer(1, common, adds=True), **FEW).ids_ST
    after = forced[:, 1:][forced[:, :-1] == common]
    assert len(after) > 0
    assert set(after) == {1}
    free = sample_text(parent, Tokenizer(1, common), **FEW).ids_ST
    assert np.array_equal(free, ids)


@pytest.mark.parametrize("variant", ["phi3-window", "granite", "gemma", "qwen3-tied"])
def test_every_family_runs_as_transformers_loads_it(tmp_path, variant):
    model = opened(make_dense(tmp_path, variant, num_hidden_layers=2))
    text = sample_text(model, Tokenizer(1, 2), **FEW, temperature=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        greedy = whole(torch.from_numpy(text.ids_ST[:1])).logits.argmax(-1)
    assert np.array_equal(greedy[0, :-1], text.ids_ST[0, 1:])


def test_bfloat16_and_progress(parent):
    seen: list[Progress] = []
    text = sample_text(parent, Tokenizer(1, 2), **FEW, dtype=torch.bfloat16, batch_size=10, progress=seen.append)
    assert text.facts["dtype"] == "bfloat16"
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (256, 256, "token")
    assert all(a.done < b.done for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_tokens": 255}, "num_tokens is 255"),
        ({"length": 1}, "sequences is 1, but must be from 2 to 64"),
        ({"length": 65}, "sequences is 65"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(parent, given, message):
    with pytest.raises(UsageError, match=message):
        sample_text(parent, Tokenizer(1, 2), **(FEW | given))


def test_a_foreign_special_token_is_refused(parent):
    with pytest.raises(CheckpointError, match="special token 128 is not among the model's 128 tokens"):
        sample_text(parent, Tokenizer(128, 2), **FEW)


def test_broken_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    make_dense(tmp_path, num_hidden_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlamaMoeError, match="logits are not finite"):
        sample_text(opened(tmp_path), Tokenizer(1, 2), **FEW)


def test_tokenizer_of_a_folder(parent):
    tokenizer = open_tokenizer(parent.checkpoint)
    assert tokenizer("ab c")["input_ids"] == [68, 69, 3, 70]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("variant", ["llama", "qwen2"])  # of the latter transformers makes an empty one
def test_a_folder_without_tokenizer_is_refused(tmp_path, variant):
    folder = make_dense(tmp_path, variant, num_hidden_layers=1)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        open_tokenizer(opened(folder).checkpoint)


class File:
    """A checkpoint that is one file, with or without a vocabulary."""

    def __init__(self, path: Path, *, vocabulary: bool) -> None:
        self.path, self.config, self.vocabulary = path, {"model_type": "llama"}, vocabulary

    def save_tokenizer(self, out: Path) -> list[str]:
        (out / "generation_config.json").write_text("{}")
        if self.vocabulary:
            make_tokenizer(out)
        return sorted(path.name for path in out.iterdir())


def test_tokenizer_of_a_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"")
    assert open_tokenizer(File(path, vocabulary=True))("ab")["input_ids"] == [68, 69]
    with pytest.raises(CheckpointError, match=r"x\.gguf' holds no vocabulary"):
        open_tokenizer(File(path, vocabulary=False))
