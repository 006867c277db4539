from typing import Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from adaptok.config import Config
from adaptok.errors import ConfigError, StorageError


class Inner(Config):
    ratio: float = Field(default=0.5, gt=0)


class Sample(Config):
    depth: int = Field(default=2, ge=1)
    kind: Literal["a", "b"] = "a"
    size: int | tuple[int, int] = 4
    names: tuple[str, ...] = ()
    inner: Inner = Inner()


@given(
    depth=st.integers(1, 10**9),
    kind=st.sampled_from(["a", "b"]),
    size=st.one_of(st.integers(), st.tuples(st.integers(), st.integers())),
    names=st.lists(st.text()).map(tuple),
    ratio=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_json_is_the_same_config_again(depth, kind, size, names, ratio):
    config = Sample(depth=depth, kind=kind, size=size, names=names, inner=Inner(ratio=ratio))
    assert Sample.from_json(config.to_json()) == config
    assert Sample(**config.model_dump(mode="json")) == config


def test_files_are_the_same_config_again(tmp_path):
    config = Sample(depth=7, names=("Grün", "日本"))
    for path in (tmp_path / "c.json", str(tmp_path / "c.json")):  # the second time it is replaced
        config.to_json_file(path)
        assert Sample.from_json_file(path) == config
    assert "日本" in (tmp_path / "c.json").read_text(encoding="utf-8")


def test_options_are_frozen():
    config = Sample()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.depth = 3
    assert config.depth == 2


def test_every_problem_is_named_with_what_came():
    with pytest.raises(ConfigError) as caught:
        Sample(depth=0, kind="c", colour="red", inner={"ratio": -1.5})
    message = str(caught.value)
    assert message.startswith("Sample is not valid: ")
    assert "depth: Input should be greater than or equal to 1; got 0" in message
    assert "kind: Input should be 'a' or 'b'; got 'c'" in message
    assert "colour: this option does not exist" in message
    assert "ratio: Input should be greater than 0; got -1.5" in message
    assert message.count("; ") >= 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dept": 3}', "dept: this option does not exist"),
        ('{"depth": "many"}', "depth: Input should be a valid integer.*; got 'many'"),
        ('{"depth": null}', "depth: .*; got None"),
        ('{"inner": {"ratoi": 1}}', "ratoi: this option does not exist"),
        ('{"depth": 3', "Sample is not valid: .*Invalid JSON"),
        ("[1]", "should be an object; got"),
        ("", "Invalid JSON"),
    ],
)
def test_wrong_json_is_refused_and_the_file_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        Sample.from_json(text)
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=f"in .*c.json: .*{message}"):
        Sample.from_json_file(tmp_path / "c.json")


def test_files_that_cannot_be_read_or_written_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none.json"):
        Sample.from_json_file(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*bytes.json"):
        Sample.from_json_file(tmp_path / "bytes.json")
    with pytest.raises(StorageError, match=r"cannot write .*c.json"):
        Sample().to_json_file(tmp_path / "missing" / "c.json")
