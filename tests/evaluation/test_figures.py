from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.report_page import GAP, MARGIN, labelled_grid

RED: NDArray[np.uint8] = np.full((64, 64, 3), (200, 0, 0), np.uint8)
BLUE: NDArray[np.uint8] = np.full((64, 64, 3), (0, 0, 200), np.uint8)


def ink(sheet: Image.Image) -> NDArray[np.bool_]:
    """Where the sheet is not white."""
    found: NDArray[np.bool_] = np.asarray(sheet).min(2) < 250
    return found


@pytest.mark.parametrize("scale", [1, 3])
def test_every_picture_is_there_at_its_scale(scale: int) -> None:
    sheet = labelled_grid([("base", [RED, BLUE]), ("patched", [BLUE, BLUE])], ["a cat", "a dog"], scale=scale)
    pixels = np.asarray(sheet)
    assert (pixels == (200, 0, 0)).all(2).sum() == (64 * scale) ** 2
    assert (pixels == (0, 0, 200)).all(2).sum() == 3 * (64 * scale) ** 2


def test_margins_stay_white_even_with_long_words() -> None:
    long = "a picture of an extraordinarilylongcompoundwordwithoutspaces in the clay style on a red background"
    sheet = labelled_grid([(long, [RED]), ("b", [BLUE])], [long], title=long * 2)
    dark = ink(sheet)
    edge = MARGIN - 4  # a glyph may reach a little over its advance width
    assert not dark[:edge].any()
    assert not dark[-edge:].any()
    assert not dark[:, :edge].any()
    assert not dark[:, -edge:].any()


def test_headers_do_not_touch_the_pictures() -> None:
    sheet = labelled_grid([("base", [RED])], ["jumping quickly over gypsy fog"])
    rows = np.flatnonzero((np.asarray(sheet) == (200, 0, 0)).all(2).any(1))
    assert not ink(sheet)[rows[0] - GAP // 2 : rows[0], sheet.width // 2 :].any()


def test_the_same_grid_is_the_same_bytes() -> None:
    first, second = (labelled_grid([("base", [RED])], ["x"], title="t").tobytes() for _ in range(2))
    assert first == second


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OverpaintError, match="row 'base' has 1 pictures for 2 columns"):
        labelled_grid([("base", [RED])], ["a", "b"])
    with pytest.raises(OverpaintError, match="share one size"):
        labelled_grid([("base", [RED, BLUE[:32]])], ["a", "b"])
    with pytest.raises(OverpaintError, match="at least one row"):
        labelled_grid([], ["a"])
