import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import recipe, run_here, trainer_of, write_competition

from carvana import evaluation, metrics, models, rle
from carvana.data import HOLDOUT, Competition, TestSet
from carvana.data.competition import excluded_names
from carvana.errors import UserError
from carvana.evaluation.evaluate import Settings
from carvana.inference import Ensemble, EnsembleSpec, Options, predict_run_lengths
from carvana.run import Run, compare
from carvana.training.launch import train
from carvana.training.trainer import Trainer


def train_run(data, run, seed=1, holdout_cars=0, **changes):
    chosen = recipe(**{"epochs": 4, "batch_size": 2, "validate_every": 4, "seed": seed} | changes)
    competition = Competition(data)
    run.split(competition.samples, 2, holdout_cars, 1)
    for fold in (0, 1):
        train(Trainer(run, competition, chosen, fold))
    return run


@pytest.fixture(scope="module")
def runs(shared_competition, tmp_path_factory):
    """Two runs on the same folds, the second at another size, with one held-out car."""
    folder = tmp_path_factory.mktemp("runs")
    a, b = Run(folder, "a"), Run(folder, "b")
    train_run(shared_competition, a, holdout_cars=1)
    train_run(shared_competition, b, seed=2, holdout_cars=1, height=64, width=96)
    return [a, b]


def evaluate(data, runs, tta=("none", "hflip")):
    return evaluation.evaluate(runs, Competition(data), list(tta), 4)


@pytest.fixture(scope="module")
def scores(shared_competition, runs):
    return evaluate(shared_competition, runs).scores


def test_every_image_is_scored_once_by_the_fold_that_has_not_seen_its_car(scores, shared_competition, runs):
    assert scores["img"].tolist() == Competition(shared_competition).samples["img"].tolist()
    expected = scores["car"].map(runs[0].folds().set_index("car")["fold"])
    assert scores["fold"].tolist() == expected.tolist()
    assert (scores["fold"] == HOLDOUT).sum() == 4


def test_scores_equal_those_of_the_masks_that_prediction_writes(shared_competition, runs, tmp_path):
    scores, competition = evaluate(shared_competition, runs[:1]).scores, Competition(shared_competition)
    ensemble = Ensemble(EnsembleSpec.equal([runs[0].checkpoint(0)], ["none", "hflip"]))
    test = TestSet(competition.train_images, scores[scores["fold"] == 0]["img"].tolist())
    predict_run_lengths(ensemble, test, tmp_path, Options(batch_size=4, workers=0))
    predicted = pd.read_csv(tmp_path / "part-00000.csv", keep_default_na=False).set_index("img")["rle_mask"]
    truth = competition.samples.set_index("img")["rle"]
    for row in scores[scores["fold"] == 0].itertuples():
        masks = rle.decode(predicted[row.img], 96, 126), rle.decode(truth[row.img], 96, 126)
        assert row.dice == pytest.approx(float(metrics.dice(metrics.pixel_counts(*masks))), abs=1e-9)


def test_images_are_predicted_again_by_the_networks_that_scored_them(shared_competition, runs, scores):
    competition, tta = Competition(shared_competition), ["none", "hflip"]
    names = scores["img"].iloc[::3].tolist()
    again = dict(evaluation.predict_out_of_fold(runs, competition, names, tta, 2))
    truth, expected = competition.samples.set_index("img")["rle"], scores.set_index("img")["dice"]
    assert sorted(again) == names
    for name, probability in again.items():
        counts = metrics.pixel_counts(probability > 0.5, rle.decode(truth[name], 96, 126))
        assert float(metrics.dice(counts)) == pytest.approx(expected[name], abs=1e-9)


def test_training_reports_the_dice_that_evaluation_finds(shared_competition, runs):
    scores = evaluate(shared_competition, runs[:1]).scores
    dice = scores[scores["fold"] == 1]["dice:without hflip"].mean()
    assert dice == pytest.approx(runs[0].histories()["1"]["dice"].max(), abs=1e-3)


def test_gains_are_the_mean_differences_to_each_simpler_variant(scores):
    gains = evaluation.gains(scores).set_index("variant")
    assert set(gains.index) == {"without none", "without hflip", "a", "b", "fold 0", "fold 1"}
    assert gains.loc["without hflip", "gain"] == pytest.approx((scores["dice"] - scores["dice:without hflip"]).mean())
    assert gains.loc["fold 0", "images"] == 4
    assert gains.loc["fold 0", ["low", "high"]].isna().all()  # one car says nothing of others
    several = gains.drop(["fold 0", "fold 1"])
    assert (several["low"] <= several["gain"]).all() and (several["gain"] <= several["high"]).all()


