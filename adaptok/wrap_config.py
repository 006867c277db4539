"""The configuration of a wrap: what makes the same wrap again, as JSON or YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import yaml
from pydantic import Field, field_validator

from adaptok.budgets import AMOUNTS, Budget
from adaptok.config import Config
from adaptok.errors import BudgetError, ConfigError
from adaptok.parts import PartConfig
from adaptok.storage import write_text

VERSION = 1


class BudgetConfig(Config):
    """A budget as plain numbers.

    Args:
        keep: fraction of the cells, one number or one per sample.
        tokens: exact count.
        drop: tail-drop fraction.

    Raises:
        ConfigError: two of them came, or a value is out of range.

    Example:
        >>> BudgetConfig(keep=0.5).to_budget().describe()
        'keep=0.5'
    """

    keep: float | list[float] | None = None
    tokens: float | list[float] | None = None
    drop: float | list[float] | None = None

    def to_budget(self) -> Budget:
        """Return the budget itself."""
        return Budget(keep=self.keep, tokens=self.tokens, drop=self.drop)

    @classmethod
    def from_budget(cls, budget: Budget) -> Self | None:
        """Return a budget's plain numbers; None for the natural budget."""
        if budget.is_natural:
            return None
        if budget.target_ms is not None:
            raise BudgetError(
                f"{budget.describe()} belongs to the machine that it was measured on, and no "
                "configuration holds it: give keep=, tokens= or drop= here, and the target to "
                "adaptok.set_budget"
            )
        plain: dict[str, float | list[float] | None] = {}
        for name in AMOUNTS:
            amount = getattr(budget, name)
            if isinstance(amount, torch.Tensor):
                amount = amount.tolist()
            plain[name] = list(amount) if isinstance(amount, Sequence) else amount
        return cls(**plain)


class WrapConfig(Config):
    """All that was said to `adaptok.wrap`, by name.

    Args:
        version: format of this configuration.
        backbone: name of the adapter of the host's family.
        chunker: the chunker; None if only a stack was given.
        router: its router.
        dechunker: its dechunker.
        span: the first block inside, and the one behind the last.
        budget: the budget; None is the natural one.
        stack: further stages.
        complete: whether it makes the same wrap again; not so if an instance of a class without a
            registered name was given.

    Raises:
        ConfigError: an unknown key, a wrong value, or a newer version.

    Example:
        >>> config = WrapConfig(backbone="timm-vit", chunker=PartConfig(name="dc"), span=(0, 12))
        >>> WrapConfig.from_yaml(config.to_yaml()) == config
        True
    """

    version: int = VERSION
    backbone: str = "auto"
    chunker: PartConfig | None = None
    router: PartConfig | None = None
    dechunker: PartConfig | None = None
    span: tuple[int, int] | None = None
    budget: BudgetConfig | None = None
    stack: tuple[PartConfig, ...] = Field(default=())
    complete: bool = True

    @field_validator("version")
    @classmethod
    def check_version(cls, version: int) -> int:
        """Refuse what a newer adaptok wrote."""
        if not 1 <= version <= VERSION:
            raise ValueError(
                f"this adaptok reads wrap configurations up to version {VERSION}: install a newer "
                "adaptok"
            )
        return version

    def to_yaml(self) -> str:
        """Write the options as YAML text."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read options from YAML text.

        Args:
            text: what `to_yaml` wrote, or a person.

        Returns:
            The configuration.

        Raises:
            ConfigError: the text is no YAML mapping, or its content is not valid.
        """
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"this is no YAML: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"a YAML mapping is needed, got a {type(content).__name__}")
        return cls(**content)

    def to_file(self, path: str | Path) -> None:
        """Write the options to a file, as YAML where its name ends so, else as JSON."""
        path = Path(path)
        yaml_wanted = path.suffix in (".yaml", ".yml")
        write_text(path, self.to_yaml() if yaml_wanted else self.to_json() + "\n")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read options from a JSON or YAML file.

        Raises:
            ConfigError: the file is missing, unreadable or not valid.
        """
        path = Path(path)
        if path.suffix not in (".yaml", ".yml"):
            return cls.from_json_file(path)
        try:
            return cls.from_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
