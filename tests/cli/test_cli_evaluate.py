"""`diffaccel evaluate fid` on what the other verbs make."""

import json


def test_sampled_folder_equals_the_model_that_drew_it(run, tiny_run, tmp_path):
    run("sample", tiny_run / "final", "--num", 100, "--seed", 4, "-o", tmp_path / "samples")
    folder = json.loads(run("evaluate", "fid", tmp_path / "samples", "digits", "--json").out)
    model = json.loads(run("evaluate", "fid", tiny_run / "final", "digits", "--num", 100, "--seed", 4, "--json").out)
    folder, model = folder["results"][0], model["results"][0]
    assert folder["n_fake"] == model["n_fake"] == 100
    assert abs(folder["value"] - model["value"]) <= 1e-6 * model["value"]


def test_text_names_features_counts_and_interval(run, tiny_run):
    done = run("evaluate", "fid", tiny_run / "final", "digits:heldout", "--num", 80)
    assert done.out.startswith("FD-digits64:") and done.err == ""
    assert all(words in done.out for words in ("95 % interval", "80 images", "355 images"))


def test_teachers_are_models_with_a_prefix(run):
    done = run("evaluate", "fid", "model:digits", "digits", "--num", 20, "--steps", 2, "--sampler", "ddim", "--json")
    assert json.loads(done.out)["results"][0]["n_fake"] == 20
