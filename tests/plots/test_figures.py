"""Every figure says what it found, shows what it was given, and is written whole."""

import warnings

import numpy as np
import pandas as pd
import pytest
import simplejpeg
from matplotlib.colors import to_rgb

from carvana import rle
from carvana.data import competition as photos
from carvana.plots import explore as figures
from carvana.plots import overlays
from carvana.plots import scores as score_figures

HEIGHT, WIDTH = 40, 60


def square(top, left, size, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + size, left : left + size] = True
    return mask


def table(masks):
    """An index as photos.index gives it, from {(car, view): mask}."""
    rows = [(f"{car}_{view:02d}.jpg", car, view, rle.encode(mask), mask.mean()) for (car, view), mask in masks.items()]
    return pd.DataFrame(rows, columns=["img", "car", "view", "rle", "area"]).assign(height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="module")
def pictures():
    """Two cars in 16 views: car a of 10 x 10, car b of 20 x 20 pixels, both with their corner at 10, 20."""
    return table({(car, view): square(10, 20, size) for car, size in (("a", 10), ("b", 20)) for view in range(1, 17)})


@pytest.fixture(scope="module")
def archive(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    for name in pictures["img"]:
        (folder / name).write_bytes(simplejpeg.encode_jpeg(np.full((HEIGHT, WIDTH, 3), 200, np.uint8)))
    return photos.Archive(folder, ".jpg")


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
    figure.canvas.draw()
    return figure


def images(figure):
    return [ax for ax in figure.axes if ax.images]


def test_turntable_shows_sixteen_views_and_tells_the_smallest_and_largest(archive, pictures):
    figure = draw(overlays.turntable(archive, pictures, "a"))
    assert len(images(figure)) == 16
    assert figure.get_suptitle() == "Car a covers 4.2% of the picture (view 1) to 4.2% (view 1)"  # 100 / 2400
    assert images(figure)[2].get_title() == "view 3: 4.2% car"


def test_areas_names_the_views_with_most_and_least_car():
    masks = {(car, view): square(0, 0, 10 * view) for car in "ab" for view in (1, 2)}
    left, right = draw(figures.areas(table(masks))).axes
    assert title(left) == "View 2 shows most car (16.7%), view 1 least (4.2%)"
    assert "share of the picture" in left.get_ylabel()
    assert title(right) == "Cars: 10.4% to 10.4%"


def test_mean_mask_shows_mean_and_spread_of_each_view(pictures):
    figure = draw(figures.mean_mask(pictures))
    shown = [ax for ax in images(figure) if ax.get_title()]
    assert [ax.get_title() for ax in shown[15:17]] == ["view 16: mean", "view 1: spread"]
    mean, spread = (shown[at].images[0].get_array() for at in (0, 16))
    assert mean.shape == (5, 8)  # an eighth of 40 x 60, rounded
    assert mean.mean() == pytest.approx((100 + 400) / 2 / 2400, abs=0.003)
    assert spread.max() == pytest.approx(0.5)  # where one of the two cars is: values 0 and 1
    assert figure.get_suptitle().endswith("cars differ most in view 1")


def test_areas_by_make_joins_rare_makes_and_keeps_cars_without_one():
    sizes = {"a": 10, "b": 12, "c": 20, "d": 30, "e": 25}
    pictures = table({(car, 1): square(0, 0, size) for car, size in sizes.items()})
    makes = pd.Series({"a": "Audi", "b": "Audi", "c": "BMW", "d": "", "z": "Ford"})  # e is in no table
    (ax,) = draw(figures.areas_by_make(pictures, makes, shown=1)).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Audi (2)", "other makes (1)", "unknown (2)"]
    assert title(ax) == "Makes go from Audi (5.1%) to Audi (5.1%), cars from 4.2% to 37.5%"  # 122 of 2400 pixels
    (ax,) = draw(figures.areas_by_make(pictures, makes[:0])).axes
    assert (title(ax), ax.get_yticklabels()[0].get_text()) == ("0 of 5 cars have a known make", "unknown (5)")


def test_contrast_is_the_distance_of_a_cars_colour_from_the_walls(tmp_path):
    pictures = table({(car, 1): square(10, 20, 20) for car in "abc"})
    for car, grey in (("a", 0), ("b", 255), ("c", 210)):
        image = np.where(square(10, 20, 20), grey, 255).astype(np.uint8)
        (tmp_path / f"{car}_01.jpg").write_bytes(simplejpeg.encode_jpeg(np.stack([image] * 3, -1).copy(), quality=98))
    found = overlays.wall_contrast(photos.Archive(tmp_path, ".jpg"), pictures)
    assert found.index.tolist() == ["b", "c", "a"]  # nearest first
    assert found.loc["a", "contrast"] == pytest.approx(100, abs=2)  # black on white
    assert found.loc["b", "contrast"] < 2
    assert found.loc["c", ["red", "green", "blue"]].tolist() == pytest.approx([210 / 255] * 3, abs=0.02)
    (ax,) = draw(overlays.contrasts(found)).axes
    assert title(ax) == "1 of 3 cars have a colour within 15 of the wall's"


def test_oddities_find_patch_gap_and_area_and_where_they_are():
    odd_one = square(0, 0, 20)
    odd_one[30:32, 50:55] = True  # a patch of 10 pixels
    odd_one[5:8, 5:8] = False  # a gap of 9 pixels
    masks = {(car, view): square(0, 0, 20) for car in "abc" for view in (1, 2, 3)} | {("b", 2): odd_one}
    masks[("c", 3)] = square(0, 0, 10)
    found = figures.oddities(table(masks)).set_index("img")
    odd = found.loc["b_02.jpg"]
    assert (odd["fragment"], odd["fragment_at"]) == (10, (52, 30.5))
    assert (odd["hole"], odd["hole_at"]) == (9, (6, 6))
    assert found.loc["c_03.jpg", "ratio"] == pytest.approx(1 / 4)
    assert found["ratio"].drop("c_03.jpg").between(0.99, 1.01).all()
    assert (found.drop("b_02.jpg")[["fragment", "hole"]] == 0).all(axis=None)


def test_a_gap_that_opens_to_the_border_and_an_empty_mask_are_no_holes():
    open_gap = square(0, 0, 40)
    open_gap[0:30, 10:20] = False
    found = figures.oddities(table({("a", 1): open_gap, ("b", 1): square(0, 0, 0), ("c", 1): square(0, 0, 40)}))
    assert (found[["fragment", "hole"]] == 0).all(axis=None)


def test_odd_pictures_show_one_row_for_each_kind(archive, pictures):
    odd = figures.oddities(pictures).assign(fragment=0)
    odd.loc[3, ["hole", "hole_at"]] = [7, (20, 15)]
    figure = draw(overlays.odd_pictures(archive, pictures, odd, columns=2))
    shown = [ax.get_title() for ax in images(figure)]
    assert shown == ["a_04.jpg\ngap of 7 pixels"]  # areas are as expected, and there is no patch
    assert figure.get_suptitle() == "The oddest of 32 masks: area off by 0%, patch of 0, gap of 7 pixels"


def test_fold_balance_counts_held_out_cars_apart(pictures):
    dealt = pd.DataFrame({"car": ["a", "b"], "fold": [-1, 0]})
    left, right = draw(figures.fold_balance(pictures, dealt)).axes
    assert title(left) == "Folds hold 16 to 16 pictures"
    assert [label.get_text() for label in left.get_xticklabels()] == ["held out", "0"]
    assert title(right) == "Mean areas lie between 4.2% and 16.7%"


def test_overlays_paint_missed_and_extra_pixels_in_their_colours(archive):
    true, predicted = square(10, 20, 20), square(10, 25, 20)
    figure = draw(overlays.errors(archive, ["a_01.jpg"], [predicted.astype(np.float32)], [true], ["first"]))
    whole, spot = images(figure)
    assert (whole.get_title(), spot.get_title()) == ("first", "where most is wrong")
    assert figure.get_suptitle() == "Of the wrong pixels 50% are car missed, the others wall taken for car"
    seen = {tuple(pixel) for pixel in whole.images[0].get_array().reshape(-1, 3)}
    for colour in (figures.MISSED, figures.EXTRA):
        colour = 0.25 * 200 + 0.75 * np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert min(np.abs(np.array(pixel) - colour).max() for pixel in seen) <= 1
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["car missed", "wall taken for car", "true edge"]


def test_overlays_without_masks_show_one_outline_a_picture_even_where_it_is_empty(archive):
    probabilities = (p.astype(np.float32) for p in (square(10, 20, 20), square(0, 0, 0)))
    figure = draw(overlays.errors(archive, ["a_01.jpg", "a_02.jpg"], probabilities))
    assert [ax.get_title() for ax in images(figure)] == ["a_01.jpg", "a_02.jpg"]
    assert figure.get_suptitle() == "Predicted cars cover 0.0% to 16.7% of the picture"
    assert [len(ax.collections) for ax in images(figure)] == [1, 0]


def test_overlays_crop_around_the_car_in_the_shape_of_the_picture(archive):
    figure = draw(overlays.errors(archive, ["a_01.jpg"], [square(10, 20, 20).astype(np.float32)]))
    height, width = images(figure)[0].images[0].get_array().shape[:2]
    assert (height, width) == (22, 32)  # 1.08 x 20 rows, and as many columns as the picture's shape asks for


def test_dice_by_view_and_by_car_name_the_worst():
    (ax,) = draw(score_figures.dice_by_view(scores())).axes
    assert title(ax) == "Hardest is view 2 with 0.700000, easiest view 1 with 0.800000"
    (ax,) = draw(score_figures.dice_by_car(scores())).axes
    assert title(ax) == "70% of all lost Dice is lost on the worst 1 of 2 cars"  # 0.35 of 0.15 + 0.35
    assert ax.texts[0].get_text() == "b  0.650000"


def test_error_parts_tell_how_much_is_at_the_edge():
    (ax,) = draw(score_figures.error_parts(scores())).axes
    assert title(ax) == "50% of the wrong pixels lie within 3 pixels of the true edge"
    assert ax.texts[0].get_text() == "30.0%, 30 pixels a picture"
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
    maps[1][0, 1, 2] = 2  # missed in both pictures of view 1
    maps[2][1, 3, 3] = 1  # extra in one of two
    maps[1][2, 1:3, 1:5] = 2
    figure = draw(score_figures.error_maps(maps, scores(), HEIGHT / WIDTH))
    first, second = images(figure)
    assert figure.get_suptitle() == "View 1 has most wrong pixels, 4.17% of the picture"  # 1 of 24 places
    assert second.get_title() == "view 2: 2.08% wrong"
    painted = first.images[0].get_array()
    assert painted[1, 2].tolist() == pytest.approx(to_rgb(figures.MISSED), abs=0.02)
    assert (painted[3, 3] == 1).all()
    assert (len(first.collections), len(second.collections)) == (1, 0)  # view 2 has no car to outline


def test_thresholds_name_the_best_and_what_it_gains():
    rows = [(0.4, 0.9, -0.01, -0.02, 0.01), (0.5, 0.91, 0, 0, 0), (0.6, 0.915, 0.005, 0.001, 0.01)]
    table = pd.DataFrame(rows, columns=["threshold", "dice", "gain", "low", "high"])
    (ax,) = draw(score_figures.dice_by_threshold(table)).axes
    assert title(ax) == "Threshold 0.6 is best with 0.915000, 0.005000 above 0.5"


def test_saved_errors_are_full_size_and_zoomed_and_replace_older_ones(archive, tmp_path):
    (tmp_path / "old.jpg").write_bytes(b"")
    overlays.save_errors(archive, ["a_01.jpg"], [square(10, 25, 20)], [square(10, 20, 20)], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_01.jpg", "a_01_zoom.jpg"]
    full, zoom = (simplejpeg.decode_jpeg((tmp_path / f"a_01{part}.jpg").read_bytes()) for part in ("", "_zoom"))
    assert full.shape == (HEIGHT, WIDTH, 3)
    assert zoom.shape == (267, 400, 3)  # a window of 10 x 15 pixels
    missed = 0.25 * 200 + 0.75 * 255 * np.array(to_rgb(figures.MISSED))
    assert np.abs(zoom.reshape(-1, 3) - missed).max(1).min() < 12  # but for what the JPEG changes
    assert (full[0, 0] == pytest.approx([200] * 3, abs=3)) and full[20, 44] @ [0, 0, 1] > full[20, 44] @ [1, 0, 0]


def test_gains_count_only_what_is_sure():
    rows = [("none", 0.9, 0.92, 0.02, 0.01, 0.03, 4), ("a", 0.91, 0.92, 0.01, -0.01, 0.03, 4)]
    found = pd.DataFrame(rows, columns=["variant", "dice", "ensemble", "gain", "low", "high", "pictures"])
    (ax,) = draw(score_figures.gains(found)).axes
    assert title(ax) == "The ensemble is surely better than 1 of 2 simpler variants"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["over a", "over none"]
    (ax,) = draw(score_figures.gains(found[:0])).axes
    assert title(ax) == "Nothing to compare"


def test_test_areas_count_what_lies_outside_the_training_range():
    train, test = pd.DataFrame({"area": [0.1, 0.2, 0.3]}), pd.DataFrame({"area": [0.2, 0.2, 0.5]})
    (ax,) = draw(figures.test_areas(test, train)).axes
    assert title(ax) == "Middle area 20.0% against 20.0% in training; 1 of 3 outside the training range"


def test_a_saved_figure_is_a_png_and_is_handed_back_to_be_shown(tmp_path):
    figure = score_figures.dice_by_view(scores())
    assert figures.save(figure, tmp_path / "figures" / "views.png") is figure
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["views.png"]
    assert (tmp_path / "figures" / "views.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_colour_has_one_meaning():
    palette = [figures.TRUE, figures.PREDICTED, figures.MISSED, figures.EXTRA, *figures.EDGES]
    palette += [figures.DATA, figures.MARK, figures.HELD_OUT, *figures.FOLDS]
    assert len(set(palette)) == len(palette)
    assert figures.fold_colour(-1) == figures.HELD_OUT
    assert figures.fold_colour(0) == figures.fold_colour(len(figures.FOLDS))
