"""Bounds set at run time: kept privately, laid over the catalog, and said."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path
from typing import Any

import pytest

from serving.catalog.spec import Catalog, ModelSpec
from serving.cli import bounds, cluster, scale, up
from serving.cli.bounds import Bounds
from serving.errors import OperatorError
from serving.fleet import manifest
from serving.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(state_dir=tmp_path)


def catalog(**scaling: Any) -> Catalog:
    versions = [{"version": v, "engine": {"kind": "simulator"}, "scaling": scaling} for v in ("a", "b")]
    model = ModelSpec.model_validate({"name": "m", "versions": versions, "release": {"stable": "a"}})
    return Catalog((model,), {"m": Path("/")})


def test_they_are_kept_for_the_owner_alone_and_nothing_is_kept_of_none(settings: Settings) -> None:
    bounds.write(settings, {"m@a": Bounds(min=0, max=3)})
    assert bounds.read(settings) == {"m@a": Bounds(min=0, max=3)}
    assert stat.S_IMODE(bounds.path(settings).stat().st_mode) == 0o600
    bounds.write(settings, {})
    assert not bounds.path(settings).exists() and bounds.read(settings) == {}


def test_they_lie_over_the_model_file_and_are_said(settings: Settings) -> None:
    bounds.write(settings, {"m@a": Bounds(min=2, max=5), "gone@a": Bounds(min=1, max=1)})
    laid, said = bounds.laid_over(catalog(min=1, max=2), settings)
    assert [(v.scaling.min, v.scaling.max) for _, v in laid.versions()] == [(2, 5), (1, 2)]
    assert len(said) == 2 and "gone@a" in said[0]
    assert "m@a: 2 to 5 replicas, set by `steelyard scale set`, not 1 to 2" in said[1]


def served(laid: Catalog) -> dict[str, Any]:
    """The applications of a catalog by name, as Serve tells them again."""
    config = manifest.serve_config(laid, gateways=1, locate=lambda source, base: Path(source))
    return {app["name"]: app for app in config["applications"]}


@pytest.mark.parametrize(("min_", "max_"), [(1, 2), (0, 3), (2, 2)])
def test_bounds_set_at_run_time_are_served_as_a_later_up_serves_them(settings: Settings, min_: int, max_: int) -> None:
    of_file = catalog(min=0, max=2, idle_to_zero_s=60)
    apps = served(of_file)
    scale.set_bounds(apps, "m@a", Bounds(min=min_, max=max_))
    bounds.write(settings, {"m@a": Bounds(min=min_, max=max_)})
    assert apps == served(bounds.laid_over(of_file, settings)[0])
    scale.set_bounds(apps, "m@a", Bounds(min=0, max=2))
    assert apps == served(of_file), "and nothing is lost on the way back"


@pytest.fixture
def on_head(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A head that serves `m@a` and `m@b`, and takes no other config."""

    def refuses(*_: Any) -> None:
        raise TimeoutError("Serve")

    monkeypatch.setattr(scale, "_on_head", contextlib.nullcontext)
    monkeypatch.setattr(scale, "_apply", refuses)
    monkeypatch.setattr(cluster, "deployed_apps", lambda: served(catalog(min=1, max=2)))
    monkeypatch.setattr(up, "load_catalog", lambda _: catalog(min=1, max=2))
    return settings


def test_bounds_that_were_not_applied_are_not_kept(on_head: Settings) -> None:
    with pytest.raises(TimeoutError):
        scale.set_("m@a", min_=2, state_dir=on_head.state_dir)
    assert bounds.read(on_head) == {}
    kept = {"m@a": Bounds(min=2, max=2)}
    bounds.write(on_head, kept)
    with pytest.raises(TimeoutError):
        scale.reset("m@a", state_dir=on_head.state_dir)
    assert bounds.read(on_head) == kept


def test_bounds_of_a_version_that_left_the_catalog_can_be_forgotten(
    on_head: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"m@a": Bounds(min=2, max=2)}
    bounds.write(on_head, kept | {"old@v": Bounds(min=2, max=3)})
    scale.reset("old@v", state_dir=on_head.state_dir)
    assert bounds.read(on_head) == kept
    assert capsys.readouterr().out == "old@v: its bounds are forgotten; it is not served\n"


def test_commands_that_change_what_is_served_take_turns(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_TURN_S", 0.0)
    another = pytest.raises(OperatorError, match="another command is changing what is served")
    with cluster.only_writer(settings), another, cluster.only_writer(settings):
        raise AssertionError("two at once")
    with cluster.only_writer(settings):
        pass


def test_equal_bounds_are_not_worth_a_word(settings: Settings) -> None:
    bounds.write(settings, {"m@a": Bounds(min=1, max=2)})
    assert bounds.laid_over(catalog(min=1, max=2), settings)[1] == []


@pytest.mark.parametrize(
    "text", ["{", '{"m@a": {"min": 3, "max": 2}}', '{"m@a": {"min": 1}}', '{"m@a": {"min": 1, "max": 1, "x": 1}}']
)
def test_a_file_that_cannot_be_is_one_error_that_names_it(settings: Settings, text: str) -> None:
    bounds.path(settings).write_text(text)
    with pytest.raises(OperatorError, match=r"scaling\.json.*remove it"):
        bounds.read(settings)


@pytest.mark.parametrize(("min_", "max_"), [(-1, 1), (0, 0), (2, 1), (1, 257)])
def test_impossible_bounds_are_refused(min_: int, max_: int) -> None:
    with pytest.raises(ValueError, match=r"min|max"):
        Bounds(min=min_, max=max_)
