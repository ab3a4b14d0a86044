"""Watch the query heads of a loaded attention module, or run it with these heads as experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..lazy import torch
from ..methods.attention import RoutedHeads


@contextmanager
def watched(attention: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dictionary that holds, after every run, the module's ``input`` ``[B, S, H]`` and ``heads`` ``[B, S, Q]``."""
    seen: dict[str, torch.Tensor] = {}

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]

    hooks = (
        attention.register_forward_pre_hook(see, with_kwargs=True),
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
    )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def running(attention: Any, routed: RoutedHeads) -> Iterator[None]:
    """Let the module run with routed heads and their output projection, whose weights it keeps."""
    output = attention.o_proj
    output.weight = torch.nn.Parameter(routed.output_HQ.to(output.weight), requires_grad=False)
    with watched(attention) as seen:

        def weigh(_: Any, args: tuple[torch.Tensor]) -> torch.Tensor:
            heads_BSQ = args[0]
            return routed.weighted(seen["input"].flatten(0, 1), heads_BSQ.flatten(0, 1)).view_as(heads_BSQ)

        hook = output.register_forward_pre_hook(weigh)
        try:
            yield
        finally:
            hook.remove()
