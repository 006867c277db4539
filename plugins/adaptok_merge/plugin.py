"""The door of adaptok_merge."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the parts of adaptok_merge."""
    registry.stage("tome", "adaptok_merge.tome:ToMe")
    registry.stage("tomesd", "adaptok_merge.tomesd:ToMeSD")
