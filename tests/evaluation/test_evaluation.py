import numpy as np
import pandas as pd
import pytest
from conftest import recipe

from carvana import metrics, models, rle
from carvana.data import competition as photos
from carvana.data import dataset, folds
from carvana.evaluation import evaluate as evaluation
from carvana.files import UserError
from carvana.inference import ensemble as inference
from carvana.inference import predict as prediction
from carvana.training import trainer as training


def train_run(data, run_dir, seed=1, holdout_cars=0, **changes):
    chosen, pictures = (
        recipe(**{"epochs": 8, "batch_size": 2, "validate_every": 8, "seed": seed} | changes),
        photos.index(data),
    )
    source = dataset.Decoded(photos.photographs(data, "train"), pictures, chosen.height, chosen.width)
    table = folds.folds_of_run(run_dir, pictures, 2, holdout_cars, 1)
    for fold in (0, 1):
        training.train(training.Fold(chosen, pictures, source, table, fold, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def runs(shared_competition, tmp_path_factory):
    """Two runs on the same folds, the second at another size, with one held-out car."""
    folder = tmp_path_factory.mktemp("runs")
    train_run(shared_competition, folder / "a", holdout_cars=1)
    train_run(shared_competition, folder / "b", seed=2, holdout_cars=1, height=64, width=96)
    return [folder / "a", folder / "b"]


def evaluate(data, run_dirs, views=("none", "hflip"), maps=None):
    return evaluation.evaluate(run_dirs, photos.index(data), photos.photographs(data, "train"), list(views), 4, maps)


@pytest.fixture(scope="module")
def scores(shared_competition, runs):
    return evaluate(shared_competition, runs)


def test_every_picture_is_scored_once_by_the_fold_that_has_not_seen_its_car(scores, shared_competition, runs):
    assert scores["img"].tolist() == photos.index(shared_competition)["img"].tolist()
    expected = scores["car"].map(folds.read_folds(runs[0]).set_index("car")["fold"])
    assert scores["fold"].tolist() == expected.tolist()
    assert (scores["fold"] == folds.HOLDOUT).sum() == 4


def test_scores_equal_those_of_the_masks_that_prediction_writes(shared_competition, runs, tmp_path):
    scores = evaluate(shared_competition, runs[:1])
    photographs, pictures = photos.photographs(shared_competition, "train"), photos.index(shared_competition)
    ensemble = inference.Ensemble([runs[0] / "fold0" / "best.safetensors"], [1.0], ["none", "hflip"])
    names = scores[scores["fold"] == 0]["img"].tolist()
    prediction.predict(ensemble, photographs, names, tmp_path, 4, 0)
    predicted = pd.read_csv(tmp_path / "part-00000.csv", keep_default_na=False).set_index("img")["rle_mask"]
    truth = pictures.set_index("img")["rle"]
    for row in scores[scores["fold"] == 0].itertuples():
        masks = rle.decode(predicted[row.img], 96, 126), rle.decode(truth[row.img], 96, 126)
        assert row.dice == pytest.approx(float(metrics.dice(*metrics.counts(*masks))), abs=1e-9)


def test_training_reports_the_dice_that_evaluation_finds(shared_competition, runs):
    scores = evaluate(shared_competition, runs[:1])
    history = pd.read_csv(runs[0] / "fold1" / "history.csv")
    assert scores[scores["fold"] == 1]["dice:without hflip"].mean() == pytest.approx(history["dice"].max(), abs=1e-3)


def test_gains_are_the_mean_differences_to_each_simpler_variant(scores):
    gains = evaluation.gains(scores).set_index("variant")
    assert set(gains.index) == {"without none", "without hflip", "a", "b", "fold 0", "fold 1"}
    assert gains.loc["without hflip", "gain"] == pytest.approx((scores["dice"] - scores["dice:without hflip"]).mean())
    assert gains.loc["fold 0", "pictures"] == 4
    assert (gains["low"] <= gains["gain"]).all()
    assert (gains["gain"] <= gains["high"]).all()


def test_error_parts_sum_to_all_wrong_pixels(scores):
    wrong = scores[["edge_1", "edge_3", "edge_10", "missed", "extra"]].sum(axis=1)
    both = scores["dice"] * (scores["area"] + scores["predicted_area"]) / 2
    assert np.allclose(wrong / (96 * 126), scores["area"] + scores["predicted_area"] - 2 * both)


def test_error_maps_hold_all_wrong_pixels_also_of_folds_that_were_scored_before(shared_competition, runs, scores):
    fresh, again = {}, {}
    for path in [runs[0] / "fold0", runs[0] / "holdout"]:  # as a kill between the two files would leave it
        for kept in path.glob("errors-*.npz"):
            kept.unlink()
    evaluate(shared_competition, runs, maps=fresh)
    evaluate(shared_competition, runs, maps=again)
    assert sorted(fresh) == sorted(again) == [1, 2, 3, 4]
    for view, (missed, extra, true) in fresh.items():
        assert np.array_equal(fresh[view], again[view])
        own = scores[scores["view"] == view]
        wrong = own[["edge_1", "edge_3", "edge_10", "missed", "extra"]].to_numpy().sum() / (96 * 126)
        assert (missed + extra).mean() == pytest.approx(wrong, rel=0.02)  # the map is larger than these pictures
        assert true.mean() == pytest.approx(own["area"].sum(), rel=0.02)


def test_scores_of_a_fold_are_kept_for_each_set_of_members_and_read_again(shared_competition, runs, scores):
    evaluate(shared_competition, runs[:1])
    kept = {path: path.stat().st_mtime_ns for path in (runs[0] / "fold0").glob("scores-*.csv")}
    assert len(kept) >= 2  # of the blend, and of the run alone
    again = evaluate(shared_competition, runs)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pd.testing.assert_frame_equal(again, scores)


def test_ensemble_json_names_every_fold_of_every_run_with_its_weight(runs, scores):
    settings = evaluation.Settings([0.25, 0.75], 0.4)
    evaluation.write_results(runs[0], scores, runs, ["none"], settings)
    found = inference.Ensemble.read(runs[0] / "ensemble.json")
    assert [path.parent.parent.name for path in found.paths] == ["a", "a", "b", "b"]
    assert found.weights == [0.125, 0.125, 0.375, 0.375]
    assert found.threshold == 0.4
    assert len(pd.read_csv(runs[0] / "scores.csv")) == len(scores)


def test_other_weights_and_thresholds_are_tried_on_every_picture(scores):
    tried = set(scores.columns[scores.columns.str.startswith("try:")])
    assert {"try:0.25,0.75@0.5", "try:0.5,0.5@0.5", "try:0.75,0.25@0.5", "try:0.5,0.5@0.45"} <= tried
    assert np.allclose(scores["try:0.5,0.5@0.5"], scores["dice"])


def test_thresholds_are_compared_with_a_half_on_the_same_pictures():
    table = pd.DataFrame({"car": ["a", "b"], "dice": [0.9, 0.8], "try:1@0.4": [0.92, 0.84], "try:1@0.6": [0.9, 0.7]})
    found = evaluation.by_threshold(table)
    assert found["threshold"].tolist() == [0.4, 0.5, 0.6]
    assert found["gain"].tolist() == pytest.approx([0.03, 0, -0.05])
    assert found.loc[0, ["low", "high"]].tolist() == pytest.approx([0.02, 0.04])


def audited(disputed):
    names = [f"{car}_01.jpg" for car in "abc"[: len(disputed)]]
    table = pd.DataFrame({"img": names, "car": "a", "view": 1, "fold": 0, "dice": 0.9, "disputed": disputed})
    return table.assign(sure=0.95)


def test_the_audit_lists_disputed_masks_and_keeps_what_a_person_has_marked():
    found = evaluation.audit(audited([5, 0, 70]))
    assert found["img"].tolist() == ["c_01.jpg", "a_01.jpg"]
    assert (found["exclude"] == "").all()
    found.loc[0, "exclude"] = "x"
    again = evaluation.audit(audited([90, 0]), found)  # the marked picture was left out
    assert again[["img", "exclude"]].to_numpy().tolist() == [["a_01.jpg", ""], ["c_01.jpg", "x"]]
    assert evaluation.audit(audited([5, 0, 70]), found)["exclude"].tolist() == ["x", ""]


def test_quality_csv_is_an_exclude_list_of_what_is_marked_and_survives_another_evaluation(
    shared_competition, runs, scores
):
    photographs, quality = photos.photographs(shared_competition, "train"), runs[0] / "quality.csv"
    doubted = scores.assign(disputed=[50, 20] + [0] * (len(scores) - 2), sure=0.95)
    for _ in range(2):
        evaluation.write_results(runs[0], doubted, runs, ["none"], evaluation.Settings([0.5, 0.5], 0.5))
        marked = pd.read_csv(quality, dtype={"car": str, "exclude": str})
        marked.loc[0, "exclude"] = "x"
        marked.to_csv(quality, index=False)
    assert photos.excluded(quality, photographs) == {scores["img"].iloc[0]}
    evaluation.write_results(runs[0], doubted, runs, ["none"], evaluation.Settings([0.5, 0.5], 0.5))
    assert photos.excluded(quality, photographs) == {scores["img"].iloc[0]}


def scored(base, other):
    cars = [f"{i}" for i in range(8)]
    return pd.DataFrame({"car": cars, "fold": [0, 1] * 4, "dice": base, "try:0.25,0.75@0.5": other})


def test_settings_that_surely_gain_on_folds_left_out_are_used_with_their_honest_gain():
    found = evaluation.best_settings(scored(0.9, 0.92), 2)
    assert (found.weights, found.threshold) == ([0.25, 0.75], 0.5)
    assert found.gain == pytest.approx(0.02)


def test_settings_that_gain_on_one_fold_only_are_not_used():
    found = evaluation.best_settings(scored(0.9, [0.99, 0.85] * 4), 2)
    assert (found.weights, found.threshold) == ([0.5, 0.5], 0.5)
    assert found.low <= 0  # chosen on fold 0, lost on fold 1


def test_compared_runs_stand_best_first_with_the_paired_difference(tmp_path):
    for run, dice in (("a", [0.90, 0.92]), ("b", [0.91, 0.95]), ("c", [0.80, 0.99, 0.5])):
        table = pd.DataFrame({"img": ["1_01", "2_01", "3_01"][: len(dice)], "car": "1", "dice": dice})
        (tmp_path / run / "fold0").mkdir(parents=True)
        table.to_csv(tmp_path / run / "scores.csv", index=False)
        pd.DataFrame({"seconds": [30.0, 90.0]}).to_csv(tmp_path / run / "fold0" / "history.csv", index=False)
    found = evaluation.compare([tmp_path / run for run in "abc"])
    assert found["run"].tolist() == ["b", "a", "c"]
    assert found["dice"].tolist() == pytest.approx([0.93, 0.91, 0.895])
    assert found["behind"].tolist() == pytest.approx([0, 0.02, 0.035])
    assert found["pictures"].tolist() == [2, 2, 2]
    assert found["minutes"].tolist() == [1.5, 1.5, 1.5]


def test_a_run_that_is_not_scored_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match=r"scores.csv does not exist. Score the run with 04_evaluate first"):
        evaluation.compare([tmp_path])


def test_runs_with_other_folds_are_not_blended(shared_competition, runs, tmp_path):
    other = tmp_path / "other"
    pictures = photos.index(shared_competition)
    folds.folds_of_run(other, pictures, 2, 0, 1)
    with pytest.raises(UserError, match=r"other has other folds than .*a"):
        evaluate(shared_competition, [runs[0], other])


def test_masks_that_are_all_empty_are_an_error_that_names_likely_causes(shared_competition, tmp_path):
    run = train_run(shared_competition, tmp_path / "black", epochs=1, lr=1e-9, ema=0.0)
    for fold in (0, 1):
        path = run / f"fold{fold}" / "best.safetensors"
        model, _ = models.load_checkpoint(path)
        model.net.segmentation_head[0].bias.data.fill_(-1e4)
        models.save_checkpoint(path, model.state_dict(), model.network)
    with pytest.raises(UserError, match=r"Every predicted mask of .*black is empty.*lr"):
        evaluate(shared_competition, [run])


def test_a_run_without_folds_is_named(shared_competition, tmp_path):
    with pytest.raises(UserError, match=r"folds.csv does not exist. Train with 03_train first"):
        evaluate(shared_competition, [tmp_path / "none"])
