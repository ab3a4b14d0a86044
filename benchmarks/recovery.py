"""Measure how many tokens recover the loss of a conversion: held-out loss for two starts and three objectives.

    python benchmarks/recovery.py stories260k --source DENSE --train train.jsonl --validation valid.jsonl --work FOLDER
    python benchmarks/recovery.py smollm2 --source DENSE --train slimpajama/train --validation slimpajama/valid --work FOLDER

Every arm is one run of ``llamamoe pretrain`` in a folder of its own: a stopped study goes on where it was, bit for bit.
Tokens of calibration and healing count, too. The dense parent is trained by the same recipe as the control. Arms that
are finished stand in benchmarks/results/recovery-NAME.json, curves in recovery-NAME.svg, a table in recovery-NAME.md;
--draw only makes these two. Two processes may work on different arms (--only), once conversions and tokens are made.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

import llamamoe
from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.healing.heal import heal
from llamamoe.healing.recipe import load_heal_recipe
from llamamoe.training.metrics import read_lines
from llamamoe.training.recipe import load_pretrain_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.pictures import picture

RESULTS = Path(__file__).parent / "results"
FEW, FEW_TOKENS = " from 8k", 8192
"""The end of a start's name that is fitted to so few tokens."""
HEALS: dict[str, tuple[dict[str, Any], ...]] = {
    "heal": ({},),
    "heal on its inputs": ({"inputs": "model"},),
    "heal twice": ({}, {"inputs": "model"}),
}
"""Runs of heal one after another, as changes of a study's recipe: on the parent's hidden states, or on the model's own."""
FADING = {"start": 1.0, "end": 0.0, "share": 0.5}


@dataclass(frozen=True)
class Study:
    """One model's study: how it is split, and how every arm is trained.

    Attributes:
        random: Keys of a split's recipe: half of the neurons active, chosen at random.
        ours: The same of our best conversion.
        static: The same of the control: half of the neurons kept for every token, repaired in the same way.
        calibration: Its tokens of text.
        heal: Keys of a recipe of heal.
        pretrain: Keys of a recipe of pretrain, the same for all arms.
        arms: ``(start, objective)``; an objective is ``lm``, ``untrained``, or a name in ``distill``, after a name in
            ``HEALS`` and `` + `` if layers are healed; before ``, lr RATE`` if its rate is another.
        seeds: Of the split and of the training; arms with a rate of their own have the first.
        total: Tokens of every arm, those before its training included; None: all are trained as ``pretrain`` says.
        sampled: Tokens that the parent writes beside the real text.
        distill: What is learned from the parent, by objective.
        teacher: Keys of the parent's training before that, by objective; the run is shorter by its tokens.
        taught: Tokens on which the parent is trained before it is converted, by the recipe of all arms.
        optimizer: What each start is trained with in addition: a fitted router needs a smaller rate than a random one.
    """

    random: Mapping[str, Any]
    ours: Mapping[str, Any]
    static: Mapping[str, Any]
    calibration: int
    heal: Mapping[str, Any]
    pretrain: Mapping[str, Any]
    arms: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    total: int | None = None
    taught: int = 0
    sampled: int = 0
    distill: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    teacher: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    optimizer: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


