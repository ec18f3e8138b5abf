"""The strict builder of nested dataclasses, on sections small enough to see through."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from trapo_train.schema import ConfigError, UserError, build, check, expand_home


@dataclass(frozen=True)
class Item:
    weight: float
    label: str | None = None


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    count: int = 1
    on: bool = False
    kind: Literal["plain", "fancy"] = "plain"
    limit: int | None = 5
    items: tuple[Item, ...] = ()
    depths: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    ratio: float | str = 1.0
    betas: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise UserError(f"rate must be above 0, got {self.rate}.")


@dataclass(frozen=True)
class Needy:
    path: str


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    extra: Needy | None = None
    several: Needy | dict[str, Needy] | None = None


def make(**values):
    return build(Outer, {"name": "x", **values}, lambda path: "file.yaml" + (f" at {path[-1]}" if path else ""))


def test_values_of_every_type():
    config = make(
        inner={
            "rate": 2,
            "count": 3,
            "on": True,
            "kind": "fancy",
            "limit": None,
            "items": [{"weight": 1}, {"weight": 0.5, "label": "b"}],
            "depths": [1, 2],
            "options": {"alpha": 0.1, "deep": {"a": [1]}},
            "ratio": "auto",
            "betas": [0.9, 1],
        },
        extra={"path": "p"},
    )
    inner = config.inner
    assert (inner.rate, type(inner.rate)) == (2.0, float)
    assert (inner.count, inner.on, inner.kind, inner.limit) == (3, True, "fancy", None)
    assert inner.items == (Item(1.0), Item(0.5, "b"))
    assert inner.depths == [1, 2]
    assert inner.options == {"alpha": 0.1, "deep": {"a": [1]}}
    assert inner.ratio == "auto"
    assert inner.betas == (0.9, 1.0)
    assert config.extra == Needy("p")


def test_one_section_or_several_by_name():
    assert make(several={"path": "p"}).several == Needy("p")
    assert make(several={"a": {"path": "p"}, "b": {"path": "q"}}).several == {"a": Needy("p"), "b": Needy("q")}
    assert make(several=None).several is None


def test_what_is_left_out_takes_its_default():
    assert make() == Outer("x", Inner(), None)
    assert make(inner={}) == make()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inner": {"rtae": 1}}, "file.yaml at rtae: unknown key 'inner.rtae'. Did you mean 'inner.rate'? The keys of"),
        ({"zzz": 1}, "unknown key 'zzz'. The keys of the configuration are: name, inner, extra, several."),
        ({"inner": {"items": [{"weigth": 1}]}}, "unknown key 'inner.items.0.weigth'. Did you mean 'inner.items.0.weight'?"),
        ({"inner": {"rate": "fast"}}, "file.yaml at rate: inner.rate must be float, got 'fast' (text)."),
        ({"inner": {"rate": True}}, "inner.rate must be float, got True (true or false)."),
        ({"inner": {"rate": None}}, "inner.rate must be float, got null."),
        ({"inner": {"count": 1.5}}, "inner.count must be int, got 1.5 (float)."),
        ({"inner": {"count": True}}, "inner.count must be int, got True"),
        ({"inner": {"on": 1}}, "inner.on must be true or false, got 1 (int)."),
        ({"inner": {"kind": "fancie"}}, "inner.kind must be one of plain, fancy, got 'fancie'. Did you mean 'fancy'?"),
        ({"inner": {"limit": "none"}}, "inner.limit must be int, got 'none'"),
        ({"inner": {"items": {"weight": 1}}}, "inner.items must be a list of a section with the keys weight, label, got"),
        ({"inner": {"items": [3]}}, "inner.items.0 must be a section with the keys weight, label, got 3 (int)."),
        ({"inner": {"depths": [1, "2"]}}, "inner.depths.1 must be int, got '2' (text)."),
        ({"inner": {"options": [1]}}, "inner.options must be a mapping, got [1]"),
        ({"inner": {"ratio": [1]}}, "inner.ratio must be float or text, got [1]"),
        ({"inner": {"betas": [0.9]}}, "inner.betas must be a list of 2: float, float, got [0.9] (a list)."),
        ({"inner": 3}, "inner must be a section with the keys rate, count"),
        ({"inner": None}, "inner must be a section with the keys rate, count"),
        ({"name": 3}, "name must be text, got 3 (int)."),
        ({"extra": {}}, "file.yaml at extra: extra.path must be set."),
        ({"inner": {"rate": -1}}, "file.yaml at inner: inner: rate must be above 0, got -1.0."),
        ({"several": {"a": {"path": "p"}, "b": {"pth": "q"}}}, "unknown key 'several.b.pth'. Did you mean 'several.b.path'?"),
        ({"several": {"pth": "p"}}, "unknown key 'several.pth'. Did you mean 'several.path'?"),
        ({"several": 3}, "several must be a section with the keys path or a mapping"),
        ({"inner": {"items": [{}]}}, "inner.items.0.weight must be set."),
    ],
)
def test_mistakes(values, words):
    with pytest.raises(ConfigError) as error:
        make(**values)
    assert words in str(error.value)


def test_a_missing_key_and_a_configuration_that_is_no_mapping():
    with pytest.raises(ConfigError, match=r"^file: name must be set\.$"):
        build(Outer, {}, lambda path: "file")
    with pytest.raises(ConfigError, match="must be a section with the keys name, inner, extra, several, got null"):
        build(Outer, None, lambda path: "file")


@dataclass(frozen=True)
class Listed:
    kind: Literal["plain", "fancy"] = "plain"
    level: Literal[1, 2] | None = None
    switch: bool | Literal["auto"] = False
    several: list[Literal["a", "b"]] = field(default_factory=list)
    free: str | list[int] = ""
    rate: float = 1.0

    def __post_init__(self):
        check(self, ("rate", self.rate > 0, "above 0"), ("rate", self.rate < 9, "below 9"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "fancie"}, "kind must be one of plain, fancy, got 'fancie'."),
        ({"level": 3}, "level must be one of 1, 2 or null, got 3."),
        ({"level": True}, "level must be one of 1, 2 or null, got True."),
        ({"switch": "on"}, "switch must be true or false or one of auto, got 'on'."),
        ({"several": ["a", "c"]}, "several must be a list of one of a, b, got ['a', 'c']."),
        ({"rate": 0.0}, "rate must be above 0, got 0.0."),
        ({"rate": 9.0}, "rate must be below 9, got 9.0."),
    ],
)
def test_a_value_that_its_type_does_not_list_or_a_rule_refuses(values, message):
    with pytest.raises(UserError) as error:
        Listed(**values)
    assert str(error.value) == message


@dataclass(frozen=True)
class Folder:
    path: str | None = None

    def __post_init__(self) -> None:
        expand_home(self, "path")


def test_a_tilde_becomes_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [Folder(path).path for path in (None, "~", "~/a", "./~", "a~")] == [None, "/home/me", "/home/me/a", "./~", "a~"]


def test_values_that_their_types_list():
    for values in ({}, {"kind": "fancy", "level": 2}, {"switch": True}, {"switch": "auto", "several": ["b", "a"], "free": [7]}):
        Listed(**values)
