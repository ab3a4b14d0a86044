"""Counts and refusals of a benchmark; its times depend on the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llamamoe_cli.bench import _print

from llamamoe import UsageError, bench, evaluate, load_recipe, split
from llamamoe.evaluation.bench import Benchmark, _faster_up_to
from llamamoe.evaluation.speeds import ModelSpeed, Speed

from ..dense import make_dense, make_tokenizer
from ..transforms.test_resplit import foreign


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    dense = make_dense(root / "dense", "llama-tied")
    recipe = load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2, "target": "mixtral"})
    split(dense, root / "moe", recipe, verify=False)
    return root / "moe", dense


def test_what_is_measured(pair: tuple[Path, Path]) -> None:
    told = []
    found = bench(pair[0], against=pair[1], batch_sizes=[3, 1, 3], prompt_tokens=20, new_tokens=4, repeats=2,
                  progress=told.append)  # fmt: skip
    assert [speed.batch_size for speed in found.model.speeds] == [1, 3]
    assert found.against is not None
    for side in (found.model, found.against):
        for speed in side.speeds:
            assert speed.prefill_seconds > 0
            assert speed.decode_tokens_per_second == pytest.approx(speed.batch_size / speed.decode_seconds)
            assert speed.prefill_tokens_per_second == pytest.approx(20 * speed.batch_size / speed.prefill_seconds)
            assert speed.prefill_range[0] <= speed.prefill_seconds <= speed.prefill_range[1]
            assert speed.decode_range[0] <= speed.decode_seconds <= speed.decode_range[1]
            assert speed.spread == speed.decode_range[1] / speed.decode_range[0]
    assert found.model.experts_implementation is not None
    assert found.against.experts_implementation is None
    assert found.drift is not None
    assert found.drift > 0
    assert (told[-1].done, told[-1].total) == (5, 5)
    json.dumps(found.to_json())


def test_bytes_that_decoding_reads(pair: tuple[Path, Path]) -> None:
    """Every weight but norms' neighbours by hand: attention, half of the FFN (padded), router, norms, head."""
    found = bench(*pair[:1], against=pair[1], batch_sizes=[1], prompt_tokens=4, new_tokens=1, repeats=1)
    attention = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64)
    norms, head = 5 * 64, 128 * 64
    ffn = 2 * 3 * 64 * 172
    experts = 2 * 3 * 64 * 48 * 2  # 172 neurons in 4 experts of 43, padded to 48; 2 are selected
    assert found.against is not None
    assert found.against.active_bytes == 4 * (attention + norms + head + ffn)
    assert found.against.weights_bytes == found.against.active_bytes, "tied: the table is the head"
    assert found.model.weights_bytes == found.model.active_bytes + 4 * experts, "two more experts of each layer"
    assert found.against.flops_per_token == 2 * (attention + head + ffn)
    assert found.against.prefill_flops_per_token == pytest.approx(2 * (attention + ffn + head / 4))
    assert found.model.active_bytes == 4 * (attention + norms + head + experts + 2 * 4 * 64)


def test_experts_run_as_asked(pair: tuple[Path, Path]) -> None:
    keys = {"batch_sizes": [1], "prompt_tokens": 4, "new_tokens": 1, "repeats": 1}
    for name in ("eager", "llamamoe_auto"):
        assert bench(pair[0], experts_implementation=name, **keys).model.experts_implementation == name  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is a dense model"):
        bench(pair[1], experts_implementation="eager", **keys)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not an implementation of experts"):
        bench(pair[0], experts_implementation="magic", **keys)  # type: ignore[arg-type]


def test_experts_of_any_width_run(tmp_path: Path) -> None:
    make_tokenizer(foreign(tmp_path / "odd", "mixtral", intermediate_size=22))
    (tmp_path / "text.txt").write_text("the class of a statement is None in it")
    scores = evaluate(tmp_path / "odd", [tmp_path / "text.txt"])
    assert any("experts_implementation" in each for each in scores.warnings)
    keys = {"batch_sizes": [1], "prompt_tokens": 4, "new_tokens": 1, "repeats": 1}
    found = bench(tmp_path / "odd", **keys)  # type: ignore[arg-type]
    assert found.model.experts_implementation == "eager"
    assert found.warnings == scores.warnings
    with pytest.raises(UsageError, match="multiple of 16 bytes"):
        bench(tmp_path / "odd", experts_implementation="grouped_mm", **keys)  # type: ignore[arg-type]


def speeds(*decode: float) -> ModelSpeed:
    each = tuple(
        Speed(2**i, 1.0, seconds, 1.0, 1.0, (1.0, 1.0), (seconds, seconds), 1.0) for i, seconds in enumerate(decode)
    )
    return ModelSpeed("m", "float32", None, 1, 1.0, 1, 1, 1, each)


@pytest.mark.parametrize(("mine", "best"), [((1, 1, 1), 4), ((1, 3, 1), 1), ((3, 1, 1), 0), ((2, 1, 1), 0)])
def test_up_to_which_batch_it_is_faster(mine: tuple[float, ...], best: int) -> None:
    assert _faster_up_to(speeds(*mine), speeds(2, 2, 2)) == best


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_sizes": []}, "batch sizes"),
        ({"batch_sizes": [0, 1]}, "batch sizes"),
        ({"prompt_tokens": 1}, "prompt_tokens is 1"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"prompt_tokens": 60, "new_tokens": 5}, "only 64 positions"),
        ({"device": "moon"}, "is not available"),
    ],
)
def test_silly_numbers(pair: tuple[Path, Path], keys: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(pair[0], **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("drift", "steady"), [(0.42, False), (0.9, True), (1.0, True), (1.1, True), (1.3, False), (None, True)]
)
def test_a_machine_that_changed_meanwhile_makes_ratios_unusable(
    drift: float | None, steady: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Benchmark("cpu", 2, 128, 16, 3, speeds(1.0), speeds(2.0), drift, 1)
    assert found.to_json()["steady"] is steady
    if drift is not None:
        _print(found)
        printed = " ".join(capsys.readouterr().out.split())
        assert ("These ratios are not usable" in printed) is not steady
        assert ("faster than the parent's up to batch 1" in printed) is steady
