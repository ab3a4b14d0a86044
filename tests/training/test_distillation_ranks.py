"""All terms on two ranks, replicated and sharded, against one process that holds the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llamamoe.training.distillation import Distillation
from llamamoe.training.distillation_options import DistillOptions
from llamamoe.training.loss_head import LossHead, next_token_labels
from llamamoe.training.parent import Parent
from tests import forked  # noqa: F401  # what ranks have imported
from tests.training.tiny_moe import COMMON, input_ids, tiny_moe

TERMS = {"kl": {"top_m": 9}, "ffn": {}, "hidden": {"layers": [-1]}}
KINDS = ["ddp unused tied", "fsdp", "fsdp checkpointed tied"]


def _loss(model: Any, wrapped: Any, parent: Parent, ids: torch.Tensor) -> torch.Tensor:
    distillation = Distillation(DistillOptions.model_validate(TERMS), model, parent)
    batch = {"input_ids": ids, "use_cache": False}
    with distillation.recording(batch, 0, 1) as recorded:
        losses = LossHead(model, logits_at_once=300)(wrapped, batch, next_token_labels(ids), recorded.target)
    assert losses.kl_sum is not None
    return sum(recorded.sums().values(), start=losses.nll_sum + losses.kl_sum)


def _shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)


def _rank(rank: int, store: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(1)
    parent = Parent(LlamaForCausalLM(LlamaConfig(**{**COMMON, "intermediate_size": 24})))
    ids = input_ids(rows=4)
    for kind in KINDS:
        keys = {"tie_word_embeddings": "tied" in kind, "logits_scaling": 3.0}
        alone, model = tiny_moe("granitemoeshared", **keys), tiny_moe("granitemoeshared", **keys)
        whole = _loss(alone, alone, parent, ids)
        whole.backward()
        if "checkpointed" in kind:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ddp = torch.nn.parallel.DistributedDataParallel
        wrapped = ddp(model, find_unused_parameters="unused" in kind) if "ddp" in kind else _shard(model)
        mine = _loss(model, wrapped, parent, ids[2 * rank : 2 * rank + 2])
        (2 * mine).backward()  # gradients are averaged over ranks
        total = mine.detach().clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=0)
        for (name, own), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            gradient = own.grad.full_tensor() if hasattr(own.grad, "full_tensor") else own.grad
            torch.testing.assert_close(gradient, theirs.grad, rtol=1e-3, atol=1e-4, msg=f"{kind}: {name}")
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_losses_and_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_rank, (str(tmp_path / "store"),), nprocs=2, start_method="forkserver")
