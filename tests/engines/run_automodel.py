"""Compare a checkpoint in NeMo AutoModel with transformers, train it for two steps on a CPU, and write it back.

    python run_automodel.py MODEL BLEND INDEX OUT

Takes data, model and names of weights from NeMo AutoModel, as ``recipes/launch/automodel.yaml`` configures them; its
training loop needs a GPU, so the steps are taken here. Without a BLEND (-), only the logits are compared. Prints one line
of JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "launch" / "automodel.yaml"
STEPS, SEQUENCES, LENGTH = 2, 2, 24


def configuration(folder: Path, blend: str, index: Path) -> Any:
    """Return the recipe, read and checked by NeMo AutoModel, for this model and these tokens."""
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes._typed_config import RecipeConfig

    raw = load_yaml_config(str(RECIPE))
    raw.set_by_dotted("model.pretrained_model_name_or_path", str(folder))
    for key, value in {"local_batch_size": SEQUENCES, "global_batch_size": SEQUENCES, "max_steps": STEPS}.items():
        raw.set_by_dotted(f"step_scheduler.{key}", value)
    for name in ("dataset", "validation_dataset"):
        raw.set_by_dotted(f"{name}.paths", blend)
        raw.set_by_dotted(f"{name}.index_mapping_dir", str(index))
        raw.set_by_dotted(f"{name}.seq_length", LENGTH)
        raw.set_by_dotted(f"{name}.tokenizer.pretrained_model_name_or_path", str(folder))
    raw.set_by_dotted("model.backend.experts", "torch")  # grouped products need a GPU
    config = RecipeConfig(raw)
    for part in ("step_scheduler", "lr_scheduler", "optimizer", "checkpoint", "loss_fn", "clip_grad_norm"):
        assert getattr(config, part) is not None, part
    return config


def engine_model(folder: Path, backend: Any) -> Any:
    """Return NeMo AutoModel's own model with the checkpoint's weights, in float32."""
    from nemo_automodel._transformers.registry import ModelRegistry

    torch.cuda.current_device = lambda: 0  # it asks for the place of a table that is made anew below
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.float32
    model = ModelRegistry.model_arch_name_to_cls[config.architectures[0]].from_config(config, backend=backend)
    model.model.rotary_emb.device = torch.device("cpu")
    model.load_state_dict(model.state_dict_adapter.from_hf(stored(folder)))
    return model.float()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def train(model: Any, config: Any) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Take two steps with the recipe's data and loss; the losses and the first batch."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    tokenizer = config.dataset.tokenizer.instantiate()
    data, held_out = (
        each.dataset_config.build(tokenizer=tokenizer, training_schedule=each.dataset_build_schedule)
        for each in (config.dataloader, config.validation_dataloaders["default"])
    )
    assert len(held_out) >= SEQUENCES
    optimizer, loss_of = torch.optim.AdamW(model.parameters(), lr=1e-2), config.loss_fn.build()
    losses, batches = [], []
    for step in range(STEPS):
        rows = [data[step * SEQUENCES + row] for row in range(SEQUENCES)]
        ids, labels = (torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in ("input_ids", "labels"))
        batches.append((ids, labels))
        loss = loss_of(logits=model(ids).logits, labels=labels, num_label_tokens=labels.numel())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, *batches[0]


def main() -> None:
    """Compare, train and print."""
    warnings.filterwarnings("ignore")
    folder, blend, index, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    config = configuration(folder, blend, index)
    model = engine_model(folder, config.model.backend.instantiate())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, theirs.config.vocab_size - 3, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = theirs(ids).logits, model(ids).logits
    back, before = model.state_dict_adapter.to_hf(model.state_dict()), stored(folder)
    told: dict[str, Any] = {
        "difference": (wanted - found).abs().max().item(),
        "largest": wanted.abs().max().item(),
        "changed": sorted(n for n in before.keys() | back.keys() if not _same(before.get(n), back.get(n))),
    }
    if blend != "-":
        told["losses"], ids, labels = train(model, config)
        with torch.no_grad():
            logits = theirs(ids).logits
        told["transformers"] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*", "llamamoe_*"))
        weights = model.state_dict_adapter.to_hf(model.state_dict())
        save_file({n: t.contiguous().clone() for n, t in weights.items()}, out / "model.safetensors", {"format": "pt"})
        told["after"] = _difference(out, ids, model)
    sys.stdout.write(json.dumps(told) + "\n")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.float(), other.float())


def _difference(folder: Path, ids: torch.Tensor, model: Any) -> float:
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        return float((wanted - model(ids).logits).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    main()
