"""What an outsider says of a job, as an observation: wrapped, so that it is never taken for our own word.

Workers leave observations for a waiting task too (how a job ended, by a look); whoever could write one in
their form would end a job as he likes, whatever its `state` expression says.
"""

from __future__ import annotations

from typing import Any, Final

from ..contract import ANSWER_KEYS

_SAID: Final = "said"


class Heard(dict[str, Any]):
    """What `heard` has made in this process; JSON never is one, whatever its keys are."""


def heard(value: Any) -> Heard | None:
    """Return what was said, as an observation: every door does so, and twice is once.

    None stays None: go and look.
    """
    if value is None or isinstance(value, Heard):
        return value
    return Heard({_SAID: value})


def said(observation: Any) -> tuple[bool, Any]:
    """Tell whether an observation is what an outsider said, and return that; else itself."""
    if isinstance(observation, dict) and observation.keys() == {_SAID}:
        return True, observation[_SAID]
    return False, observation


def answer_key(service: str, correlation_id: str) -> str:
    """Return the wake key of a job that was asked for over a queue, by the id that its answer carries."""
    return f"{ANSWER_KEYS}{service}:{correlation_id}"
