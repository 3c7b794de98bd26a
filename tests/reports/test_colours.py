"""The colours of curves differ for colour-blind readers too, and stand out from the page."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import gemma2_jax
from gemma2_jax.reports.colours import COLOURS, REST, colours
from gemma2_jax.reports.groups import RunGroup
from gemma2_jax.reports.reported_runs import Run

# Machado, Oliveira and Fernandes, A physiologically-based model for simulation of color vision deficiency, 2009,
# severity 1.0, for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def palettes() -> list[tuple[str, list[str]]]:
    """Surface and colours of the light and of the dark page."""
    text = (Path(gemma2_jax.__file__).parent / "reports/page.css").read_text()
    surfaces = re.findall(r"--surface: (#\w{6})", text)
    found = [re.findall(rf"--c{number}: (#\w{{6}})", text) for number in range(COLOURS)]
    return [(surface, [each[place] for each in found]) for place, surface in enumerate(surfaces)]


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB under D65."""
    x, y, z = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(1)
    fx, fy, fz = (np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("vision", VISIONS)
def test_every_two_colours_differ(vision: str) -> None:
    assert len(palettes()) == 2
    for _, found in palettes():
        seen = [lab(VISIONS[vision] @ linear(colour)) for colour in found]
        assert min(np.linalg.norm(one - two) for one, two in itertools.combinations(seen, 2)) > 18


def test_colours_stand_out_from_the_page() -> None:
    for surface, found in palettes():
        levels = [0.05 + XYZ[1] @ linear(colour) for colour in (surface, *found)]
        assert all(max(level, levels[0]) / min(level, levels[0]) >= 3 for level in levels[1:])  # WCAG 1.4.11


def groups(count: int, **values: str) -> list[RunGroup]:
    """Groups of one run each, the last one best."""
    runs = [
        Run(str(place), Path("."), scores={"cross_entropy": -place}, values=values) for place in range(count)
    ]
    return [RunGroup(run.name, (run,)) for run in runs]


def test_after_the_colours_come_dashes_and_then_grey() -> None:
    few = colours(groups(9))
    assert (few["0"], few["6"], few["7"], few["8"]) == ("c0", "c6", "c0 d1", "c1 d1")
    many = colours(groups(20))
    assert [name for name, style in many.items() if style == REST] == [str(place) for place in range(6)]
    swept = colours(groups(20, key="value"))
    assert sorted(style for style in swept.values() if style != REST) == [f"c{number}" for number in range(7)]
    assert swept["19"] == "c0"
