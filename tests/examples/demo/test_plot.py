"""The figure is written and shows the curves."""

from matplotlib.image import imread

from examples.demo.plot import plot_losses


def test_png_shows_the_curves(tmp_path):
    falling = [(step, 2.0 / (1 + step)) for step in range(20)]
    flat = [(step, 1.0) for step in range(20)]
    plot_losses({0: (falling, falling[::5])}, tmp_path / "one.png")
    plot_losses({0: (flat, falling[::5])}, tmp_path / "other.png")
    plot_losses({0: (falling, falling[::5])}, tmp_path / "same.png")
    one, other, same = (imread(tmp_path / name) for name in ("one.png", "other.png", "same.png"))
    assert one.shape[0] > 400
    assert one.shape[1] > 700
    assert (one == same).all()
    assert (one != other).any()
