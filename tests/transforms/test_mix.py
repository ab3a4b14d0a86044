"""Several models as experts: copies compute the model, an expert alone computes its model, and nothing else is let through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from llamamoe_cli.main import root
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe import CheckpointError, RefusedError, UsageError, VerificationError, load_mix_recipe, mix
from llamamoe.checkpoint.out_folder import DERIVED_FILE
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.transforms.mixing.experts import MixTensors
from tests.dense import FFN_TARGETS, make_dense, variant_for
from tests.transforms.test_merge import stop_at

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a model of which only the FFNs were trained, and two of which all was."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: make_dense(folder / name, seed=i) for i, name in enumerate(("base", "all", "more"))}
    made["ffn"] = shutil.copytree(made["base"], folder / "ffn")
    model = AutoModelForCausalLM.from_pretrained(made["base"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    model.save_pretrained(made["ffn"])
    return made


def recipe(*experts: Path, **keys: Any) -> llamamoe.MixRecipe:
    return load_mix_recipe(given={"experts": [str(path) for path in experts], "target": "mixtral", **keys})


def logits(model: Path | Any, **keys: Any) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, **keys) if isinstance(model, Path) else model
    with torch.no_grad():
        found: torch.Tensor = loaded(IDS).logits
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# ---- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FFN_TARGETS)
def test_copies_of_a_model_compute_it_at_every_top_k(target: str, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", variant_for(target), num_hidden_layers=1)
    found = mix(dense, tmp_path / "out", recipe(dense, dense, dense, target=target))
    wanted = logits(dense)
    for top_k in (1, 2, 3):
        assert apart(logits(found.out, **{found.plan.layout.target.top_k_key: top_k}), wanted) < 1e-5
    assert [each["is_the_model"] for each in found.receipt["verification"]["experts"]] == [True] * 3


@pytest.mark.parametrize("target", FFN_TARGETS)
def test_every_expert_is_verified_in_every_target(target: str, tmp_path: Path) -> None:
    variant = variant_for(target)
    one, other = (make_dense(tmp_path / str(seed), variant, num_hidden_layers=1, seed=seed) for seed in (0, 1))
    checks = mix(one, tmp_path / "out", recipe(one, other, target=target)).receipt["verification"]["experts"]
    assert [each["is_the_model"] for each in checks] == [True, False]
    assert all(each["passed"] and each["equal_weights"] < 1e-5 and each["neurons_checked"] == 1 for each in checks)


def test_one_expert_alone_computes_its_model(models: dict[str, Path], tmp_path: Path) -> None:
    """In transformers' own class, with a router that selects the expert for every token."""
    base = models["base"]
    stages: set[str] = set()
    asked = recipe(models["ffn"], models["all"], base, top_k=1)
    found = mix(base, tmp_path / "out", asked, progress=lambda step: stages.add(step.stage.split(":")[0]))
    assert {each for each in stages if each.startswith("expert")} == {"expert 0", "expert 1", "expert 2"}
    checks = found.receipt["verification"]["experts"]
    assert [each["is_the_model"] for each in checks] == [True, False, True]
    own = AutoModelForCausalLM.from_pretrained(base)
    trained = AutoModelForCausalLM.from_pretrained(models["all"]).state_dict()
    own.load_state_dict({name: value for name, value in trained.items() if ".mlp." in name}, strict=False)
    mixed = AutoModelForCausalLM.from_pretrained(found.out)
    for expert, wanted in enumerate((logits(models["ffn"]), logits(own), logits(base))):
        for layer in mixed.model.layers:
            layer.mlp.gate.forward = lambda x, expert=expert: selecting(x, expert)
        assert apart(logits(mixed), wanted) < 1e-5, expert
        assert expert == 2 or apart(wanted, logits(base)) > 1e-2


