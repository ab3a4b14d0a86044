"""Ways to compute the routed experts of a native model, on CPUs and under autocast, one file each.

transformers computes experts by a function that the user picks by name. Ours are registered there beside its own:

    llamamoe.register_experts()
    model = AutoModelForCausalLM.from_pretrained(OUT, experts_implementation="llamamoe_auto")

The choice lives in the running model only; what is saved does not carry it.
"""

from ...plugins import Registry
from .base import ExpertsImplementation

EXPERTS: Registry[ExpertsImplementation] = Registry("experts implementation", ExpertsImplementation, __name__)  # type: ignore[type-abstract]
PREFIX = "llamamoe_"
"""What transformers knows ours by begins with it."""


def register_experts() -> list[str]:
    """Make our experts implementations known to transformers; calling it again changes nothing.

    Returns:
        The names as transformers knows them (``"llamamoe_auto"``, ...), for ``from_pretrained(...,
        experts_implementation=name)`` and ``model.set_experts_implementation(name)``.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    known = ALL_EXPERTS_FUNCTIONS.valid_keys()
    for cls in EXPERTS:
        if PREFIX + cls.name not in known:
            ALL_EXPERTS_FUNCTIONS.register(PREFIX + cls.name, cls())
    return [PREFIX + name for name in EXPERTS.names()]
