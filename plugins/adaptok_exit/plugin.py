"""The door of adaptok_exit."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the parts of adaptok_exit."""
    registry.stage("exit", "adaptok_exit.confidence:ConfidenceExit")
    registry.stage("schedule", "adaptok_exit.scheduled:ScheduledExit")
