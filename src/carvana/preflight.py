"""What can be known to be wrong with a run before it starts; imports torch only where it must be asked."""

from carvana.errors import UserError
from carvana.files import resolve
from carvana.members import members_of, shared_checkpoints, shared_folds
from carvana.profiles import FILES, Values
from carvana.run import Run, member_paths


def check_inputs(values: Values) -> None:
    """UserError for anything that only a late step reads and that is not there, or cannot be used, now."""
    run = Run(values["runs_dir"], values["run_name"])
    given = {name: resolve(values[name]) for name in FILES if values[name]}
    if values["init_from"]:
        given["init_from"] = Run(run.runs_dir, values["init_from"]).folds_path
    if values["pseudo_labels"]:
        given["pseudo_labels"] = Run(run.runs_dir, values["pseudo_labels"]).pseudo_path
    if given.get("ensemble") == run.ensemble_path:
        del given["ensemble"]  # which 04 writes
    for name, path in given.items():
        members = member_paths(path) if name == "ensemble" and path.exists() else []
        if lost := [file for file in (path, *members) if not file.exists()]:
            raise UserError(f"{name} {path}: {lost[0]} does not exist. Correct it, or leave {name} empty.")
    if values["device"] not in ("auto", "cpu"):
        from carvana.device import check_device

        check_device(values["device"])
    if not run.folder.exists():  # a new run, before it downloads anything
        check_recipe(values)
    if others := [member for member in members_of(values) if member.name != run.name]:
        shared_folds(others)
        shared_checkpoints(others)


def check_recipe(values: Values) -> None:
    """UserError for what 03_train would refuse: a name, a size, a precision, or encoder weights that nobody has."""
    from carvana.models import check_weights
    from carvana.training.recipe import Recipe

    recipe = Recipe.from_parameters(values)
    check_weights(recipe.model_config, recipe.encoder_weights)
