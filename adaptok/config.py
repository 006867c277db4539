"""Configurations: frozen, validated, and the same after a trip through JSON."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from adaptok.errors import ConfigError
from adaptok.storage import write_text


class Config(BaseModel):
    """A frozen set of options; unknown keys and values out of range are refused.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range. Every problem is
            named, with what came.

    Example:
        >>> class Size(Config):
        ...     depth: int = 12
        >>> Size.from_json(Size(depth=3).to_json()).depth
        3
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, /, **values: Any) -> None:  # noqa: ANN401
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(describe_problems(type(self).__name__, error)) from None

    def to_json(self) -> str:
        """Write the options as JSON text."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read options from JSON text.

        Args:
            text: what `to_json` wrote.

        Returns:
            The configuration.

        Raises:
            ConfigError: the text is no JSON, or its content is not valid.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(describe_problems(cls.__name__, error)) from None

    def to_json_file(self, path: str | Path) -> None:
        """Write the options to a file.

        Args:
            path: the file; it is replaced.

        Raises:
            StorageError: the file cannot be written.
        """
        write_text(path, self.to_json() + "\n")

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Read options from a file.

        Args:
            path: a file that `to_json_file` wrote.

        Returns:
            The configuration.

        Raises:
            ConfigError: the file is missing, unreadable, or not valid.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        try:
            return cls.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"in {path}: {error}") from None


def describe_problems(name: str, error: ValidationError) -> str:
    """Turn a validation error into sentences that name each option and what came."""
    problems = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ").removeprefix(f"{name} is not valid: ")
        if item["type"] == "extra_forbidden":
            message = "this option does not exist"
        elif not isinstance(item["input"], dict):
            message = f"{message}; got {item['input']!r}"
        problems.append(f"{place}: {message}" if item["loc"] else message)
    return f"{name} is not valid: " + "; ".join(problems)
