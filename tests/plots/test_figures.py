"""Every figure says what it found, shows what it was given, and is written whole."""

import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import simplejpeg
from conftest import SMALL, samples_of, square
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from carvana import plots, rle
from carvana.data.images import Archive
from carvana.data.statistics import background_contrast, mask_oddities
from carvana.plots import explore, style
from carvana.plots import scores as score_figures


@pytest.fixture(scope="module")
def samples():
    """Two cars in 16 views: car a of 10 x 10, car b of 20 x 20 pixels, both with their corner at 10, 20."""
    views = range(1, 17)
    return samples_of({(car, view): square(10, 20, size) for car, size in (("a", 10), ("b", 20)) for view in views})


@pytest.fixture(scope="module")
def archive(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    for name in samples["img"]:
        (folder / name).write_bytes(simplejpeg.encode_jpeg(np.full((*SMALL, 3), 200, np.uint8)))
    return Archive(folder, ".jpg")


@pytest.fixture(autouse=True)
def no_warnings():
    """A figure that does not fit its page, or a scale that cannot show a value, is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scores(dice=(0.9, 0.8, 0.7, 0.6)):
    """Two cars with two views each."""
    rows = pd.DataFrame({"car": ["a", "a", "b", "b"], "view": [1, 2, 1, 2], "fold": [0, 0, 1, 1], "dice": dice})
    return rows.assign(edge_1=30, edge_3=20, edge_10=25, missed=15, extra=10)


def title(ax):
    return ax.get_title(loc="left")


def draw(figure):
    """A figure after drawing; no title is cut off at the page's side."""
    figure.canvas.draw()
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_weight() == "bold"):
        assert text.get_window_extent().x1 <= figure.bbox.width, text.get_text()
    return figure


def images(figure):
    return [ax for ax in figure.axes if ax.images]


def test_turntable_shows_sixteen_views_and_tells_the_smallest_and_largest(archive, samples):
    figure = draw(plots.turntable(archive, samples, "a"))
    assert len(images(figure)) == 16
    assert figure.get_suptitle() == "Car a covers 4.2% of the image (view 1) to 4.2% (view 1)"  # 100 / 2400
    assert images(figure)[2].get_title() == "view 3: 4.2% car"


def test_areas_names_the_views_with_most_and_least_car():
    masks = {(car, view): square(0, 0, 10 * view) for car in "ab" for view in (1, 2)}
    (ax,) = draw(plots.areas(samples_of(masks))).axes
    assert title(ax) == "View 2 shows most car (16.7%), view 1 least (4.2%)"
    assert "share of the image" in ax.get_ylabel()


def test_mean_mask_shows_mean_and_spread_of_each_view(samples):
    figure = draw(plots.mean_mask(samples))
    shown = [ax for ax in images(figure) if ax.get_title()]
    assert [ax.get_title() for ax in shown[15:17]] == ["view 16", "view 1"]  # means, then spreads
    assert [bar.get_ylabel() for bar in figure.axes[-2:]] == ["cars that cover it", "standard deviation"]
    mean, spread = (shown[at].images[0].get_array() for at in (0, 16))
    assert mean.shape == (5, 8)  # an eighth of 40 x 60, rounded
    assert mean.mean() == pytest.approx((100 + 400) / 2 / 2400, abs=0.003)
    assert spread.max() == pytest.approx(0.5)  # where one of the two cars is: values 0 and 1
    assert figure.get_suptitle().endswith("cars differ most in view 1")


def test_areas_by_make_joins_rare_makes_and_keeps_cars_without_one():
    sizes = {"a": 10, "b": 12, "c": 20, "d": 30, "e": 25}
    samples = samples_of({(car, 1): square(0, 0, size) for car, size in sizes.items()})
    makes = pd.Series({"a": "Audi", "b": "Audi", "c": "BMW", "d": "", "z": "Ford"})  # e is in no table
    (ax,) = draw(plots.areas_by_make(samples, makes, count=1)).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Audi (2)", "other makes (1)", "unknown (2)"]
    assert title(ax) == "Areas: makes from Audi (5.1%) to Audi (5.1%), cars from 4.2% to 37.5%"  # 122 of 2400 pixels
    (ax,) = draw(plots.areas_by_make(samples, makes[:0])).axes
    assert (title(ax), ax.get_yticklabels()[0].get_text()) == ("Areas: cars from 4.2% to 37.5%", "unknown (5)")


def test_contrast_is_the_distance_of_a_cars_colour_from_the_backgrounds(tmp_path):
    samples = samples_of({(car, 1): square(10, 20, 20) for car in "abc"})
    for car, grey in (("a", 0), ("b", 255), ("c", 210)):
        image = np.where(square(10, 20, 20), grey, 255).astype(np.uint8)
        (tmp_path / f"{car}_01.jpg").write_bytes(simplejpeg.encode_jpeg(np.stack([image] * 3, -1).copy(), quality=98))
    colours = background_contrast(Archive(tmp_path, ".jpg"), samples)
    assert colours.index.tolist() == ["b", "c", "a"]  # nearest first
    assert colours.loc["a", "contrast"] == pytest.approx(100, abs=2)  # black on white
    assert colours.loc["b", "contrast"] < 2
    assert colours.loc["c", ["red", "green", "blue"]].tolist() == pytest.approx([210 / 255] * 3, abs=0.02)
    (ax,) = draw(plots.contrasts(colours)).axes
    assert title(ax) == "1 of 3 cars have a colour within 15 of the background's"


