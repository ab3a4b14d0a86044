r"""Continue pretraining a converted model by Megatron-Bridge, and write the trained weights back as a checkpoint.

    torchrun --nproc_per_node 8 megatron_bridge.py train MODEL TOKENS RUN train.train_iters=2000 model.pipeline_model_parallel_size=2
    python megatron_bridge.py export RUN/checkpoints/iter_0002000 MODEL OUT

MODEL is written by ``llamamoe split --require megatron --router-scale soft``, TOKENS by ``llamamoe export-tokens``. The settings
are in ``megatron_bridge.yaml`` beside this file (or ``--settings FILE``); ``KEY=VALUE`` overrides one. Started again, it
continues from the newest checkpoint in RUN. Written for megatron-bridge 0.3.1 and megatron-core 0.16.1; imports nothing
of llamamoe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "llamamoe_recipe.yaml")


def blend(folder: Path) -> tuple[list[str], list[float]] | None:
    """Return the datasets of one split and their weights, which are the sizes of their tokens; None without any."""
    files = sorted(folder.glob("*.bin"))
    return ([str(file.with_suffix("")) for file in files], [file.stat().st_size for file in files]) if files else None


def check_router(model: Path) -> None:
    """Refuse a router with logits so small that the first step would overwrite its choices."""
    facts = json.loads((model / "config.json").read_text()).get("llamamoe", {})
    if facts.get("router_scale") == "hard":
        sys.exit(
            f"error: the router of '{model}' is hard: its rows are smaller than one step of the optimiser, which would "
            "overwrite its choices. Convert with --router-scale soft."
        )


def configure(model: Path, tokens: Path, run: Path, settings: Path, overrides: Sequence[str]) -> Any:
    """Return Megatron-Bridge's configuration of the run.

    Args:
        model: A checkpoint of one of the architectures that Megatron-Bridge maps.
        tokens: A folder with ``train/DOMAIN.bin`` and ``.idx``, and ``validation`` likewise if some are held out.
        run: The folder for checkpoints and logs.
        settings: A YAML file with keys of Megatron-Bridge's ``ConfigContainer``.
        overrides: ``KEY=VALUE``, in Hydra's syntax.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.training import config as parts
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    # The weights are read when the model is built; a checkpoint in RUN is loaded after them.
    provider = AutoBridge.from_hf_pretrained(str(model)).to_megatron_provider(load_weights=True)
    checkpoints = str(run / "checkpoints")
    config = parts.ConfigContainer(
        model=provider,
        train=parts.TrainingConfig(train_iters=1, global_batch_size=1, micro_batch_size=1),
        optimizer=parts.OptimizerConfig(optimizer="adam", adam_beta2=0.95, bf16=True),
        scheduler=parts.SchedulerConfig(),
        ddp=parts.DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=parts.GPTDatasetConfig(
            seq_length=1, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, random_seed=1234,
            dataloader_type="single",
        ),
        logger=parts.LoggerConfig(log_interval=10, tensorboard_dir=str(run / "logs")),
        tokenizer=parts.TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(model)),
        checkpoint=parts.CheckpointConfig(save=checkpoints, load=checkpoints, ckpt_format="torch_dist"),
        mixed_precision="bf16_mixed",
    )  # fmt: skip
    process_config_with_overrides(config, str(settings), list(overrides))
    config.dataset.seq_length = config.model.seq_length
    config.dataset.split = None
    config.dataset.blend_per_split = [blend(tokens / split) for split in ("train", "validation", "test")]
    if config.dataset.blend_per_split[0] is None:
        sys.exit(f"error: '{tokens}' has no train/*.bin. Write it with llamamoe export-tokens.")
    if config.dataset.blend_per_split[1] is None:
        config.train.eval_iters = 0
    return config


def train(args: argparse.Namespace) -> None:
    """Train on all GPUs that torchrun gives."""
    check_router(args.model)
    config = configure(args.model, args.tokens, args.run, args.settings, args.overrides)
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    pretrain(config, forward_step)


def keep_files(model: Path, out: Path) -> None:
    """Put the files of MODEL that training does not change in the place of those that transformers wrote to OUT.

    Its configuration loads in transformers 4.57, too, and by its recipe ``llamamoe verify`` and a reader see what it is.
    """
    for name in KEPT:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)


def export(args: argparse.Namespace) -> None:
    """Write a checkpoint of Megatron in the format of MODEL, whose configuration and tokenizer it keeps."""
    from megatron.bridge import AutoBridge

    if args.out.exists():
        sys.exit(f"error: '{args.out}' exists. Choose another OUT.")
    AutoBridge.from_hf_pretrained(str(args.model)).export_ckpt(str(args.checkpoint), str(args.out), strict=True)
    keep_files(args.model, args.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train, under torchrun")
    command.add_argument("model", type=Path, metavar="MODEL")
    command.add_argument("tokens", type=Path, metavar="TOKENS")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--settings", type=Path, default=Path(__file__).with_suffix(".yaml"), metavar="FILE")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    command.set_defaults(call=train)
    command = commands.add_parser("export", help="write a checkpoint of Megatron back, on the CPU")
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command.add_argument("model", type=Path, metavar="MODEL")
    command.add_argument("out", type=Path, metavar="OUT")
    command.set_defaults(call=export)
    args = parser.parse_args(arguments)
    args.call(args)


if __name__ == "__main__":
    main()
