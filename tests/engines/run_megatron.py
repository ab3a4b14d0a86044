"""Read a checkpoint by Megatron-Bridge, run Megatron-Core's model on a CPU, and write the checkpoint back.

    python run_megatron.py FOLDER OUT

Writes OUT from what Megatron has read, and prints one line of JSON: the largest difference of a logit from transformers', the largest logit, the difference of
the mean losses, and the tensors that come back with other bits. Needs megatron-core, megatron-bridge and torch; what
they import for GPUs only (triton, Transformer Engine, einops) is replaced by stand-ins that compute nothing, and
everything here runs without them. It imports nothing of llamamoe.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ABSENT = (
    "datasets", "einops", "megatron.energon", "modelopt", "nvidia_resiliency_ext", "six", "tensorboard", "torch.utils.tensorboard",
    "transformer_engine", "triton", "wandb",
)  # fmt: skip
"""Packages that Megatron imports for GPUs, logs and images; nothing here calls them."""
LENGTH = 24
PLAIN: dict[str, Any] = {
    **dict.fromkeys(
        ("moe_permute_fusion", "moe_grouped_gemm", "bias_activation_fusion", "bias_dropout_fusion", "persist_layer_norm",
         "masked_softmax_fusion", "apply_rope_fusion", "gradient_accumulation_fusion", "moe_shared_expert_overlap", "bf16"),
        False,
    ),
    "use_cpu_initialization": True, "moe_token_dispatcher_type": "allgather", "mtp_num_layers": None,
    **dict.fromkeys(("params_dtype", "autocast_dtype", "pipeline_dtype"), torch.float32),
}  # fmt: skip
"""Settings of the model without kernels for GPUs."""


class StandIn(types.ModuleType):
    """A module of which any name can be imported."""

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for packages that are not here."""

    def find_spec(self, name, path=None, target=None):
        """Claim the packages that only a GPU needs."""
        absent = any(f"{name}.".startswith(f"{each}.") for each in ABSENT)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec):
        """Make an empty package."""
        module = StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        """Nothing is to be run."""


def prepare() -> None:
    """Let Megatron run on a CPU, in one process, by PyTorch's own operations."""
    torch.cuda.current_device = lambda: "cpu"
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    importlib.import_module("megatron.core")  # before the stand-ins: it looks for the packages itself

    sys.meta_path.insert(0, StandIns())
    importlib.import_module("megatron.bridge")
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    from megatron.core import parallel_state

    for module in list(sys.modules.values()):
        if module.__name__.startswith("megatron") and getattr(module, "HAVE_TE", False):
            module.HAVE_TE = False
    random.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()
    moe_utils.te_general_gemm = None
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def local_experts(bridge: type) -> None:
    """Name the weights of experts that are not grouped, which is how they are without a GPU."""
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, MegatronParamMapping

    theirs, ours, original = (
        "decoder.layers.*.mlp.experts.local_experts.*.",
        "model.layers.*.mlp.experts.*.",
        bridge.mapping_registry,
    )

    def registry(self):
        norm = "layers.*.input_layernorm.weight"  # with Transformer Engine it is part of the projection after it
        post = "layers.*.post_attention_layernorm.weight"
        return MegatronMappingRegistry(
            *original(self).mappings,
            GatedMLPMapping(
                megatron_param=f"{theirs}linear_fc1.weight", gate=f"{ours}gate_proj.weight", up=f"{ours}up_proj.weight"
            ),
            AutoMapping(megatron_param=f"{theirs}linear_fc2.weight", hf_param=f"{ours}down_proj.weight"),
            AutoMapping(megatron_param=f"decoder.{norm}", hf_param=f"model.{norm}"),
            AutoMapping(megatron_param="decoder.layers.*.pre_mlp_layernorm.weight", hf_param=f"model.{post}"),
        )

    bridge.mapping_registry = registry
    # It takes an expert's number from the name of a grouped weight, to gather those of all ranks; here is one.
    MegatronParamMapping.gather_from_ep_ranks = lambda self, weights, module, name: {str(name): weights}


def megatron_model(bridge):
    """Return Megatron-Core's model with the checkpoint's weights, in float32."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    provider = bridge.to_megatron_provider(load_weights=False)
    for key, value in PLAIN.items():
        setattr(provider, key, value)
    provider.transformer_layer_spec = lambda config, *_, **__: get_gpt_decoder_block_spec(
        config, use_transformer_engine=False
    )
    provider.finalize()
    model = provider.provide(pre_process=True, post_process=True).eval()
    bridge.load_hf_weights([model])
    return model


def main() -> None:
    """Compare and print."""
    warnings.filterwarnings("ignore")
    folder, out = map(Path, sys.argv[1:])
    prepare()
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(str(folder))
    local_experts(type(bridge._model_bridge))
    model = megatron_model(bridge)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, dense.config.vocab_size - 3, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        wanted = dense(ids).logits
        found = model(ids, torch.arange(LENGTH)[None].expand(2, -1), mask)[..., : wanted.shape[-1]]
    losses = [
        torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for each in (wanted, found)
    ]
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    back = dict(bridge.export_hf_weights([model], show_progress=False))
    changed = sorted(
        name for name in stored if name not in back or not torch.equal(stored[name].float(), back[name].float())
    )
    told = {
        "difference": (wanted - found).abs().max().item(),
        "largest": wanted.abs().max().item(),
        "loss_difference": (losses[0] - losses[1]).abs().item(),
        "changed": changed,
    }
    bridge.save_hf_pretrained([model], out, show_progress=False)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