def test_odd_masks_show_one_row_for_each_kind(archive, samples):
    odd = mask_oddities(samples).assign(fragment=0)
    odd.at[3, "hole"], odd.at[3, "hole_at"] = 7, (20, 15)
    figure = draw(plots.odd_masks(archive, samples, odd))
    shown = [ax.get_title() for ax in images(figure)]
    assert shown == ["a_04.jpg\ngap of 7 pixels"]  # areas are as expected, and there is no patch
    assert figure.get_suptitle() == "The oddest of 32 masks: area off by 0%, patch of 0, gap of 7 pixels"


def test_a_mask_of_half_the_expected_area_is_off_by_half(archive, samples):
    odd = mask_oddities(samples).assign(fragment=0, hole=0)
    odd.loc[3, "ratio"] = 0.5
    assert "area off by 50%," in plots.odd_masks(archive, samples, odd).get_suptitle()


def test_fold_balance_counts_held_out_cars_apart(samples):
    folds = pd.DataFrame({"car": ["a", "b"], "fold": [-1, 0]})
    (ax,) = draw(plots.fold_balance(samples, folds)).axes
    assert title(ax) == "Folds hold 16 images; mean areas are 16.7% to 16.7%"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["held out (1)", "fold 0 (1)"]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[pytest.approx(1 / 24)], [pytest.approx(1 / 6)]]
    assert ax.lines[0].get_color() == style.HOLDOUT_COLOUR


def competition(archive, samples):
    """What the overlays take of a competition."""
    return SimpleNamespace(train_images=archive, samples=samples)


def rgb(colour):
    return 255 * np.array(to_rgb(colour))


MISSED, TAKEN = style.ERROR_TEXTS  # their colours


def test_overlays_paint_wrong_pixels_in_their_colours(archive, samples):
    data = competition(archive, samples.assign(rle=rle.encode(square(10, 20, 20))))
    figure = draw(plots.error_overlays(data, {"a_01.jpg": square(10, 25, 20)}, {"a_01.jpg": "first"}))
    whole, spot = images(figure)
    assert (whole.get_title(), spot.get_title()) == ("first", "where most is wrong")
    assert figure.get_suptitle() == "Of the wrong pixels 50% are car missed, the others background taken for car"
    seen = {tuple(pixel) for pixel in whole.images[0].get_array().reshape(-1, 3)}
    for colour in (MISSED, TAKEN):
        expected = 0.25 * 200 + 0.75 * rgb(colour)
        assert min(np.abs(np.array(pixel) - expected).max() for pixel in seen) <= 1
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["car missed", "background taken for car", "true edge"]


def test_outlines_show_one_panel_an_image_even_where_the_mask_is_empty(archive):
    probabilities = (p.astype(np.float32) for p in (square(10, 20, 20), square(0, 0, 0)))
    figure = draw(plots.predicted_outlines(archive, ["a_01.jpg", "a_02.jpg"], probabilities))
    assert [ax.get_title() for ax in images(figure)] == ["a_01.jpg", "a_02.jpg"]
    assert figure.get_suptitle() == "Predicted cars cover 0.0% to 16.7% of the image"
    assert [len(ax.collections) for ax in images(figure)] == [1, 0]


def test_dice_by_view_and_by_car_name_the_worst():
    (ax,) = draw(score_figures.dice_by_view(scores())).axes
    assert title(ax) == "Hardest is view 2 with 0.700000, easiest view 1 with 0.800000"
    (ax,) = draw(score_figures.dice_by_car(scores())).axes
    assert title(ax) == "70% of all lost Dice is lost on the worst 1 of 2 cars"  # 0.35 of 0.15 + 0.35
    assert ax.texts[0].get_text() == "b  0.650000"


def test_a_view_in_which_all_cars_score_alike_is_drawn_too():
    for dice in np.random.default_rng(0).uniform(0.1, 0.9, 40):  # the interval ends where rounding leads
        score_figures.dice_by_view(scores().assign(dice=dice))


def test_error_parts_tell_how_much_is_at_the_edge():
    (ax,) = draw(score_figures.error_parts(scores())).axes
    assert title(ax) == "50% of the wrong pixels lie within 3 pixels of the true edge"
    assert ax.texts[0].get_text() == "30.0%, 30 pixels an image"
    assert len(ax.patches) == 5


@pytest.mark.parametrize(
    "dice", [(0.9, 0.8, 0.7, 0.6), (1, 1, 1, 1), (0, 1, 0.5, 0.5), (0.9951, 0.9952, 0.9953, 0.9954)]
)
def test_charts_of_scores_bear_perfect_and_empty_predictions(dice):
    (ax,) = draw(score_figures.dice_distribution(scores(dice))).axes
    assert f"{np.median(dice):.6f}" in title(ax)
    assert len(ax.get_xticks()) >= 2
    draw(score_figures.dice_by_car(scores(dice)))
    draw(score_figures.dice_by_view(scores(dice)))


