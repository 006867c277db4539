"""The catalogue of host architectures: tiny models of real classes, filled with noise that matters.

It knows nothing of `adaptok`; tests and `hosts.py` wrap what it builds.
"""

from .case import BATCH, HostCase, HostInputs, randomise
from .diffusers_candidates import CANDIDATE_CASES
from .diffusers_models import DIFFUSERS_CASES
from .facebook_models import FACEBOOK_CASES
from .plain_models import PLAIN_CASES
from .timm_models import TIMM_CASES
from .transformers_models import TRANSFORMERS_CASES

__all__ = ["BATCH", "CASES", "HostCase", "HostInputs", "find_case", "randomise"]

CASES: tuple[HostCase, ...] = (
    *TIMM_CASES,
    *FACEBOOK_CASES,
    *DIFFUSERS_CASES,
    *TRANSFORMERS_CASES,
    *PLAIN_CASES,
    *CANDIDATE_CASES,
)


def find_case(name: str) -> HostCase:
    """Return the case of a name.

    Args:
        name: "library/architecture", or the part behind the slash where only one case has it.

    Returns:
        The case.

    Raises:
        KeyError: if no case, or more than one, has that name.
    """
    exact = [case for case in CASES if case.name == name]
    found = exact or [case for case in CASES if case.name.partition("/")[2] == name]
    if len(found) != 1:
        raise KeyError(f"{name!r} names {len(found)} architectures, one is needed")
    return found[0]