def test_error_parts_sum_to_all_wrong_pixels(scores):
    wrong = scores[["edge_1", "edge_3", "edge_10", "missed", "extra"]].sum(axis=1)
    both = scores["dice"] * (scores["area"] + scores["predicted_area"]) / 2
    assert np.allclose(wrong / (96 * 126), scores["area"] + scores["predicted_area"] - 2 * both)


def test_error_maps_hold_all_wrong_pixels_also_of_folds_that_were_scored_before(shared_competition, runs, scores):
    for fold in (0, HOLDOUT):  # as a kill between the two files would leave it
        for kept in runs[0].fold_dir(fold).glob("errors-*.npz"):
            kept.unlink()
    fresh, again = (evaluate(shared_competition, runs).error_maps for _ in range(2))
    assert sorted(fresh) == sorted(again) == [1, 2, 3, 4]
    for view, (missed, taken, true) in fresh.items():
        assert np.array_equal(fresh[view], again[view])
        of_view = scores[scores["view"] == view]
        wrong = of_view[["edge_1", "edge_3", "edge_10", "missed", "extra"]].to_numpy().sum() / (96 * 126)
        assert (missed + taken).mean() == pytest.approx(wrong, rel=0.02)  # the map is larger than these
        assert true.mean() == pytest.approx(of_view["area"].sum(), rel=0.02)


def test_scores_of_a_fold_are_kept_for_each_set_of_members_and_read_again(shared_competition, runs, scores):
    evaluate(shared_competition, runs[:1])
    kept = {path: path.stat().st_mtime_ns for path in runs[0].fold_dir(0).glob("scores-*.csv")}
    assert len(kept) >= 2  # of the blend, and of the run alone
    again = evaluate(shared_competition, runs).scores
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pd.testing.assert_frame_equal(again, scores)


def test_a_fold_that_is_scored_stays_so_when_another_one_is_trained(shared_competition, runs, tmp_path):
    shutil.copytree(runs[0].folder, tmp_path / "grows")
    run = Run(tmp_path, "grows")
    run.fold_dir(1).rename(tmp_path / "later")
    for kept in run.fold_dir(0).glob("scores-*"):
        kept.unlink()
    evaluate(shared_competition, [run])
    (tmp_path / "later").rename(run.fold_dir(1))
    evaluate(shared_competition, [run])
    assert len(list(run.fold_dir(0).glob("scores-*.csv"))) == 1


def test_images_of_other_cars_are_no_images_to_score_and_a_fold_may_have_none(shared_competition, runs, tmp_path):
    other = write_competition(tmp_path / "other")
    for file in [*other.glob("train/*"), *other.glob("train_masks/*")]:
        file.rename(file.with_name(f"x{file.name}"))
    (other / "train_masks.csv").unlink(missing_ok=True)
    with pytest.raises(UserError, match="other has no image of the cars that .* has networks for. Give the data_dir"):
        evaluate(other, runs)
    folds = runs[0].folds()
    absent = folds.loc[folds["fold"] == 0, "car"].tolist()
    (tmp_path / "exclude.txt").write_text("".join(f"{car}_{view:02d}.jpg\n" for car in absent for view in range(1, 5)))
    competition = Competition(shared_competition, exclude=tmp_path / "exclude.txt")
    assert set(evaluation.evaluate(runs, competition, ["none"]).scores["fold"]) == {1, HOLDOUT}