HOW = ("lm", "fading distill", "heal + fading distill")
ALL_ARMS = tuple((start, how) for start in ("random", "ours") for how in HOW)
STUDIES = {
    "stories260k": Study(
        random={"num_experts": 8, "top_k": 4, "method": "random"},
        ours={
            "num_experts": 16, "top_k": 5, "shared": 44, "method": {"name": "token_clusters", "rounds": 3},
            "shared_by": "power", "router": "ridge", "repair": {"name": "distill", "epochs": 5},
            "calibration_length": 256,
        },
        static={
            "method": "static", "shared": 84, "shared_by": "power", "repair": {"name": "distill", "epochs": 5},
            "calibration_length": 256,
        },
        calibration=32768,
        heal={"tokens": 131072, "length": 256},
        pretrain={
            "steps": 300, "batch_size": 16, "micro_batch_size": 16,
            "optimizer": {"lr": 2e-3, "router_lr": 1e-3, "weight_decay": 0.01},
            "lr_schedule": {"warmup": 20, "min_ratio": 0.05},
            "losses": [{"name": "switch", "coefficient": 0.01}],
            "precision": {"compute": "float32", "parent": "float32"},
            "evaluate_every": 25, "log_every": 25, "save_every": 100,
        },
        arms=(*ALL_ARMS, ("dense", "lm"), ("static", "fading distill")),
        seeds=(0, 1, 2),
        sampled=860_000,
        distill={"fading distill": {"lm": {"weight": 1.0}, "kl": {"weight": FADING}}},
        # Its down projections are scaled by 5: 16 is 3.2 times the default, and no worse here.
        optimizer={"ours": {"router_lr": 1e-4, "down_lr_factor": 16.0}},
    ),
    "smollm2": Study(
        random={"num_experts": 8, "top_k": 4, "method": "random"},
        ours={
            "num_experts": 88, "top_k": 36, "shared": 128, "method": {"name": "token_clusters", "rounds": 3},
            "shared_by": "power", "router": "ridge", "repair": {"name": "distill", "epochs": 5}, "keep_dense": [0],
            "calibration_length": 512, "compute_dtype": "bfloat16",
        },
        static={},
        calibration=65536,
        heal={"tokens": 131072, "length": 512, "compute_dtype": "bfloat16"},
        pretrain={
            "tokens": 3e5, "batch_size": 8, "micro_batch_size": 2,
            "optimizer": {"lr": 2e-4, "router_lr": 2e-5, "weight_decay": 0.0},
            "lr_schedule": {"warmup": 4, "min_ratio": 0.1},
            "losses": [{"name": "switch", "coefficient": 0.005}],
            "freeze": ["embeddings", "head"],
            "evaluate_every": 15, "log_every": 5, "save_every": 5, "keep": 2,
        },
        arms=(("ours", "distill"), ("dense", "lm"), ("ours", "fading distill"), ("ours", "lm"), ("random", "lm"),
              ("ours from 8k", "untrained")),
        seeds=(0,),
        distill={
            "distill": {"lm": {"weight": 0.5}, "kl": {"weight": 1.0, "top_m": 256}},
            "fading distill": {"lm": {"weight": 1.0}, "kl": {"weight": FADING, "top_m": 256}},
        },
        optimizer={"random": {"router_lr": 2e-4}},  # a router that knows nothing yet learns at the rate of all else
    ),
}  # fmt: skip
STUDIES["stories260k_long"] = replace(
    STUDIES["stories260k"],
    pretrain={
        **STUDIES["stories260k"].pretrain,
        "steps": 1500,
        "evaluate_every": 125,
        "log_every": 125,
        "save_every": 250,
    },
    arms=(("dense", "lm"), ("ours", "fading distill"), ("ours", "lm"), ("random", "lm")),
    seeds=(0,),
    sampled=5_800_000,
)
"""Five times the tokens: the real stories once, and so much more of the parent's."""
STUDIES["stories260k_heal"] = replace(
    STUDIES["stories260k"],
    arms=(
        *(
            (start, f"{how}fading distill")
            for start in ("ours", "random")
            for how in ("", *(f"{name} + " for name in HEALS))
        ),
        ("dense", "lm"),
    ),
)
"""Layers healed on the hidden states of the parent, on the model's own, or on both in turn."""
CORRECTED = {"lm": {"weight": 1.0}, "kl": {"weight": 1.0}}
_SMOLLM2: dict[str, Any] = {
    "shared_by": "power", "repair": {"name": "distill", "epochs": 5}, "calibration_length": 512, "compute_dtype": "bfloat16",
}  # fmt: skip
_ALIGNED: dict[str, Any] = {"tokens": 458_752, "length": 256}
STUDIES["smollm2_aligned"] = replace(
    STUDIES["smollm2"],
    ours={
        "num_experts": 72, "top_k": 22, "shared": 384, "method": "token_clusters", "router": "ridge", **_SMOLLM2,
        "align": {**_ALIGNED, "lr_assignment": 0},
    },
    static={"method": "static", "shared": 736, **_SMOLLM2, "align": _ALIGNED},
    pretrain={**STUDIES["smollm2"].pretrain, "evaluate_every": 20, "save_every": 20},
    arms=(("dense", "lm"), ("ours", "corrected distill"), ("static", "corrected distill")),
    distill={"corrected distill": CORRECTED | {"kl": {"weight": 1.0, "top_m": 256}}},
    total=1_000_000,
    taught=147_456,
)  # fmt: skip
"""A million tokens: the parent on the text, the layers of its conversion together on its predictions, then both."""
RATES = ("6e-4", "2.4e-3")
"""Beside 1.2e-3, for every start."""
STUDIES["stories260k_teacher"] = replace(
    STUDIES["stories260k"],
    pretrain={
        **STUDIES["stories260k"].pretrain,
        "steps": 1200, "batch_size": 4, "micro_batch_size": 4,
        "optimizer": {"lr": 1.2e-3, "router_lr": 6e-4, "weight_decay": 0.01},
        "lr_schedule": {"warmup": 80, "min_ratio": 0.05},
        "evaluate_every": 100, "log_every": 100, "save_every": 400,
    },
    arms=(
        ("dense", "lm"), ("ours", "corrected distill"), ("ours", "lm"), ("ours", "fading distill"),
        ("static", "corrected distill"), ("static", "fading distill"), ("random", "corrected distill"),
        *(("dense", f"lm, lr {rate}") for rate in RATES),
        *((start, f"corrected distill, lr {rate}") for start in ("ours", "static") for rate in RATES),
    ),
    distill={**STUDIES["stories260k"].distill, "corrected distill": CORRECTED},
    teacher={"corrected distill": {"tokens": 307_200}},
)  # fmt: skip
"""A quarter of the batch, and a parent that is trained on the text before it teaches."""
BLOCKS = {
    "stories260k_teacher": {"block_length": 256, "validation_blocks": 128},
    "stories260k": {"block_length": 256, "validation_blocks": 128},
    "stories260k_heal": {"block_length": 256, "validation_blocks": 128},
    "stories260k_long": {"block_length": 256, "validation_blocks": 128},
    "smollm2": {"block_length": 512, "validation_blocks": 8},
    "smollm2_aligned": {"block_length": 512, "validation_blocks": 8},
}


