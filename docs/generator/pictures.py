"""Pictures of the concepts, drawn from benchmarks/results in a light and in a dark version.

They stand in the repository, so that pages show them there, too: `python docs/generator/pictures.py` draws them anew.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FOLDER = Path(__file__).resolve().parents[1] / "pictures"
BLUE, ORANGE, GREEN, GREY = "#4361ee", "#e07a1f", "#2a9d6f", "#8a8f98"
INK = {"light": "#333333", "dark": "#d5d8de"}
Draw = Callable[[Any], None]


def drawn() -> dict[str, bytes]:
    """Return the files of ``docs/pictures/``, ``NAME-light.svg`` and ``NAME-dark.svg``, by name."""
    pictures = {"quality": quality, "speed": speed, "hard-router": hard_router, "repair": repair, "alignment": alignment,
             "calibration": calibration}  # fmt: skip
    return {f"{name}-{mode}.svg": _svg(draw, ink) for name, draw in pictures.items() for mode, ink in INK.items()}


def _svg(draw: Draw, ink: str) -> bytes:
    style = {"svg.hashsalt": "llamamoe", "svg.fonttype": "path", "text.color": ink, "axes.labelcolor": ink,
             "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": GREY, "font.size": 10}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        legend = axes.get_legend()
        if legend is not None:
            legend.set_frame_on(False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _study() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = _read("compare-smollm2/comparison.json")["rows"]
    return rows


def quality(axes: Any) -> None:
    """Perplexity over the dense model's, by the share of the FFN that a token uses."""
    curves = {
        "token_clusters": ("experts (token_clusters)", BLUE),
        "static + distill": ("static pruning, same repair", ORANGE),
    }
    for method, (label, color) in curves.items():
        rows = sorted((r["share"], r["ratio"]) for r in _study() if r["method"] == method)
        axes.plot(*zip(*[*rows, (1.0, 1.0)], strict=True), "o-", color=color, label=label)
    oracle = [(r["share"], r["ratio"]) for r in _study() if r["method"] == "token_clusters, oracle router"]
    axes.plot(*zip(*oracle, strict=True), "*", color=GREEN, markersize=12, label="the same experts, ideal router")
    axes.set(xlabel="active share of the FFN", ylabel="perplexity over dense", ylim=(0.9, None))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.legend()


def repair(axes: Any) -> None:
    """Draw the perplexity of each repair at half of the FFN."""
    found = {r["method"]: r["ratio"] for r in _study() if r["budget"] == 0.5}
    bars = {"experts": ("token_clusters, no repair", "token_clusters + least_squares", "token_clusters"),
            "static pruning": ("static", "static + least_squares", "static + distill")}  # fmt: skip
    for place, (group, color) in enumerate(zip(bars, (BLUE, ORANGE), strict=True)):
        values = [found[name] for name in bars[group]]
        drawn = axes.bar([x + 0.4 * place for x in range(3)], values, width=0.36, color=color, label=group)
        axes.bar_label(drawn, fmt="%.2f")
    axes.set_xticks([0.2, 1.2, 2.2], ["no repair", "least_squares", "distill"])
    axes.set(ylabel="perplexity over dense")
    axes.legend()


def speed(axes: Any) -> None:
    """Decoding and prefill in llama.cpp over the dense model, half of the FFN."""
    wanted = {
        "static pruning": (0, 0.5),
        "7 of 40 + 3/8": (40, 0.375),
        "12 of 32 + 1/8": (32, 0.125),
        "4 of 8": (8, 0.0),
    }
    tasks = {
        "decode 1": ("decode, 1 sequence", BLUE),
        "prefill": ("prefill", GREEN),
        "decode 8": ("decode, 8 sequences", GREY),
    }
    rows = {(r["shape"]["num_experts"], r["shape"]["shared"]): r["rates"] for r in _read("shape_speed.json")["rows"]
            if r["program"] == "llama.cpp" and 0.44 < r["active_share"] < 0.51}  # fmt: skip
    for place, (task, (label, color)) in enumerate(tasks.items()):
        values = [(rows[key].get("shape") or rows[key]["static"])[task]["ratio"] for key in wanted.values()]
        axes.bar([x + 0.27 * place for x in range(len(wanted))], values, width=0.25, color=color, label=label)
    axes.axhline(1.0, color=GREY, linewidth=1)
    axes.set_xticks([x + 0.27 for x in range(len(wanted))], list(wanted))
    axes.set(ylabel="speed over dense", ylim=(0, 2.1))
    axes.legend(ncols=3)


def hard_router(axes: Any) -> None:
    """Draw the trade-off in the scale of a hard router: wrong selections against unequal weights."""
    scales = _read("hard-router.json")["SmolLM2-135M: qwen2_moe, 24 of 64"]
    points = [(float(key), value["float32 set differs"], value["as_stored"]) for key, value in scales.items()
              if isinstance(value, dict) and value["float32 set differs"]]  # fmt: skip
    largest, differs, stored = zip(*points, strict=True)
    axes.loglog(largest, differs, "o-", color=BLUE, label="tokens whose experts another program may choose otherwise")
    axes.loglog(largest, stored, "s-", color=ORANGE, label="difference to dense, all experts selected")
    axes.axvspan(2.8e-3, 3.8e-3, color=GREEN, alpha=0.3, label="chosen scale")
    axes.set(xlabel="largest router logit", ylabel="share, or relative difference", ylim=(1e-5, 3))
    axes.legend(fontsize=8)


def alignment(axes: Any) -> None:
    """Perplexity of stories260K by what is learned end to end."""
    found = {each["arm"]: each["perplexity_over_dense"] for each in _read("alignment-stories260k.json")["arms"]}
    arms = ["static, repaired", "static, all learned", "experts, repaired", "repaired, then all learned"]
    drawn = axes.barh(arms[::-1], [found[arm] for arm in arms[::-1]], color=[BLUE, BLUE, ORANGE, ORANGE])
    axes.bar_label(drawn, fmt=" %.2f")
    axes.axvline(1.0, color=GREY, linewidth=1)
    axes.set(xlabel="perplexity over dense (1 is the dense model)")


def calibration(axes: Any) -> None:
    """Time and memory of calibration by the number of tokens."""
    found = {int(tokens): each for tokens, each in _read("calibration.json")["tokens"].items()}
    tokens = sorted(found)
    axes.plot(tokens, [found[t]["seconds"] / 60 for t in tokens], "o-", color=BLUE, label="minutes on two cores")
    axes.plot(tokens, [found[t]["peak_anon_bytes"] / 1e9 for t in tokens], "s-", color=ORANGE, label="peak memory, GB")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}".replace(",", " "))
    axes.set(xlabel="calibration tokens", yscale="log")
    axes.legend()


if __name__ == "__main__":
    for file, content in drawn().items():
        (FOLDER / file).write_bytes(content)