def test_error_maps_paint_each_view_by_what_is_wrong_there():
    maps = {view: np.zeros((3, 4, 6), np.float32) for view in (1, 2)}
    maps[1][0, 1, 2] = 2  # missed in both images of view 1
    maps[2][1, 3, 3] = 1  # background taken for car in one of two
    maps[1][2, 1:3, 1:5] = 2
    figure = draw(score_figures.error_maps(maps, scores(), SMALL[0] / SMALL[1]))
    first, second = images(figure)
    assert figure.get_suptitle() == "View 1 has most wrong pixels, 4.17% of the image"  # 1 of 24 places
    assert second.get_title() == "view 2: 2.08% wrong"
    painted = first.images[0].get_array()
    assert painted[1, 2].tolist() == pytest.approx(to_rgb(MISSED), abs=0.02)
    assert (painted[3, 3] == 1).all()
    assert (len(first.collections), len(second.collections)) == (1, 0)  # view 2 has no car to outline


def test_thresholds_name_the_best_and_what_it_gains():
    rows = [(0.4, 0.9, -0.01, -0.02, 0.01), (0.5, 0.91, 0, 0, 0), (0.6, 0.915, 0.005, 0.001, 0.01)]
    table = pd.DataFrame(rows, columns=["threshold", "dice", "gain", "low", "high"])
    (ax,) = draw(score_figures.dice_by_threshold(table)).axes
    assert title(ax) == "Threshold 0.6 is best with 0.915000, 0.005000 above 0.5"


def test_saved_errors_are_full_size_and_zoomed_and_replace_older_ones(archive, samples, tmp_path):
    (tmp_path / "old.jpg").write_bytes(b"")
    data = competition(archive, samples.assign(rle=rle.encode(square(10, 20, 20))))
    plots.save_errors(data, {"a_01.jpg": square(10, 25, 20)}, ["a_01.jpg"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_01.jpg", "a_01_zoom.jpg"]
    full, zoom = (simplejpeg.decode_jpeg((tmp_path / f"a_01{part}.jpg").read_bytes()) for part in ("", "_zoom"))
    assert full.shape == (*SMALL, 3)
    assert zoom.shape == (267, 400, 3)  # a window of 10 x 15 pixels
    missed = 0.25 * 200 + 0.75 * rgb(MISSED)
    assert np.abs(zoom.reshape(-1, 3) - missed).max(1).min() < 12  # but for what the JPEG changes
    assert (full[0, 0] == pytest.approx([200] * 3, abs=3)) and full[20, 44] @ [0, 0, 1] > full[20, 44] @ [1, 0, 0]


def test_gains_count_only_what_is_sure():
    rows = [("without none", 0.9, 0.92, 0.02, 0.01, 0.03, 4), ("a", 0.91, 0.92, 0.01, -0.01, 0.03, 4)]
    table = pd.DataFrame(rows, columns=["variant", "dice", "ensemble", "gain", "low", "high", "images"])
    (ax,) = draw(score_figures.gains(table)).axes
    assert title(ax) == "The ensemble is surely better than 1 of 2 simpler variants"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["run a alone", "without the unflipped image"]
    (ax,) = draw(score_figures.gains(table[:0])).axes
    assert title(ax) == "Nothing to compare"


def test_a_variant_is_told_by_what_it_lacks():
    variants = ["without hflip", "without scale1.25", "fold 3", "fold x"]
    texts = ["without the mirrored image", "without the image 1.25 times as large", "fold 3 alone", "run fold x alone"]
    assert [score_figures.variant_text(variant) for variant in variants] == texts


def test_test_areas_count_what_lies_outside_the_training_range():
    train, test = pd.DataFrame({"area": [0.1, 0.2, 0.3]}), pd.DataFrame({"area": [0.2, 0.2, 0.5]})
    (ax,) = draw(explore.test_areas(test, train)).axes
    assert title(ax) == "Median area 20.0% against 20.0% in training; 1 of 3 outside the training range"


def test_a_saved_figure_is_a_png_and_is_handed_back_to_be_shown(tmp_path):
    figure = score_figures.dice_by_view(scores())
    assert plots.save(figure, tmp_path / "figures" / "views.png") is figure
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["views.png"]
    assert (tmp_path / "figures" / "views.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_colour_has_one_meaning():
    palette = [style.TRUE_COLOUR, style.PREDICTED_COLOUR, *style.ERROR_TEXTS, *style.EDGE_COLOURS]
    palette += [style.SERIES_COLOUR, style.HIGHLIGHT_COLOUR, style.HOLDOUT_COLOUR, *style.FOLD_COLOURS]
    assert len(set(palette)) == len(palette)
    assert style.fold_colour(-1) == style.HOLDOUT_COLOUR
    assert style.fold_colour(0) == style.fold_colour(len(style.FOLD_COLOURS))