class Runner:
    """Makes what an arm needs, once, and runs it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.study, self.work = name, STUDIES[name], options.work
        self.source, self.train, self.validation = options.source, options.train, options.validation
        self.work.mkdir(parents=True, exist_ok=True)

    def tokens(self) -> dict[str, str]:
        """Folders of tokens, with the parent's own text beside the real one."""
        text = [str(self.train)]
        if self.study.sampled:
            text.append(str(self._sampled()))
        for split, paths in (("train", text), ("valid", [str(self.validation)])):
            if not (self.work / "tokens" / split).exists():
                recipe = load_tokenize_recipe(given={"tokenizer": str(self.source), "text": paths})
                llamamoe.tokenize(recipe, self.work / "tokens" / split)
        return {split: str(self.work / "tokens" / split) for split in ("train", "valid")}

    def _sampled(self) -> Path:
        """Text that the parent writes, by a seed."""
        path: Path = self.work / "sampled.jsonl"
        if not path.exists():
            from llamamoe.architectures.dense_checkpoint import understand
            from llamamoe.calibration.sampled import open_tokenizer, sample_text
            from llamamoe.checkpoint.locate import locate, open_checkpoint

            model = understand(open_checkpoint(locate(self.source)))
            tokenizer = open_tokenizer(model.checkpoint)
            text = sample_text(model, tokenizer, num_tokens=self.study.sampled, length=256, seed=0, batch_size=256)
            rows = [
                json.dumps({"text": each}) for each in tokenizer.batch_decode(text.ids_ST, skip_special_tokens=True)
            ]
            path.write_text("\n".join(rows) + "\n")
        return path

    def converted(self, start: str, seed: int) -> tuple[Path, int]:
        """A conversion, and the tokens that it took."""
        out = self.work / f"{start}-{seed}"
        calibrated = start != "random"
        tokens = FEW_TOKENS if start.endswith(FEW) else self.study.calibration
        given = {**getattr(self.study, start.removesuffix(FEW)), "seed": seed}
        if not out.exists():
            if calibrated:
                given |= {"calibration": [str(self.train)], "calibration_tokens": tokens}
            llamamoe.split(self.parent(seed), out, llamamoe.load_recipe(given=given), resume=True, verify=False)
        return out, self.study.taught + (tokens + given.get("align", {}).get("tokens", 0) if calibrated else 0)

    def start(self, start: str, objective: str, seed: int) -> tuple[Path, int]:
        """Return the start of an arm and the number of tokens that it took."""
        if start == "dense":
            return Path(self.source), 0
        model, tokens = self.converted(start, seed)
        name, healed, _ = objective.rpartition(" + ")
        for changes in HEALS[name] if healed else ():
            out = model.with_name(model.name + ("-healed-on-its-inputs" if changes else "-healed"))
            if not out.exists():
                given = {**self.study.heal, **changes, "text": [str(self.train)], "seed": seed}
                heal(model, out, load_heal_recipe(given=given), parent=self.parent(seed), resume=True)
            model, tokens = out, tokens + int(self.study.heal["tokens"])
        return model, tokens

    def parent(self, seed: int) -> Path:
        """Return the model that is converted: the source, or the source trained on the text first."""
        if not self.study.taught:
            return Path(self.source)
        given = self._given("dense", Path(self.source), seed) | {"tokens": self.study.taught}
        return self._trained(given, self.work / "runs" / f"parent-{seed}")

    def _given(self, start: str, model: Path, seed: int) -> dict[str, Any]:
        """Keys of a run's recipe that do not depend on the objective."""
        tokens = self.tokens()
        given = {
            **self.study.pretrain,
            "model": str(model),
            "data": {"train": tokens["train"], "validation": tokens["valid"], **BLOCKS[self.name]},
            "device": "cpu",
            "seed": seed,
            "experts_implementation": "llamamoe_auto",
        }
        given["optimizer"] = {**given["optimizer"], **self.study.optimizer.get(start, {})}
        if start in ("dense", "static"):
            given |= {"allow_dense": True, "losses": [], "experts_implementation": None}
        return given

    def _trained(self, given: dict[str, Any], folder: Path) -> Path:
        """Run ``pretrain`` to its end, unless it was, and return the model's folder."""
        if not (folder / "model").exists():
            result = llamamoe.pretrain(load_pretrain_recipe(given=given), folder, resume=True)
            shutil.rmtree(result.out / f"checkpoint-{result.steps}", ignore_errors=True)
        return folder / "model"

    def arm(self, start: str, objective: str, seed: int) -> dict[str, Any]:
        """Run one arm to its end; its curve as plain data."""
        model, spent = self.start(start, objective, seed)
        untrained = objective == "untrained"  # measured before a step that is then thrown away
        given = self._given(start, model, seed)
        how, _, rate = objective.rpartition(" + ")[2].partition(", lr ")
        if rate:  # that of the routers stays in proportion
            share = float(rate) / given["optimizer"]["lr"]
            given["optimizer"] |= {"lr": float(rate), "router_lr": given["optimizer"]["router_lr"] * share}
        if self.study.total is not None:
            given["tokens"] = self.study.total - spent
        if self.study.taught and start != "dense":
            given["data"]["skip_tokens"] = self.study.taught
        if untrained:
            given |= {"steps": 1, "tokens": None}
        elif how != "lm":
            given |= {"parent": str(self.parent(seed)), "distill": dict(self.study.distill[how])}
        if how in self.study.teacher:
            given["teacher"] = dict(self.study.teacher[how])
            taught = int(given["teacher"]["tokens"])
            given["steps"] -= taught // (given["batch_size"] * BLOCKS[self.name]["block_length"])
            spent += taught
        folder = self.work / "runs" / f"{start}-{re.sub(r'[ +,]+', '-', objective)}-{seed}"
        self._trained(given, folder)
        lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "validation"]
        lines = lines[:1] if untrained else lines
        return {
            "start": start,
            "objective": objective,
            "seed": seed,
            "spent": spent,
            "curve": [[spent + line["tokens"], line["loss"]] for line in lines],
            "domains": {"first": lines[0]["domain_loss"], "last": lines[-1]["domain_loss"]},
        }


