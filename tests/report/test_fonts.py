"""Japanese names are drawn with characters, not boxes, where the machine has a font for them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fedsplit.report import fonts
from fedsplit.report.plots import write_plots
from tests.report import samples

NAME = "検査ライン一号"


def drawn(text: str) -> np.ndarray:
    with rc_context(fonts.style_for([text])):
        figure = Figure(figsize=(3, 1), dpi=100)
        figure.text(0.05, 0.3, text, fontsize=24)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., 0]


def test_latin_texts_need_no_other_font() -> None:
    assert fonts.style_for(["line-a", "Prüfstand Ω → ∞"]) == {}


def test_japanese_names_are_characters() -> None:
    if fonts.wide_font() is None:
        pytest.skip("no font with Japanese characters here: apt-get install fonts-noto-cjk")
    # Boxes would all look the same.
    assert not np.array_equal(drawn("検"), drawn("査"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(f"{NAME} line-a")


def test_without_a_font_it_is_told_and_the_plot_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "wide_files", lambda: ())
    fonts.wide_font.cache_clear()
    fonts._tell_once.cache_clear()
    lines = samples.metrics()
    named = [m.model_copy(update={"site": f"{NAME}-{m.site}"}) for m in lines]
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            written = write_plots(samples.write(tmp_path, named, samples.summary(named)))
    finally:
        fonts.wide_font.cache_clear()
    assert "fonts-noto-cjk" in caplog.text
    with Image.open(written[0]) as image:
        assert min(image.size) > 400