def selecting(x_BSH: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = x_BSH.reshape(-1, x_BSH.shape[-1]).shape[0]
    return torch.zeros(count, 3), torch.ones(count, 1), torch.full((count, 1), expert)


def test_weights_are_those_of_the_models_bit_for_bit(models: dict[str, Path], tmp_path: Path) -> None:
    names = ("ffn", "all", "more")
    found = mix(models["base"], tmp_path / "out", recipe(*(models[n] for n in names), shard_size="200KB"), verify=False)
    out = {name: value for file in found.out.glob("*.safetensors") for name, value in load_file(file).items()}
    assert len(list(found.out.glob("*.safetensors"))) > 1
    base = load_file(models["base"] / "model.safetensors")
    assert all(torch.equal(out[name], value) for name, value in base.items() if ".mlp." not in name)
    for i, name in enumerate(names):
        dense = load_file(models[name] / "model.safetensors")
        for layer in range(2):
            for part, own in PARTS.items():
                stored = out[f"model.layers.{layer}.block_sparse_moe.experts.{i}.{part}.weight"]
                stored = stored[:, :172] if part == "w2" else stored[:172]  # then zero neurons
                assert torch.equal(stored, dense[f"model.layers.{layer}.mlp.{own}.weight"])
    rows = [out[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(2)]
    assert all(0.015 < float(each.std()) < 0.025 for each in rows)
    assert not torch.equal(*rows)


def test_each_matrix_is_read_once(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[tuple[str, str]] = Counter()
    read = SafetensorsCheckpoint.read
    monkeypatch.setattr(
        SafetensorsCheckpoint,
        "read",
        lambda self, name, rows=None: reads.update([(self.path.name, name)]) or read(self, name, rows),
    )
    for target in ("mixtral", "granitemoeshared"):  # experts apart, and stacked
        reads.clear()
        mix(models["base"], tmp_path / target, recipe(models["ffn"], models["all"], target=target), verify=False)
        assert set(reads.values()) == {1}
        assert sum(".mlp." in name for _, name in reads) == 2 * 2 * 3


# ---- files --------------------------------------------------------------------------------------------------------


def test_what_is_left_beside_the_weights(models: dict[str, Path], tmp_path: Path) -> None:
    for name, licence in (("base", "apache-2.0"), ("ffn", "mit")):
        shutil.copytree(models[name], tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    found = mix(tmp_path / "base", tmp_path / "out", recipe(tmp_path / "ffn", models["all"], seed=3))
    receipt = json.loads((found.out / DERIVED_FILE).read_text())
    assert (receipt["made_by"], receipt["base"], receipt["experts"]) == ("mix", "base", ["ffn", "all"])
    assert receipt["recipe"]["seed"] == 3
    assert receipt["verification"]["passed"]
    block = json.loads((found.out / "config.json").read_text())["llamamoe"]
    assert (block["method"], block["parity"], block["num_experts"]) == ("mix", "none", 2)
    assert block["mix"][0]["experts"] == ["ffn", "all"]
    card = (found.out / "README.md").read_text()
    assert "the FFNs of `ffn`, `all`" in card
    assert "apache-2.0, mit" in card
    with pytest.raises(RefusedError, match="by `llamamoe mix`, which"):
        llamamoe.verify(found.out, tmp_path / "base")
    with pytest.raises(RefusedError, match="several dense FFNs"):
        llamamoe.densify(found.out, tmp_path / "dense")
    assert llamamoe.retop(found.out, tmp_path / "one", 1).where == "nowhere"


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_a_stop_leaves_nothing_half_written_and_resume_ends_alike(
    unit: int, models: dict[str, Path], tmp_path: Path
) -> None:
    asked = recipe(models["ffn"], models["all"])
    mix(models["base"], tmp_path / "whole", asked, verify=False)
    with pytest.raises(KeyboardInterrupt):
        mix(models["base"], tmp_path / "out", asked, verify=False, progress=stop_at(unit))
    assert not (tmp_path / "out").exists()
    with pytest.raises(RefusedError, match="other"):
        mix(models["base"], tmp_path / "out", recipe(models["all"], models["ffn"]), resume=True)
    mix(models["base"], tmp_path / "out", asked, verify=False, resume=True)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in names)


def test_an_expert_in_the_wrong_place_does_not_pass(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_model = MixTensors._of_model
    monkeypatch.setattr(MixTensors, "_of_model", lambda self, layer, index: of_model(self, layer, 1 - index))
    with pytest.raises(VerificationError, match="layer 0"):
        mix(models["base"], tmp_path / "out", recipe(models["ffn"], models["all"]))
    assert not (tmp_path / "out").exists()


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "called"), [("base", "BASE"), ("all", "expert 1")])
def test_an_out_in_a_model_names_the_argument(name: str, called: str, models: dict[str, Path]) -> None:
    with pytest.raises(RefusedError, match=rf"and {called} \(.*{name}\) must not contain each other"):
        mix(models["base"], models[name] / "out", recipe(models["ffn"], models["all"]))


@pytest.mark.parametrize(
    ("variant", "keys", "words"),
    [
        ("llama", {"hidden_size": 32}, ("hidden_size is 64 in", "but 32 in", "other/config.json")),
        ("llama", {"intermediate_size": 96}, ("intermediate_size is 172 in", "but 96 in")),
        ("llama", {"num_hidden_layers": 3}, ("num_hidden_layers is 2 in", "but 3 in")),
        ("llama", {"vocab_size": 130}, ("vocab_size is 128 in", "but 130 in", "resize_token_embeddings(128)")),
        ("llama-llama3-rope", {}, ("rope_parameters is", "llama3", "rotated differently")),
        ("qwen2", {}, ("model_type is 'llama' in", "but 'qwen2' in", "fine-tuned copies of BASE")),
    ],
)
def test_models_that_differ_are_refused_by_key(
    variant: str, keys: dict[str, Any], words: tuple[str, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    other = make_dense(tmp_path / "other", variant, **keys)
    with pytest.raises(RefusedError) as found:
        llamamoe.plan_mix(models["base"], recipe(models["ffn"], other))
    assert all(word in f"{found.value}\n{found.value.hint}" for word in words), f"{found.value}\n{found.value.hint}"
    assert "None, None" not in str(found.value)


@pytest.mark.parametrize("keys", [{"num_local_experts": 3}, {"text_config": {"model_type": "llama"}}])
def test_a_model_that_is_not_dense_is_named(keys: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(models["ffn"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(CheckpointError, match=r"^expert 1 \(--expert .*other\): config\.json: ") as refused:
        llamamoe.plan_mix(models["base"], recipe(models["ffn"], other))
    assert "Give the dense language model" in str(refused.value.hint)
    with pytest.raises(CheckpointError, match=r"^BASE \(.*other\): config\.json: "):
        llamamoe.plan_mix(other, recipe(models["ffn"], models["all"]))


def test_windows_that_differ_are_named_by_layer(tmp_path: Path) -> None:
    base = make_dense(tmp_path / "base", "ministral-windows")
    other = make_dense(tmp_path / "other", "ministral-windows", sliding_window=16)
    with pytest.raises(RefusedError, match=r"sliding_window of layer 1 is 8 in .*, but 16 in "):
        llamamoe.plan_mix(base, recipe(base, other, target="auto"))


def test_another_vocabulary_is_refused_by_token_in_the_plan(models: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(models["ffn"], tmp_path / "other"))
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(RefusedError, match=r"the token 'a' has the id 68 in .*, but the id 69 in "):
        llamamoe.plan_mix(models["base"], recipe(models["ffn"], other))


def test_other_ids_of_the_same_vocabulary_are_refused_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(models["ffn"], tmp_path / "other"))
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(RefusedError, match=r"the tokenizer of .*other differs from that of .*base"):
        mix(models["base"], tmp_path / "out", recipe(models["ffn"], other))
    assert not list(tmp_path.glob("out*"))


def test_what_does_not_change_ids_of_text_is_a_warning(models: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(models["ffn"], tmp_path / "other"))
    keys = json.loads((other / "tokenizer_config.json").read_text()) | {"pad_token": "<eos>"}
    (other / "tokenizer_config.json").write_text(json.dumps(keys))
    edited = json.loads((other / "config.json").read_text()) | {"max_position_embeddings": 128}
    (other / "config.json").write_text(json.dumps(edited))
    found = mix(models["base"], tmp_path / "out", recipe(models["ffn"], other), verify=False)
    assert any("pad_token" in each and "BASE's tokenizer is used" in each for each in found.warnings)
    assert any("max_position_embeddings is 128" in each for each in found.warnings)


def test_rounding_is_a_warning(models: dict[str, Path], tmp_path: Path) -> None:
    base = make_dense(tmp_path / "half", dtype=torch.bfloat16)
    found = mix(base, tmp_path / "out", recipe(base, models["all"]))
    assert any("the FFNs of" in each and "rounded to BF16" in each for each in found.warnings)
    assert found.receipt["verification"]["passed"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"experts": ["a"]}, r"experts: a mixture needs at least 2 experts, each with its model \(got 1\)"),
        ({"top_k": 3}, r"top_k: must not exceed the number of experts, 2 \(got 3\)"),
        ({"target": "mixtrel"}, "Did you mean 'mixtral'"),
        ({"router_std": 0}, "router_std"),
        ({"shard_size": "big"}, "shard_size"),
    ],
)
def test_invalid_recipes_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_mix_recipe(given={"experts": ["a", "b"], **keys})


# ---- the command --------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(root, [str(each) for each in ("mix", *arguments)], prog_name="llamamoe")


def test_the_command(models: dict[str, Path], tmp_path: Path) -> None:
    experts = ("--expert", models["ffn"], "--expert", models["all"])
    plan = run(models["base"], tmp_path / "out", *experts, "--dry-run")
    assert "2 of 2 per token" in plan.stdout
    assert "Nothing was written" in plan.stdout
    assert not list(tmp_path.iterdir())
    text = run(models["base"], tmp_path / "out", *experts, "--target", "mixtral").stdout
    assert "the model: logits differ by" in text
    assert "BASE with its FFNs: logits differ by" in text
    data = json.loads(run(models["base"], tmp_path / "two", *experts, "--set", "top_k=1", "--json").stdout)
    assert (data["top_k"], data["verification"]["passed"]) == (1, True)
    refused = run(models["base"], tmp_path / "two", *experts, "--dry-run")
    assert (refused.exit_code, "is not empty" in refused.stderr) == (3, True)
    lacking = run(models["base"], tmp_path / "three", "--expert", models["ffn"])
    assert lacking.exit_code == 2
    assert "--expert: a mixture needs at least 2 experts" in lacking.stderr
    texts = run(models["base"], *experts, "--text", "a.txt", "--dry-run").stderr
    assert "--text: give one for each of the 2 experts, in their order (got 1)" in texts


def test_the_plan_imports_neither_torch_nor_transformers(models: dict[str, Path]) -> None:
    line = ["mix", models["base"], "--expert", models["ffn"], "--expert", models["all"], "--dry-run"]
    script = (
        "import sys\nfrom llamamoe_cli.main import root\n"
        f"try: root.main({[str(each) for each in line]!r})\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- routers from prompts -----------------------------------------------------------------------------------------

PROMPTS: list[dict[str, list[str]]] = [
    {"positive_prompts": ["def f(x):", "for i in range(3)"], "negative_prompts": ["Once upon a time"]},
    {"positive_prompts": ["Solve x + 2 = 5"]},
]


def write_prompts(folder: Path, experts: list[dict[str, Any]] | None = None) -> Path:
    path = folder / "prompts.json"
    path.write_text(json.dumps({"experts": PROMPTS if experts is None else experts}))
    return path


@pytest.mark.parametrize("states", ["ffn_input", "layer_input"])
@pytest.mark.parametrize("tokens", ["mean", "last"])
def test_rows_are_the_formula_written_out(states: str, tokens: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Each prompt alone through the whole model in transformers, without padding."""
    keys = {
        "router": "hidden",
        "prompts": str(write_prompts(tmp_path)),
        "hidden_states": states,
        "hidden_tokens": tokens,
    }
    found = mix(models["base"], tmp_path / "out", recipe(models["ffn"], models["all"], **keys))
    assert found.receipt["verification"]["passed"]
    model, tokenizer = (c.from_pretrained(models["base"]) for c in (AutoModelForCausalLM, AutoTokenizer))

    def states_of(text: str) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        for layer in model.model.layers:
            where = layer if states == "layer_input" else layer.mlp
            where.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        with torch.no_grad():
            model(tokenizer("<bos>" + text, return_tensors="pt", add_special_tokens=False).input_ids)
        states_LTH = torch.stack(seen[: len(model.model.layers)])
        return states_LTH.mean(1) if tokens == "mean" else states_LTH[:, -1]

    stored = load_file(found.out / "model.safetensors")
    for i, each in enumerate(PROMPTS):
        row = torch.stack([states_of(text) for text in each["positive_prompts"]]).mean(0)
        if each.get("negative_prompts"):
            row = row - torch.stack([states_of(text) for text in each["negative_prompts"]]).mean(0)
        row = row / row.norm(dim=1, keepdim=True)
        for layer in range(2):
            have = stored[f"model.layers.{layer}.block_sparse_moe.gate.weight"][i]
            assert torch.allclose(have, row[layer], atol=1e-5)


def test_other_prompts_do_not_resume(models: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe(models["ffn"], models["all"], router="hidden", prompts=str(write_prompts(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        mix(models["base"], tmp_path / "out", asked, progress=lambda p: stop_at(1)(p) if p.stage == "mix" else None)
    write_prompts(tmp_path, [PROMPTS[1], PROMPTS[0]])
    with pytest.raises(RefusedError, match="other"):
        mix(models["base"], tmp_path / "out", asked, resume=True)
    write_prompts(tmp_path)
    assert mix(models["base"], tmp_path / "out", asked, resume=True).receipt["verification"]["passed"]


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (PROMPTS[:1], "prompts for 1 expert, not for 2"),
        (
            [PROMPTS[0], {"positive_prompts": []}],
            r"entry 1 \(.*all\): positive_prompts: must have at least 1 item, not 0",
        ),
        (
            [PROMPTS[0], {"positive_prompt": ["a"]}],
            r"entry 1 \(.*all\): positive_prompt: unknown key.* 'positive_prompts'",
        ),
        (
            [{"positive_prompts": ["a", "b"], "negative_prompts": ["b", "a", "a", "b"]}, PROMPTS[1]],
            r"positive and the negative prompts of expert 0 \(.*ffn\) are the same",
        ),
        ([PROMPTS[0], "text"], r"entry 1 \(.*all\): must be a mapping"),
    ],
)
def test_invalid_prompts_are_refused_in_the_plan(
    experts: list[dict[str, Any]], words: str, models: dict[str, Path], tmp_path: Path
) -> None:
    path = write_prompts(tmp_path, experts)
    asked = recipe(models["ffn"], models["all"], router="hidden", prompts=str(path))
    with pytest.raises(UsageError, match=words):
        llamamoe.plan_mix(models["base"], asked)
    flags = ("--expert", models["ffn"], "--expert", models["all"], "--prompts", path, "--dry-run")
    shown = run(models["base"], *flags)
    assert (shown.exit_code, "--expert" in shown.stderr, str(path) in shown.stderr) == (2, False, True)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ({"positive_prompts": ["a", "b"]}, {"positive_prompts": ["b", "a"]}, True),
        (
            {"positive_prompts": ["a"], "negative_prompts": ["a", "b"]},
            {"positive_prompts": ["a"], "negative_prompts": ["b"]},
            True,
        ),
        ({"positive_prompts": ["a", "b"]}, {"positive_prompts": ["a", "b", "b"]}, False),
    ],
)
def test_equal_prompts_of_two_experts_are_a_warning(
    one: dict[str, Any], other: dict[str, Any], alike: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    path = str(write_prompts(tmp_path, [one, PROMPTS[0], other]))
    asked = recipe(models["ffn"], models["all"], models["base"], router="hidden", prompts=path)
    told = "experts 0 and 2 have the same prompts: the router cannot tell them apart"
    assert (told in llamamoe.plan_mix(models["base"], asked).warnings) == alike


@pytest.mark.parametrize(("content", "words"), [("", "must hold a mapping .* not nothing"), (None, "cannot be read")])
def test_a_file_of_prompts_is_not_called_a_recipe(
    content: str | None, words: str, models: dict[str, Path], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "p.yaml").write_text(content)
    asked = recipe(models["ffn"], models["all"], router="hidden", prompts=str(tmp_path / "p.yaml"))
    with pytest.raises(UsageError, match=f"the prompts file '.*p.yaml' {words}"):
        llamamoe.plan_mix(models["base"], asked)


def test_prompts_and_router_belong_together(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the router hidden needs a file of prompts"):
        recipe(models["ffn"], models["all"], router="hidden")
    experts = ("--expert", models["ffn"], "--expert", models["all"], "--prompts", write_prompts(tmp_path))
    assert "hidden" in run(models["base"], tmp_path / "out", *experts, "--dry-run").stdout


def test_pieces_of_a_mix_are_counted_in_what_it_says_of_exactness(models: dict[str, Path], tmp_path: Path) -> None:
    mix(models["base"], tmp_path / "out", recipe(models["ffn"], models["base"], top_k=1))
    for source, pieces in (("out", 2), ("2", 3)):
        llamamoe.resplit(tmp_path / source, tmp_path / str(pieces), pieces)
    told = {name: json.loads((tmp_path / name / "config.json").read_text())["llamamoe"]["exactness"] for name in "23"}
    whole = "of one expert selected: they compute BASE with the FFNs of that expert's model"
    assert told["2"] == f"exact with the 2 pieces {whole}"
    assert (
        told["3"] == f"exact with the 6 pieces {whole}; down projections were rounded once more when experts were split"
    )
    assert apart(logits(tmp_path / "2"), logits(tmp_path / "out")) < 1e-5
    result = CliRunner().invoke(root, ["retop", str(tmp_path / "2"), str(tmp_path / "one"), "--top-k", "1"])
    assert "rounded  nothing" in result.stdout
    assert "exact" not in result.stdout
    assert "arbitrary ones run" in result.stdout


# ---- an averaged backbone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "shares"), [("average", (0.0, 0.5, 0.5)), ([2, 1, 1], (0.5, 0.25, 0.25)), ([0, 1, 0], (0.0, 1.0, 0.0))]
)
def test_all_but_the_ffns_is_the_average(
    backbone: Any, shares: tuple[float, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    found = mix(models["base"], tmp_path / "out", recipe(models["all"], models["more"], backbone=backbone))
    dense = [load_file(models[name] / "model.safetensors") for name in ("base", "all", "more")]
    out = load_file(found.out / "model.safetensors")
    for name in dense[0]:
        if ".mlp." not in name:
            exact = sum(share * each[name].double() for share, each in zip(shares, dense, strict=True))
            assert torch.allclose(out[name].double(), exact, rtol=1e-6, atol=1e-6), name
    checks = found.receipt["verification"]["experts"]
    assert [each["is_the_model"] for each in checks] == [backbone == [0, 1, 0], False]
    assert all(each["passed"] and each["equal_weights"] < 1e-5 for each in checks)
    assert found.receipt["recipe"]["backbone"] == backbone
    assert "averages of" in (found.out / "README.md").read_text()


def test_copies_average_to_themselves(models: dict[str, Path], tmp_path: Path) -> None:
    found = mix(models["base"], tmp_path / "out", recipe(*[models["all"]] * 3, backbone="average"))
    assert [each["is_the_model"] for each in found.receipt["verification"]["experts"]] == [True] * 3
    assert apart(logits(found.out), logits(models["all"])) < 1e-5


@pytest.mark.parametrize("backbone", ["mean", [1, 1], [0, 0, 0], [1, 1, -1]])
def test_invalid_weights_are_refused(backbone: Any, models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="backbone"):
        recipe(models["all"], models["more"], backbone=backbone)


def test_models_saved_in_different_ways_cannot_be_averaged(models: dict[str, Path], tmp_path: Path) -> None:
    tied = make_dense(tmp_path / "tied", "llama-tied")
    assert llamamoe.plan_mix(models["base"], recipe(models["all"], tied)).layout.target.name == "mixtral"
    with pytest.raises(RefusedError, match=r"lacks lm_head\.weight"):
        llamamoe.plan_mix(models["base"], recipe(models["all"], tied, backbone="average"))


def test_the_flag_takes_weights(models: dict[str, Path], tmp_path: Path) -> None:
    experts = ("--expert", models["all"], "--expert", models["more"], "--dry-run", "--json")
    data = json.loads(run(models["base"], tmp_path / "out", *experts, "--backbone", "0.5,0.25,0.25").stdout)
    assert data["recipe"]["backbone"] == [0.5, 0.25, 0.25]
    assert "averaged backbone" in data["exactness"]
    assert "nor a list" in run(models["base"], tmp_path / "out", *experts, "--backbone", "a,b").stderr
