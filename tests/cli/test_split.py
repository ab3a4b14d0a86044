"""``llamamoe split``: flags, recipes, the plan, what it prints and how it ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import llamamoe
from llamamoe.progress import Progress

from ..dense import make_dense
from .conftest import Run

RECEIPT_KEYS = {
    "out", "llamamoe", "source", "plan", "weights_sha256", "unit_sha256", "calibration", "alignment", "layers", "warnings", "versions", "verification", "run"
}  # fmt: skip


def plan(run: Run, *args: str | Path) -> dict[str, Any]:
    """The document that ``--dry-run --json`` prints."""
    found: dict[str, Any] = json.loads(run("split", *args, "--dry-run", "--json").stdout)
    return found


def test_summary_after_a_run(converted: tuple[Path, Result]) -> None:
    out, result = converted
    assert (out / "config.json").is_file()
    assert "mixtral, ready for transformers" in result.stdout
    assert "logits differ by" in result.stdout
    assert "until the model is trained" in result.stdout, "the honest line"
    assert result.stderr.startswith("convert: 2 of 2 layers"), "progress is on stderr, plain"
    assert "\x1b" not in result.output


def test_a_resumed_run_says_what_it_kept(dense: Path, tmp_path: Path, run: Run) -> None:
    class _StopError(Exception):
        pass

    def stop(step: Progress) -> None:
        if (step.stage, step.done) == ("convert", 1):
            raise _StopError

    recipe = llamamoe.load_recipe(given={"method": "random"})
    with pytest.raises(_StopError):
        llamamoe.split(dense, tmp_path / "out", recipe, progress=stop)
    result = run("split", dense, tmp_path / "out", "--method", "random", "--resume")
    assert result.stderr.startswith("resume: 1 of 2 layers kept\nconvert: 2 of 2 layers")
    assert re.search(r"took +\S+ s, after \S+ s in runs that were interrupted, at most", result.stdout)
    again = run("split", dense, tmp_path / "again", "--method", "random")
    assert "resume" not in again.stderr
    assert "in runs that were interrupted" not in again.stdout


def test_json_is_one_document_and_nothing_else_is_on_stdout(dense: Path, tmp_path: Path, run: Run) -> None:
    result = run("split", dense, tmp_path / "out", "--json", "--no-verify")
    data = json.loads(result.stdout)
    assert set(data) == RECEIPT_KEYS - {"verification"}
    assert data["out"] == str(tmp_path / "out")
    assert "convert" in result.stderr


def test_quiet_is_silent_but_not_about_warnings(dense: Path, tmp_path: Path, run: Run) -> None:
    assert run("split", dense, tmp_path / "a", "-q", "--no-verify", "--method", "random").output == ""
    result = run("split", dense, tmp_path / "b", "-q", "--no-verify", "--dtype", "bfloat16")
    assert result.stdout == ""
    assert "weights stored as F32 are rounded" in result.stderr
    assert "no calibration text: the method is cluster_shared" in result.stderr


def test_no_card(dense: Path, tmp_path: Path, run: Run) -> None:
    run("split", dense, tmp_path / "out", "-q", "--no-verify", "--no-card")
    assert not (tmp_path / "out" / "README.md").exists()


def test_every_flag_arrives_in_the_recipe(dense: Path, run: Run, tmp_path: Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text("some words " * 30)
    recipe = plan(
        run, dense, "--experts", "4", "--top-k", "1", "--method", "kmeans", "--shared", "2x", "--shared-by",
        "weight_norm", "--router", "zeros", "--router-scale", "soft", "--rescale", "unit", "--target", "qwen2_moe",
        "--dtype", "bfloat16", "--pad-to", "16", "--seed", "7", "--shard-size", "100KB", "--require", "4.57",
        "--no-card", "--repair", "scalar", "--repair-passes", "2", "--calibration", texts[0], "--calibration", texts[1],
        "--calibration-tokens", "1000", "--calibration-weights", "arxiv=1, book=2.5", "--calibration-length", "50",
        "--device", "cpu", "--compute-dtype", "bfloat16",
    )["recipe"]  # fmt: skip
    assert recipe == {
        "num_experts": 4, "top_k": 1, "prefer": None, "active": None, "method": recipe["method"], "shared": 64,
        "shared_by": {"name": "weight_norm", "options": {}}, "router": {"name": "zeros", "options": {}},
        "router_scale": "soft", "rescale": {"name": "unit", "options": {}}, "target": "qwen2_moe", "dtype": "bfloat16",
        "pad_to": 16, "keep_dense": [], "seed": 7, "shard_size": "100KB", "require": "4.57", "strict": False,
        "card": False, "repair": {"name": "scalar", "options": recipe["repair"]["options"]}, "repair_passes": 2,
        "calibration": [str(text) for text in texts], "calibration_tokens": 1000, "calibration_weights": {"arxiv": 1.0, "book": 2.5},
        "calibration_length": 50, "align": None, "device": "cpu", "compute_dtype": "bfloat16",
    }  # fmt: skip
    assert recipe["method"]["name"] == "kmeans"


def test_the_plan_says_what_quality_to_compare_with(dense: Path, run: Run) -> None:
    told = "It is not foretold"
    assert told in run("split", dense, "--dry-run", "--calibration", "auto").stdout
    assert told not in run("split", dense, "--dry-run").stdout
    assert (
        told not in run("split", dense, "--dry-run", "--calibration", "auto", "--experts", "4", "--top-k", "4").stdout
    )


def test_align_tokens_keeps_what_else_the_recipe_says_of_alignment(dense: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("align: {tokens: 5000, reach: 0.5}\n")
    arguments = ("--recipe", file, "--calibration", "auto", "--align-tokens", "6000")
    found = plan(run, dense, *arguments)
    assert (found["recipe"]["align"]["tokens"], found["recipe"]["align"]["reach"]) == (6000, 0.5)
    assert found["alignment"]["tokens"] == 6000
    text = run("split", dense, "--dry-run", *arguments).stdout
    assert "6,000 tokens, 1,024 a step: assignment, router and FFN weights of all layers together" in " ".join(
        text.split()
    )
    wrong = run("split", dense, "--dry-run", "--calibration", "auto", "--align-tokens", "5", code=2)
    assert "--align-tokens: must be greater than or equal to 1024 (got 5)" in wrong.stderr


def test_keep_dense(dense: Path, run: Run) -> None:
    for text, layers in (("0", [0]), ("-1", [1]), ("-2--2", [0]), ("1, -1", [1])):
        assert plan(run, dense, "--target", "qwen2_moe", "--keep-dense", text)["dense_layers"] == layers
    assert "names every layer" in run("split", dense, "--dry-run", "--keep-dense", "0-1", code=3).stderr
    for text, rule in (("a", "'a' is not a layer"), ("1-0", "ends before it begins"), ("0-9999999", "too long")):
        assert rule in run("split", dense, "--dry-run", "--keep-dense", text, code=2).stderr


def test_recipe_then_flags_then_set(dense: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("num_experts: 4\ntop_k: 1\nseed: 5\nmethod: {name: kmeans, max_iter: 9}\ncard: false\n")
    recipe = plan(run, dense, "--recipe", file)["recipe"]
    assert (recipe["num_experts"], recipe["top_k"], recipe["seed"], recipe["card"]) == (4, 1, 5, False)
    assert recipe["method"]["options"]["max_iter"] == 9
    args = ("--top-k", "3", "--seed", "6", "--set", "method.max_iter=3", "--set", "seed=8")
    recipe = plan(run, dense, "--recipe", file, *args)["recipe"]
    assert (recipe["num_experts"], recipe["top_k"], recipe["seed"]) == (4, 3, 8)
    assert recipe["method"]["options"]["max_iter"] == 3


def test_shipped_recipe_by_name(dense: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "four-experts.yaml").write_text("num_experts: 4\n")
    monkeypatch.setattr("importlib.resources.files", lambda package: {"llamamoe_recipes": tmp_path}[package])
    assert plan(run, dense, "--recipe", "four-experts")["num_experts"] == 4
    error = run("split", dense, "--dry-run", "--recipe", "for-experts", code=2).stderr
    assert "Did you mean 'four-experts'?" in error


def test_recipes_that_ship_are_found(dense: Path, run: Run) -> None:
    folder = Path(__file__).parents[2] / "recipes" / "split"
    files = list(folder.glob("*.yaml"))
    assert len(files) > 5
    for file in files:
        sizes = ["num_experts=4", "top_k=2", "keep_dense=[]", "target=auto", "shared=0"]
        if file.stem == "static":  # there are no experts, and shared neurons are all that is kept
            sizes = ["shared=0.5"]
        settings = [part for size in sizes for part in ("--set", size)]
        result = run("split", dense, "--dry-run", "--json", "--recipe", file.stem, "--calibration", "auto",
                     "--calibration-length", "32", *settings)  # fmt: skip
        assert json.loads(result.stdout)["dry_run"] is True


def test_missing_recipe_file(dense: Path, run: Run) -> None:
    assert "cannot be read" in run("split", dense, "--dry-run", "--recipe", "no/such.yaml", code=2).stderr


def test_a_recipe_of_another_command_is_named_as_such(dense: Path, run: Run) -> None:
    error = run("split", dense, "--dry-run", "--recipe", "smollm2_cpu", code=2).stderr
    assert "'smollm2_cpu' is a recipe of llamamoe pretrain, not of split" in error
    assert "calibrated" in error


def test_the_plan_tells_whether_llama_cpp_runs_the_result(dense: Path, run: Run) -> None:
    keys = ("split", dense, "--dry-run", "--method", "random")
    assert "llama.cpp (llamamoe export-gguf)" in run(*keys).stdout
    assert (
        "llama.cpp (llamamoe export-gguf)"
        in run(
            "split", dense, "--dry-run", "--method", "static", "--shared-by", "weight_norm", "--repair", "none"
        ).stdout
    )
    for other in (("--target", "glm4_moe"), ("--keep-dense", "0")):
        assert "export-gguf" not in run(*keys, *other).stdout


def test_dry_run_prints_the_plan_and_writes_nothing(dense: Path, tmp_path: Path, run: Run) -> None:
    before = sorted(p.stat().st_mtime_ns for p in dense.rglob("*"))
    text = run("split", dense, tmp_path / "out", "--dry-run", "--method", "random").stdout
    for expected in ("llama -> mixtral", "FFN active", "neurons for each token", "verification  about",
                     "expert width  24 neurons; the ", "zero neurons in all", "active per token", "FLOPs", "peak memory",
                     "1 file", "Notes", "Nothing was written"):  # fmt: skip
        assert expected in text
    assert list(tmp_path.iterdir()) == []
    assert sorted(p.stat().st_mtime_ns for p in dense.rglob("*")) == before
    assert "verification" not in run("split", dense, "--dry-run", "--no-verify").stdout
    more = run("split", dense, "--dry-run", "-v").stdout
    assert "num_experts: 8" in more
    assert "model.safetensors" in more


def test_dry_run_json_keys(dense: Path, run: Run) -> None:
    assert {"dry_run", "out", "target", "expert_width", "converted", "parent", "shards", "peak_memory_bytes",
            "warnings", "advice", "recipe"} <= set(plan(run, dense))  # fmt: skip


def test_dry_run_refuses_what_the_run_would_refuse(dense: Path, converted: tuple[Path, Result], run: Run) -> None:
    error = run("split", dense, converted[0], "--dry-run", code=3).stderr
    assert "is not empty" in error
    assert "It holds a complete result" in error
    assert "--force" in error
    run("split", dense, converted[0], "--dry-run", "--force")


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_an_interrupted_run_left_is_refused_first(more: tuple[str, ...], tmp_path: Path, run: Run) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    error = run("split", tmp_path / "no-source", tmp_path / "out", *more, code=3).stderr
    assert f"{left} is left from a run that was stopped" in error
    assert "--resume finishes it; --force starts again." in error
    assert "no-source" in run("split", tmp_path / "no-source", tmp_path / "out", *more, "--resume", code=3).stderr


def test_force_replaces(dense: Path, converted: tuple[Path, Result], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted[0], out)
    run("split", dense, out, "--no-verify", "-q", code=3)
    run("split", dense, out, "--no-verify", "-q", "--force", "--method", "random", "--experts", "2")
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 2


def test_usage_errors_name_flag_value_and_way_out(dense: Path, run: Run) -> None:
    for args, expected in (
        (("--method", "kmean"), ("--method: unknown splitter 'kmean'", "Did you mean 'kmeans'")),
        (("--target", "mixtrall"), ("unknown target 'mixtrall'", "Did you mean 'mixtral'?")),
        (("--experts", "1"), ("--experts:", "greater than or equal to 2", "got 1")),
        (("--experts", "four"), ("'--experts'", "'four'")),
        (("--router-scale", "sof"), ("--router-scale:", "'hard' or 'soft'", "got 'sof'")),
        (("--shared", "lots"), ("--shared:", "'lots'", "0.25")),
        (("--top-k", "9"), ("--top-k = 9", "num_experts = 8")),
        (("--set", "seeed=1"), ("seeed: unknown key", "Did you mean 'seed'")),
        (("--set", "seed"), ("key=value",)),
        (("--experts", "1", "--method", "x"), ("--experts:", "--method:")),
        (("--calibration-weights", "arxiv"), ("'arxiv' is not a domain and weight",)),
        (("--calibration-weights", "arxiv=x"), ("'arxiv=x' is not a domain and weight",)),
        (("--calibration-weights", "a=-1"), ("--calibration-weights:", "greater than or equal to 0")),
        (("--calibration-weights", "a=0,b=0"), ("--calibration-weights: all are zero",)),
        (("--calibration", "auto", "--calibration", "a.txt"), ("cannot be mixed",)),
        (("--calibration", "auto", "--calibration-weights", "a=1"), ("sampled text has no domains",)),
        (("--calibration-tokens", "10"), ("--calibration-tokens:", "greater than or equal to 256")),
        (("--repair", "least_square"), ("--repair:", "Did you mean 'least_squares'?")),
        (("--repair-passes", "5"), ("--repair-passes:", "less than or equal to 4")),
        (("--compute-dtype", "float16"), ("--compute-dtype:", "'float32' or 'bfloat16'")),
        (("--device", "/dev/null"), ("--device:",)),
        (("-q", "-v"), ("are mutually exclusive",)),
    ):
        error = run("split", dense, "--dry-run", *args, code=2).stderr
        for part in expected:
            assert part in error, (args, error)
    assert "OUT" in run("split", dense, code=2).stderr


def test_refusals_exit_with_3(dense: Path, tmp_path: Path, run: Run) -> None:
    assert "does not exist" in run("split", tmp_path / "none", "out", code=3).stderr
    assert "qwen3_moe" in run("split", dense, "--dry-run", "--target", "qwen3_moe", code=3).stderr
    assert "--strict refuses" in run("split", dense, "--dry-run", "--strict", "--dtype", "float16", code=3).stderr


# ---- calibration ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a small calibrated conversion."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the cat sat on a mat, and it rained in May. " * 20)
    return (
        "--method", "cluster_shared", "--shared-by", "power", "--router", "ridge", "--repair", "least_squares", "--experts",
        "4", "--calibration", str(text), "--calibration-tokens", "320", "--calibration-length", "32", "--device", "cpu",
    )  # fmt: skip


def test_dry_run_tells_what_calibration_costs(dense: Path, run: Run, calibrated: tuple[str, ...]) -> None:
    text = run("split", dense, "--dry-run", *calibrated).stdout
    for expected in ("repair            least_squares", "320 tokens in sequences of 32", "--shared-by power, --router ridge",
                     "memory-mapped files", "calibration time  about", "not exact, on purpose: the repair",
                     "a factor of 4 in the experts' down projections makes up for router weights of about 1/4"):  # fmt: skip
        assert expected in text
    found = plan(run, dense, *calibrated)["calibration"]
    assert {"tokens", "sequence_length", "needed_by", "hidden_state_bytes", "ffn_inputs_in", "flops_per_layer", "flops",
            "reference_flops_per_second", "seconds_at_reference"} <= set(found)  # fmt: skip
    assert plan(run, dense)["calibration"] is None


def test_a_dry_run_of_calibration_imports_nothing_heavy(dense: Path, calibrated: tuple[str, ...]) -> None:
    script = (
        "import sys\nfrom llamamoe_cli.main import root\n"
        f"try: root.main({['split', str(dense), '--dry-run', *calibrated]!r}, prog_name='llamamoe')\n"
        "except SystemExit as exit: assert exit.code == 0, exit.code\n"
        "assert not {'torch', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_size_of_the_text_bounds_the_cost_of_calibration(
    dense: Path, tmp_path: Path, run: Run, calibrated: tuple[str, ...]
) -> None:
    arguments = [*calibrated[:-6], "--calibration-tokens", "1000M", "--calibration-length", "32", "--device", "cpu"]
    text = run("split", dense, tmp_path / "out", "--dry-run", *arguments).stdout
    assert "at most 864 tokens (a token has a byte; the recipe allows 1,000,000,000)" in " ".join(text.split())
    found = plan(run, dense, *arguments)
    assert (found["calibration"]["tokens"], found["recipe"]["calibration_tokens"]) == (864, 10**9)


def test_summary_after_calibration(dense: Path, tmp_path: Path, run: Run, calibrated: tuple[str, ...]) -> None:
    result = run("split", dense, tmp_path / "out", "--no-verify", *calibrated)
    assert "ready for transformers" in result.stdout
    assert "of the dense output on the calibration text, in the median layer" in result.stdout
    assert "before repair" in result.stdout
    assert "neurons for each token" in result.stdout
    assert re.search(r"llamamoe export-gguf \S+/out \S+/out.gguf", result.stdout)
    assert re.search(r"llamamoe bench \S+/out --against \S+/dense --experts llamamoe_auto", result.stdout)
    assert re.search(r"llamamoe bench \S+/out --against \S+/dense --program llama.cpp", result.stdout)
    assert re.search(r"notes +\d notes in \S+/out/README.md", result.stdout)
    assert "bitsandbytes leaves the experts unquantised" not in result.stdout
    assert result.stderr.startswith("convert: ")
    measure = ("evaluate", tmp_path / "out", "-q", "--device", "cpu", "--context-length", "16", "--text")
    (warning,) = json.loads(run(*measure, calibrated[calibrated.index("--calibration") + 1], "--json").stdout)[
        "warnings"
    ]
    assert f"{tmp_path / 'out'} was fitted to 1 of the 1 documents" in warning
    printed = run(*measure, calibrated[calibrated.index("--calibration") + 1]).stdout
    assert "".join(warning.split()) in "".join(printed.split())  # a long path may be cut at any place


def test_a_refitted_model_is_said_to_differ_on_purpose(
    dense: Path, tmp_path: Path, run: Run, calibrated: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    text = " ".join(run("split", dense, out, *calibrated).stdout.split())
    assert "parity not meant to be: weights are refitted to the parent's output" in text
    assert "perplexity says what that costs" in text
    assert "No, on purpose: weights were refitted" in (out / "README.md").read_text()
    assert re.search(r"\| neurons of an FFN per token \| 172 \| \d+ \(\d+ %\) \|", (out / "README.md").read_text())
    verified = run("verify", out, "--against", dense).stdout
    assert "outputs are meant to differ from the parent's" in " ".join(verified.split())
    assert f"llamamoe evaluate {out} --against {dense} --text" in verified


def test_what_needs_text_says_how_to_give_it(dense: Path, run: Run) -> None:
    error = run("split", dense, "--dry-run", "--router", "ridge", code=3).stderr
    assert "needed by --router ridge" in error
    assert "--calibration PATH" in error
    error = run("split", dense, "--dry-run", "--method", "random", "--router", "oracle", code=3).stderr
    assert "only `llamamoe compare`" in error


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gone.txt", "No file, folder or glob matches"),
        ("*.jsonl", "No file, folder or glob matches"),
        ("empty", "holds no text"),
        ("text.doc", "Cannot tell the format of"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_text_that_is_not_there_is_told_before_anything_is_written(
    name: str, expected: str, dry: bool, dense: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.doc").write_text("a")
    before = sorted(tmp_path.iterdir())
    given = ("--calibration", tmp_path / name, *(["--dry-run"] if dry else []))
    assert expected in run("split", dense, tmp_path / "out", *given, code=2).stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_says_what_speed_to_expect(tmp_path: Path, run: Run) -> None:
    dense = make_dense(tmp_path, intermediate_size=1536)
    output = run("split", dense, "--dry-run", "--method", "random", "--prefer", "speed").output
    for words in (
        "Speed of a 1B model of the nearest measured shape",
        "times smaller, so that calling experts",
        "llama.cpp",
        "static pruning",
        "Experts used by a batch",
        "cannot be faster",
    ):
        assert words in " ".join(output.split()), words
    output = run("split", dense, "--dry-run", "--method", "random", "--experts", "3", "--top-k", "1").output
    assert "There is no measurement of a similar shape" in output


def test_padding_is_not_counted_as_neurons_of_the_parent(dense: Path, run: Run) -> None:
    text = run("split", dense, "--dry-run", "--method", "random", "--experts", "8", "--top-k", "2").stdout
    # 172 neurons in 8 experts of 24 places: a quarter of both runs
    assert "43 of 172 neurons for each token (25 %), and 5 zero neurons of padding" in text
