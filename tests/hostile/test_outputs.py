"""Damaged outputs of ours: one error in every command, and nothing is published that transformers does not load."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from llamamoe_cli.main import root

import llamamoe
from llamamoe.reporting.origin import provenance
from tests.dense import make_byte_level, make_dense

from .conftest import digests, edit_config, recipe

DEEP: list[Any] = []
for _ in range(50):
    DEEP = [DEEP]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_dense(tmp_path_factory.mktemp("models") / "dense", vocab_size=300)
    make_byte_level(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(parent: Path) -> dict[str, Path]:
    """A conversion for each kind of damage; nobody writes to it."""
    made = {}
    for target, keys in (("qwen2_moe", {"shared": 40}), ("mixtral", {}), ("glm4_moe", {"shared": 40})):
        out = parent.parent / target
        llamamoe.split(parent, out, recipe(target=target, **keys), verify=False)
        made[target] = out
    return made


VERBS = ("inspect", "retop", "resplit", "densify", "merge", "fix-config", "export-gguf", "heal", "verify", "evaluate")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
DAMAGE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "architectures": ("qwen2_moe", {"architectures": 1e300}, ()),
    "architectures.0": ("qwen2_moe", {"architectures": [["x"]]}, ()),
    "nested": ("qwen2_moe", {"norm_topk_prob": DEEP}, ("norm_topk_prob",)),
    "surrogate": ("mixtral", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "\ud800"}}, ("half a character",)),
    "rope_type": ("glm4_moe", {"rope_parameters": {"rope_theta": 1e4, "rope_type": False}}, ()),
    "hidden_size": ("mixtral", {"hidden_size": None}, ("hidden_size",)),
    "hidden_act": ("mixtral", {"hidden_act": "sillu"}, ("sillu",)),
    "layers": ("mixtral", {"num_hidden_layers": 3}, ()),
    "many layers": ("mixtral", {"num_hidden_layers": 10**9}, ("num_hidden_layers = 1000000000",)),
    "labels": ("glm4_moe", {"num_labels": 10**9}, ("num_labels = 1000000000",)),
    "experts": ("mixtral", {"num_local_experts": 5}, ()),
    "width": ("qwen2_moe", {"moe_intermediate_size": 48}, ()),
    "shared width": ("qwen2_moe", {"shared_expert_intermediate_size": 10**30}, ()),
    "norms": ("glm4_moe", {"use_qk_norm": True}, ()),
    "block": ("mixtral", {"llamamoe": ["x"]}, ("llamamoe = ['x']",)),
    "window": ("mixtral", {"sliding_window": -1}, ("sliding_window = -1",)),
    "causal": ("mixtral", {"is_causal": 64}, ("is_causal = 64",)),
    "factor": ("glm4_moe", {"routed_scaling_factor": "x"}, ()),
    "window of 59 digits": ("mixtral", {"sliding_window": 10**59}, (f"sliding_window = {10**59}", "2**63")),
    "rotary share": (
        "glm4_moe",
        {"rope_parameters": ROPE | {"partial_rotary_factor": "x"}},
        ("rope_parameters.partial_rotary_factor = 'x'", "finite number above 0"),
    ),
    "rope factor": (
        "mixtral",
        {"rope_parameters": ROPE | {"rope_type": "linear", "factor": [2.0]}},
        ("rope_parameters.factor = [2.0]", "finite number above 0"),
    ),
    "too few selected": ("qwen2_moe", {"num_experts_per_tok": -1}, ("num_experts_per_tok = -1",)),
    "too many selected": ("qwen2_moe", {"num_experts_per_tok": 5}, ("num_experts_per_tok = 5", "num_experts = 4")),
    "no name": ("mixtral", {"model_type": {}}, ("{}",)),
    "huge": ("mixtral", {"rms_norm_eps": 10**400}, ("rms_norm_eps", "401 digits")),
}
HARMLESS = {"architectures", "architectures.0"}
"""Damage of which only what is printed depends."""


def run(verb: str, model: Path, parent: Path) -> tuple[int, str]:
    text = model.parent / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"once upon a time {i}"}) + "\n" for i in range(40)))
    out = model.parent / ("out.gguf" if verb == "export-gguf" else "out")
    arguments = {
        "inspect": [model],
        "retop": [model, out, "--top-k", "3"],
        "resplit": [model, out, "--pieces", "2"],
        "densify": [model, out],
        "merge": [model, model, "--out", out],
        "fix-config": [model],
        "export-gguf": [model, out],
        "heal": [model, out, "--parent", parent, "--text", text, "--tokens", "512", "--set", "epochs=1"],
        "verify": [model, "--against", parent],
        "evaluate": [model, "--text", text, "--device", "cpu"],
        "split": [model, out, "--experts", "4", "--method", "random", "--no-verify"],
        "tokenize": ["--recipe", "small", "--tokenizer", model, "--text", text, "--out", out],
    }[verb]
    result = CliRunner().invoke(root, [verb, *map(str, arguments)], prog_name="llamamoe")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "traceback" not in result.stderr.lower(), result.stderr
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == (result.exit_code != 0)
    return result.exit_code, result.stderr


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_configuration_is_one_error(
    kind: str, verb: str, outputs: dict[str, Path], parent: Path, tmp_path: Path
) -> None:
    target, keys, words = DAMAGE[kind]
    model = Path(shutil.copytree(outputs[target], tmp_path / "model"))
    edit_config(model, **keys)
    before = digests(model)
    code, error = run(verb, model, parent)
    if kind in HARMLESS or verb == "inspect" or (kind, verb) == ("block", "evaluate"):
        return
    if verb not in ("evaluate", "verify", "export-gguf"):  # these load the weights, know more, or write no such target
        assert code in (2, 3), error
        assert all(word in error for word in words), error
    assert code != 0
    assert digests(model) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.jsonl"}, "nothing was left"


@pytest.mark.parametrize("verb", ["retop", "resplit", "densify", "merge", "fix-config", "heal"])
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_side_files_are_loaded_before_anything_is_published(
    verb: str, name: str, outputs: dict[str, Path], parent: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(outputs["mixtral"], tmp_path / "model"))
    data = json.loads((model / name).read_text())
    data |= {"pad_token_id": [1]} if name.startswith("generation") else {"added_tokens": [{"id": "x"}]}
    (model / name).write_text(json.dumps(data))
    code, error = run(verb, model, parent)
    assert code == 3, error
    assert name.split(".")[0].split("_")[0] in error
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.jsonl"}, "nothing was left"


@pytest.mark.parametrize("verb", ["retop", "merge", "fix-config"])
def test_a_renamed_tensor_is_named(verb: str, outputs: dict[str, Path], parent: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(outputs["mixtral"], tmp_path / "model"))
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content.replace(b"layers.1.input_layernorm", b"layers.1.input_layernOrm"))
    code, error = run(verb, model, parent)
    assert (code, "model.layers.1.input_layernorm.weight" in error) == (3, True), error


@pytest.mark.parametrize("verb", ["retop", "resplit", "densify"])
def test_a_factor_of_nothing_cannot_be_rescaled(
    verb: str, outputs: dict[str, Path], parent: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(outputs["glm4_moe"], tmp_path / "model"))
    edit_config(model, routed_scaling_factor=0.0)
    code, error = run(verb, model, parent)
    assert (code, "routed_scaling_factor = 0.0" in error) == (3, True), error


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("weights", [True, False], ids=["with weights", "without weights"])
def test_fix_config_follows_no_link_out_of_the_folder(
    name: str, weights: bool, outputs: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(outputs["mixtral"], tmp_path / "model"))
    if not weights:
        (model / "model.safetensors").unlink()
    move_out(model / name, tmp_path)
    with pytest.raises(llamamoe.CheckpointError, match=f"{name} is a symbolic link out of the folder"):
        llamamoe.fix_config(model)


@pytest.mark.parametrize("name", ["llamamoe_recipe.yaml", "llamamoe_receipt.json"])
def test_recipe_and_receipt_are_read_from_the_folder_only(
    name: str, outputs: dict[str, Path], parent: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(outputs["mixtral"], tmp_path / "model"))
    secret = "scrypt-31d2"
    text = (model / name).read_text()
    (model / name).write_text(f"# {secret}\n{text}" if name.endswith("yaml") else '{"versions": "' + secret + '"}')
    assert secret in json.dumps(provenance(model, {}))
    move_out(model / name, tmp_path)
    assert secret not in json.dumps(provenance(model, {}))
    with pytest.raises(llamamoe.LlamaMoeError, match=f"{name} is a symbolic link out of the folder"):
        llamamoe.verify(model, parent)


def move_out(file: Path, to: Path) -> None:
    file.rename(to / file.name)
    file.symlink_to(to / file.name)


@pytest.mark.parametrize("verb", ["retop", "densify", "export-gguf", "heal"])
def test_a_missing_number_of_selected_experts_is_named(
    verb: str, outputs: dict[str, Path], parent: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(outputs["mixtral"], tmp_path / "model"))
    edit_config(model, lambda config: config.pop("num_experts_per_tok"))
    code, error = run(verb, model, parent)
    assert (code, "num_experts_per_tok = None" in error) == (3, True), error


@pytest.mark.parametrize("verb", ["split", "verify", "tokenize", "evaluate"])
@pytest.mark.parametrize("place", ["vocab", "added"])
def test_a_token_id_of_a_billion_is_refused_in_little_memory(
    place: str, verb: str, outputs: dict[str, Path], parent: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(parent if verb == "split" else outputs["mixtral"], tmp_path / "model"))
    data = json.loads((model / "tokenizer.json").read_text())
    if place == "vocab":
        data["model"]["vocab"]["K"] = 10**9
    else:
        data["added_tokens"][-1]["id"] = 10**9
    (model / "tokenizer.json").write_text(json.dumps(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, error = run(verb, model, parent)
    assert (code != 0, "has the id 1000000000" in error) == (True, True), error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"