def load(path: Path) -> list[dict[str, Any]]:
    """The finished arms."""
    return json.loads(path.read_text())["arms"] if path.exists() else []


def add(path: Path, study: str, arm: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a finished arm among those of the file, which another process may have added to; returns all."""
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        arms = sorted([*load(path), arm], key=lambda each: (each["seed"], each["start"], each["objective"]))
        path.write_text(json.dumps({"study": study, "arms": arms}, indent=1) + "\n")
    return arms


def tokens_to_reach(curve: list[list[float]], loss: float) -> float | None:
    """From which tokens on a curve is at or below a loss, linear between its points; None: never."""
    for (x0, y0), (x1, y1) in zip([curve[0], *curve], curve, strict=False):
        if y1 <= loss:
            return x1 if y0 <= loss or y0 == y1 else x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return None


def table(arms: list[dict[str, Any]]) -> str:
    """Every arm beside the equally trained parent, and the tokens it needs for what others end with, as Markdown.

    Losses are those of the best validation of a run, means over seeds; shares of tokens are means over seeds of what
    the arm needs by what the other used in all.
    """
    curves = {(arm["start"], arm["objective"], arm["seed"]): arm["curve"] for arm in arms}
    names = list(dict.fromkeys(key[:2] for key in curves))

    def best(name: tuple[str, str]) -> list[float]:
        return [min(loss for _, loss in curve) for key, curve in curves.items() if key[:2] == name]

    def share(name: tuple[str, str], other: tuple[str, str]) -> str:
        found = []
        for (*mine, seed), curve in curves.items():
            if tuple(mine) == name and (*other, seed) in curves:
                theirs = curves[*other, seed]
                need = tokens_to_reach(curve, min(loss for _, loss in theirs))
                found.append(None if need is None else need / theirs[-1][0])
        reached = [each for each in found if each is not None]
        if not found:
            return ""
        return f"{fmean(reached):.2f}" if len(reached) == len(found) else f"{len(reached)} of {len(found)} seeds"

    parent = fmean(best(("dense", "lm"))) if ("dense", "lm") in names else None
    rows = [
        "| start | objective | seeds | tokens before | loss before | loss | x trained parent | of ours + lm | of random + lm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda each: fmean(best(each))):
        mine = [curve for key, curve in curves.items() if key[:2] == name]
        losses, spread = best(name), max(best(name)) - min(best(name))
        ratio = "" if parent is None else f"{math.exp(fmean(losses) - parent):.3f}"
        before = f"{mine[0][0][0]:,.0f} | {fmean(curve[0][1] for curve in mine):.3f}"
        loss = f"{fmean(losses):.3f}" + (f" ({spread:.3f} apart)" if len(losses) > 1 else "")
        needs = f"{share(name, ('ours', 'lm'))} | {share(name, ('random', 'lm'))}"
        rows.append(f"| {name[0]} | {name[1]} | {len(mine)} | {before} | {loss} | {ratio} | {needs} |")
    return "\n".join(rows) + "\n"


def draw(arms: list[dict[str, Any]], path: Path) -> None:
    """Curves of the mean over seeds, with the range over seeds."""
    colours = {
        "random": "#D55E00",
        "ours": "#0072B2",
        "dense": "#555555",
        "static": "#009E73",
        "ours from 8k": "#56B4E9",
    }
    styles = {"lm": ":", "distill": "-.", "fading distill": "-", "heal + fading distill": "--", "untrained": "o",
              "corrected distill": "-.", "heal on its inputs + fading distill": "-.", "heal twice + fading distill": ":"}  # fmt: skip
    arms = [arm for arm in arms if ", lr " not in arm["objective"]]
    with picture(path, (8.4, 5.0)) as axes:
        for start, objective in dict.fromkeys((arm["start"], arm["objective"]) for arm in arms):
            curves = [a["curve"] for a in arms if (a["start"], a["objective"]) == (start, objective)]
            x = [max(point[0], 1) / 1000 for point in curves[0]]
            losses = [[curve[i][1] for curve in curves] for i in range(len(x))]
            mean = [sum(each) / len(each) for each in losses]
            name = {"dense": "dense parent, language modelling"}.get(start, f"{start}, {objective}")
            axes.plot(x, mean, styles[objective], color=colours[start], label=name, linewidth=1.8)
            axes.fill_between(x, [min(e) for e in losses], [max(e) for e in losses], color=colours[start], alpha=0.12)
        lowest = min(loss for arm in arms for _, loss in arm["curve"])
        ends = [arm["curve"][-1][1] for arm in arms]
        axes.set_ylim(lowest - 0.05, max(ends) + 0.6 * (max(ends) - lowest) + 0.1)
        axes.set_xlabel("tokens in thousands, calibration and healing included")
        axes.set_ylabel("loss of held-out text, nats per token")
        axes.legend(frameon=False, fontsize=9)


def main() -> None:
    """Parse, run what is missing, write after every arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--source", type=Path, help="The dense model's folder.")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/recovery"))
    parser.add_argument("--only", nargs="*", default=[], help="Arms such as 'ours/distill/0'.")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    path = RESULTS / f"recovery-{options.study}.json"
    arms, study = load(path), STUDIES[options.study]
    there = {(arm["start"], arm["objective"], arm["seed"]) for arm in arms}
    wanted = [
        (start, how, seed)
        for seed in study.seeds
        for start, how in study.arms
        if seed == study.seeds[0] or ", lr " not in how
    ]
    if not options.draw:
        runner = Runner(options.study, options)
        for key in wanted:
            if key not in there and (not options.only or "/".join(map(str, key)) in options.only):
                arm = runner.arm(*key)
                arms = add(path, options.study, arm)
                print(*key, arm["curve"][0], arm["curve"][-1], flush=True)
    if arms:
        draw(arms, path)
        path.with_suffix(".md").write_text(table(arms))


if __name__ == "__main__":
    main()
