"""The figure of the rooms shows every room and every import."""

from __future__ import annotations

import pkgutil

import networkx as nx

import peftlib
from peftlib.report import house, pages


def test_every_package_and_module_is_a_room():
    names = {module.name for module in pkgutil.iter_modules(peftlib.__path__)}
    assert {room.name for room in house.rooms()} == names
    assert all(room.says.endswith(".") and len(room.says) > 10 for room in house.rooms())


def test_arrows_imply_exactly_the_imports():
    arrows = nx.DiGraph((room.name, name) for room in house.rooms() for name in room.arrows)
    for room in house.rooms():
        assert set(room.imports) <= nx.descendants(arrows, room.name) | set(room.arrows)
        assert set(room.arrows) <= set(room.imports)


def test_a_room_stands_above_those_that_it_imports():
    height = house.levels()
    assert all(height[room.name] > height[name] for room in house.rooms() for name in room.imports)
    assert height["methods"] > height["mechanisms"] > height["anatomy"]
    assert height["adapted"] > height["training"] > height["methods"]


def test_the_figure_and_the_page_name_every_room():
    (axes,) = house.house().axes
    shown = {text.get_text() for text in axes.texts}
    page = pages.house_page("https://example.org/blob/main")
    for room in house.rooms():
        assert room.name in shown
        assert f"`{room.name}`" in page
    assert len(axes.patches) == len(house.rooms()) + sum(len(room.arrows) for room in house.rooms())
