"""Implementations of a native model's routed experts, for CPUs and autocast, one file each.

transformers computes experts by a function selected by name. These are registered beside its own:

    llamamoe.register_experts()
    model = AutoModelForCausalLM.from_pretrained(OUT, experts_implementation="llamamoe_auto")

The choice applies to the running model only and is not saved.
"""

from ...lazy import transformers
from ...plugins import Registry
from .base import ExpertsImplementation

EXPERTS: Registry[ExpertsImplementation] = Registry("experts implementation", ExpertsImplementation, __name__)  # type: ignore[type-abstract]
PREFIX = "llamamoe_"
"""Prefix of the names in transformers."""


def register_experts() -> list[str]:
    """Register llamamoe's experts implementations in transformers; calling it again changes nothing.

    Returns:
        The names in transformers (``"llamamoe_auto"``, ...), for ``from_pretrained(...,
        experts_implementation=name)`` and ``model.set_experts_implementation(name)``.
    """
    functions = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    known = functions.valid_keys()
    for cls in EXPERTS:
        if PREFIX + cls.name not in known:
            functions.register(PREFIX + cls.name, cls())
    return [PREFIX + name for name in EXPERTS.names()]
