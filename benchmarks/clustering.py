"""Balanced clustering against its peers: k-means-constrained for the whole, POT for one assignment.

    python benchmarks/clustering.py [--json PATH] [--quick] [--threads N] [--repeats N]

Needs the extra ``bench``. Data: 11008 rows of 4096 (the gate matrix of a 7B LLaMA), L2-normalised. ``clustered``: each
row is Gaussian noise of length about 1 plus 0.5 times one of 64 random directions, the i-th of which is drawn with
probability proportional to 1 / i^0.8, so that natural clusters are of very unequal size. ``gaussian``: noise alone.

Both sides of a row of the table get the same input, the same number of threads (threadpoolctl), and take turns at
going first; times are medians. Each ratio is ours / peer.

- k-means: the same initial centres (random rows) and cap on iterations; both may stop before it only if nothing changes
  (tol = 0). The inertia of both is computed here from their labels.
- assignment: squared distances to the means of the nearest-row clusters of K random rows, float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from llamamoe.methods.solvers.balance import assign_balanced
from llamamoe.methods.solvers.clustering import balanced_kmeans

Timed = tuple[float, Any]


def rows(kind: str, num_rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((num_rows, width), dtype=np.float32) / np.float32(np.sqrt(width))
    if kind == "clustered":
        directions = rng.standard_normal((64, width), dtype=np.float32)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        popularity = np.arange(1, 65) ** -0.8
        points += 0.5 * directions[rng.choice(64, num_rows, p=popularity / popularity.sum())]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def inertia(points: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for cluster in np.unique(labels):
        members = points[labels == cluster].astype(np.float64)
        total += float(((members - members.mean(0)) ** 2).sum())
    return total


def take_turns(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> tuple[list[Timed], list[Timed]]:
    """Run both ``repeats`` times; who goes first changes every time."""
    results: dict[Callable[[], Any], list[Timed]] = {ours: [], peer: []}
    for turn in range(repeats):
        for call in (ours, peer) if turn % 2 == 0 else (peer, ours):
            start = time.perf_counter()
            result = call()
            results[call].append((time.perf_counter() - start, result))
    return results[ours], results[peer]


def seconds(timed: list[Timed]) -> dict[str, Any]:
    return {"median_s": median(t for t, _ in timed), "all_s": [t for t, _ in timed]}


def bench_kmeans(kind: str, points: np.ndarray, num_clusters: int, max_iter: int, repeats: int) -> dict[str, Any]:
    from k_means_constrained import KMeansConstrained

    each = len(points) // num_clusters
    centers = points[np.random.default_rng(1).choice(len(points), num_clusters, replace=False)]

    def ours() -> Any:
        return balanced_kmeans(points, num_clusters, each, seed=0, initial_centers=centers, max_iter=max_iter, tol=0)

    def peer() -> Any:
        return KMeansConstrained(
            num_clusters, size_min=each, size_max=each, init=centers, n_init=1, max_iter=max_iter, tol=0
        ).fit(points)

    mine, theirs = take_turns(ours, peer, repeats)
    my_inertia = inertia(points, mine[0][1].labels)
    their_inertia = inertia(points, theirs[0][1].labels_)
    assert (np.bincount(mine[0][1].labels) == each).all()
    assert (np.bincount(theirs[0][1].labels_) == each).all()
    return {
        "what": f"k-means {kind} {points.shape[0]} x {points.shape[1]} into {num_clusters}",
        "ours": {**seconds(mine), "inertia": my_inertia, "iterations": mine[0][1].iterations},
        "peer": {**seconds(theirs), "inertia": their_inertia, "iterations": theirs[0][1].n_iter_},
        "excess": my_inertia / their_inertia - 1,
    }


def bench_assignment(kind: str, points: np.ndarray, num_clusters: int, repeats: int) -> dict[str, Any]:
    import ot

    each = len(points) // num_clusters
    centers = points[np.random.default_rng(2).choice(len(points), num_clusters, replace=False)]
    nearest = (points @ centers.T).argmax(1)
    means = np.stack([points[nearest == k].mean(0) for k in range(num_clusters)])
    cost = (1 + (means**2).sum(1) - 2 * (points @ means.T)).astype(np.float64)
    mass, places = np.ones(len(points)), np.full(num_clusters, float(each))

    mine, theirs = take_turns(
        lambda: assign_balanced(cost, each), lambda: ot.emd(mass, places, cost, numItermax=10**8), repeats
    )
    my_cost = float(cost[np.arange(len(cost)), mine[0][1]].sum())
    their_cost = float((theirs[0][1] * cost).sum())
    return {
        "what": f"assignment {kind} {len(points)} x {num_clusters}",
        "ours": {**seconds(mine), "cost": my_cost},
        "peer": {**seconds(theirs), "cost": their_cost},
        "excess": my_cost / their_cost - 1,
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    num_rows, width, max_iter = (1024, 256, 10) if args.quick else (11008, 4096, 20)
    found = []
    for kind in ("clustered", "gaussian"):
        points = rows(kind, num_rows, width)
        balanced_kmeans(points[:1024], 8, 128, seed=0, max_iter=2)  # imports and the first use of the threads
        for num_clusters in (8, 16):
            found.append(bench_kmeans(kind, points, num_clusters, max_iter, args.repeats))
            show(found[-1])
        for num_clusters in (16, 256):
            found.append(bench_assignment(kind, points, num_clusters, args.repeats))
            show(found[-1])
    return found


def show(row: dict[str, Any]) -> None:
    mine, theirs = row["ours"]["median_s"], row["peer"]["median_s"]
    steps = (
        f"  iterations {row['ours']['iterations']}/{row['peer']['iterations']}" if "iterations" in row["ours"] else ""
    )
    print(
        f"{row['what']:44s} {mine:8.2f} s {theirs:8.2f} s  ratio {mine / theirs:5.2f}  "
        f"excess {row['excess']:+.1e}{steps}",
        flush=True,
    )


def environment(threads: int) -> dict[str, Any]:
    packages = ("numpy", "scikit-learn", "k-means-constrained", "POT")
    return {
        "threads": threads,
        "cpus": os.cpu_count(),
        "load_at_start": os.getloadavg(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="1024 x 256: shows that it runs, measures nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="k_means_constrained|sklearn")
    setting = environment(args.threads)
    print(f"{'':44s} {'ours':>8s}   {'peer':>8s}    (k-means-constrained, POT), {setting}")
    with threadpool_limits(limits=args.threads):
        results = measure(args)
    if args.json:
        args.json.write_text(json.dumps({"environment": setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