@pytest.mark.parametrize("kind", ["scores", "errors"])
@pytest.mark.parametrize("damage", [b"", b"img,dice\n", None])
def test_kept_scores_that_are_not_as_they_were_written_are_made_anew(shared_competition, runs, scores, kind, damage):
    for kept in runs[0].fold_dir(0).glob(f"{kind}-*"):
        text = kept.read_bytes()
        kept.write_bytes(text[: len(text) * 2 // 3] if damage is None else damage)
    pd.testing.assert_frame_equal(evaluate(shared_competition, runs).scores, scores)


def test_a_blend_of_runs_is_evaluated_in_a_run_of_its_own(shared_competition, runs):
    values = {"data_dir": str(shared_competition), "runs_dir": str(runs[0].runs_dir)}
    run_here("04_evaluate", values | {"run_name": "blend", "members": "a, b", "tta": "none"})
    assert len(EnsembleSpec.read(Run(runs[0].runs_dir, "blend").ensemble_path).checkpoints) == 4


def test_ensemble_json_names_every_fold_of_every_run_with_its_weight(runs, scores):
    evaluation.write_results(runs[0], scores, runs, ["none"], Settings([0.25, 0.75], 0.4))
    spec = EnsembleSpec.read(runs[0].ensemble_path)
    assert [path.parent.parent.name for path in spec.checkpoints] == ["a", "a", "b", "b"]
    assert list(spec.weights) == [0.125, 0.125, 0.375, 0.375]
    assert spec.threshold == 0.4
    assert len(runs[0].scores()) == len(scores)


def test_other_weights_and_thresholds_are_tried_on_every_image(scores):
    tried = set(scores.columns[scores.columns.str.startswith("try:")])
    assert {"try:0.25,0.75@0.5", "try:0.5,0.5@0.5", "try:0.75,0.25@0.5", "try:0.5,0.5@0.45"} <= tried
    assert np.allclose(scores["try:0.5,0.5@0.5"], scores["dice"])


def test_thresholds_are_compared_with_a_half_on_the_same_images():
    table = pd.DataFrame({"car": ["a", "b"], "dice": [0.9, 0.8], "try:1@0.4": [0.92, 0.84], "try:1@0.6": [0.9, 0.7]})
    compared = evaluation.by_threshold(table)
    assert compared["threshold"].tolist() == [0.4, 0.5, 0.6]
    assert compared["gain"].tolist() == pytest.approx([0.03, 0, -0.05])
    assert compared.loc[0, ["low", "high"]].tolist() == pytest.approx([0.03 - 0.01 * 12.7062, 0.03 + 0.01 * 12.7062])


def with_disputed(disputed):
    names = [f"{car}_01.jpg" for car in "abc"[: len(disputed)]]
    table = pd.DataFrame({"img": names, "car": "a", "view": 1, "fold": 0, "dice": 0.9, "disputed": disputed})
    return table.assign(sure=0.95)


def test_label_issues_are_disputed_masks_and_keep_what_a_person_has_marked():
    issues = evaluation.label_issues(with_disputed([5, 0, 70]))
    assert issues["img"].tolist() == ["c_01.jpg", "a_01.jpg"]
    assert (issues["exclude"] == "").all()
    issues.loc[0, "exclude"] = "x"
    again = evaluation.label_issues(with_disputed([90, 0]), issues)  # the marked image was left out
    assert again[["img", "exclude"]].to_numpy().tolist() == [["a_01.jpg", ""], ["c_01.jpg", "x"]]
    assert evaluation.label_issues(with_disputed([5, 0, 70]), issues)["exclude"].tolist() == ["x", ""]


def test_quality_csv_is_an_exclude_list_of_what_is_marked_and_survives_another_evaluation(
    shared_competition, runs, scores
):
    train_images, quality = Competition(shared_competition).train_images, runs[0].quality_path
    doubted = scores.assign(disputed=[50, 20] + [0] * (len(scores) - 2), sure=0.95)
    for _ in range(2):
        evaluation.write_results(runs[0], doubted, runs, ["none"], Settings([0.5, 0.5], 0.5))
        marked = pd.read_csv(quality, dtype={"car": str, "exclude": str})
        marked.loc[0, "exclude"] = "x"
        marked.to_csv(quality, index=False)
    assert excluded_names(quality, train_images) == {scores["img"].iloc[0]}
    added = scores["img"].iloc[5]  # a row of a person's own, with nothing but the name and the mark
    with quality.open("a") as file:
        file.write(f"{added},,,,,,,x\n")
    for _ in range(2):
        evaluation.write_results(runs[0], doubted, runs, ["none"], Settings([0.5, 0.5], 0.5))
        assert excluded_names(quality, train_images) == {scores["img"].iloc[0], added}


def scored(base, other):
    cars = [f"{i}" for i in range(8)]
    return pd.DataFrame({"car": cars, "fold": [0, 1] * 4, "dice": base, "try:0.25,0.75@0.5": other})


def test_settings_that_surely_gain_on_folds_left_out_are_used_with_their_honest_gain():
    settings, scores = evaluation.choose_settings(scored(0.9, 0.92), 2)
    assert (settings.weights, settings.threshold) == ([0.25, 0.75], 0.5)
    assert settings.gain.mean == pytest.approx(0.02)
    assert (scores["dice"] == 0.92).all() and (scores["dice:equal"] == 0.9).all()
    assert scores["iou"].tolist() == pytest.approx([0.92 / 1.08] * 8)
    assert evaluation.gains(scores).set_index("variant").loc["equal", "gain"] == pytest.approx(0.02)


def test_what_a_part_adds_is_not_what_the_threshold_adds():
    table = scored(0.9, 0.92).assign(**{"dice:without hflip": 0.9, "dice:a": 0.89})
    gains = evaluation.gains(evaluation.choose_settings(table, 2)[1]).set_index("variant")
    assert gains["gain"].to_dict() == pytest.approx({"without hflip": 0.0, "a": 0.01, "equal": 0.02})
    assert gains["ensemble"].to_dict() == pytest.approx({"without hflip": 0.9, "a": 0.9, "equal": 0.92})


def test_folds_that_were_stopped_are_told(shared_competition, tmp_path, capsys):
    trainer = trainer_of(shared_competition, tmp_path / "run", epochs=3)
    train(trainer)
    for epochs, told in ((3, 0), (4, 1)):
        trainer.run.write_note("run", {"parameters": {"epochs": epochs}})
        evaluate(shared_competition, [trainer.run])
        said = capsys.readouterr().out
        assert said.count("fold0 has trained 3 of 4 epochs: 03_train goes on with it.") == told


def test_scores_with_chosen_settings_are_honest_and_hold_for_unseen_cars():
    table = scored(0.9, 0.92).assign(**{"try:0.75,0.25@0.5": [0.91, 0.93] * 4})
    table.loc[7, "fold"] = HOLDOUT
    settings, scores = evaluation.choose_settings(table, 2)
    assert settings.weights == [0.25, 0.75]
    assert scores.loc[scores["fold"] == 0, "dice"].tolist() == [0.91] * 4  # with what is best on fold 1
    assert scores.loc[scores["fold"] == 1, "dice"].tolist() == [0.92] * 3
    assert scores.loc[7, "dice"] == 0.92


def test_useless_settings_are_rarely_taken_for_a_gain():
    random, thresholds = np.random.default_rng(1), np.array([0.35, 0.4, 0.45, 0.55, 0.6, 0.65])
    base, taken = pd.DataFrame({"car": [f"{i}" for i in range(20)], "fold": [0, 1] * 10, "dice": 0.9}), 0
    for _ in range(400):
        slopes = 0.01 * random.normal(size=(20, 1))  # what a threshold gains on a car, in the mean nothing
        tried = pd.DataFrame(0.9 + slopes * (thresholds - 0.5), columns=[f"try:1@{cut}" for cut in thresholds])
        taken += evaluation.choose_settings(base.join(tried), 1)[0].threshold != 0.5
    assert taken < 0.025 * 400


def test_settings_that_gain_on_one_fold_only_are_not_used():
    settings, scores = evaluation.choose_settings(scored(0.9, [0.99, 0.85] * 4), 2)
    assert (scores["dice"] == 0.9).all()
    assert (settings.weights, settings.threshold) == ([0.5, 0.5], 0.5)
    assert settings.gain.low <= 0  # chosen on fold 0, lost on fold 1


def test_compared_runs_stand_best_first_with_the_paired_difference(tmp_path):
    for run, dice in (("a", [0.90, 0.92]), ("b", [0.91, 0.95]), ("c", [0.80, 0.99, 0.5])):
        images = ["1_01", "2_01", "3_01"]
        table = pd.DataFrame({"img": images[: len(dice)], "car": "1", "fold": 0, "dice": dice})
        table.loc[3] = ("4_01", "4", 0 if run == "a" else -1, 0.1)  # of several networks, or of one: not to be compared
        (tmp_path / run / "fold0").mkdir(parents=True)
        table.to_csv(tmp_path / run / "scores.csv", index=False)
        (tmp_path / run / "fold0" / "history.csv").write_text("epoch,dice,seconds\n0,0.1,30.0\n1,0.9,90.0\n")
    compared = compare([Run(tmp_path, name) for name in "abc"])
    assert compared["run"].tolist() == ["b", "a", "c"]
    assert compared["dice"].tolist() == pytest.approx([0.93, 0.91, 0.895])
    assert compared["behind"].tolist() == pytest.approx([0, 0.02, 0.035])
    assert compared["images"].tolist() == [2, 2, 2]
    assert compared["minutes"].tolist() == [1.5, 1.5, 1.5]


def test_masks_that_are_all_empty_are_an_error_that_names_likely_causes(shared_competition, tmp_path):
    run = train_run(shared_competition, Run(tmp_path, "black"), epochs=1, lr=1e-9, ema=0.0)
    for path in run.checkpoints().values():
        model, _ = models.load_checkpoint(path)
        model.net.segmentation_head[0].bias.data.fill_(-1e4)
        models.save_checkpoint(path, model.state_dict(), model.config)
    with pytest.raises(UserError, match=r"Every predicted mask of .*black is empty.*lr"):
        evaluate(shared_competition, [run])


def test_a_run_without_folds_is_named(shared_competition, tmp_path):
    with pytest.raises(UserError, match=r"folds.csv does not exist. Train with 03_train first"):
        evaluate(shared_competition, [Run(tmp_path, "none")])
