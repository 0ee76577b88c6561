"""Structural pruning: whole operators leave a diffusers network, and what is left loads like any other model.

    pipe = diffaccel.load_pipeline("digits")
    survey = survey_network(pipe.unet)                         # what can go, and what that saves        survey.py
    criterion = LDPruner(calibrate(pipe, count=16, steps=10))  # what that costs in quality              criteria.py
    scores = score(criterion, survey.names, "scores.jsonl")    # one pass each, continued if stopped     scores.py
    chosen = select(survey, scores, ratio=0.35)                # which ones, by a knapsack               selection.py
                                                               # or by the losses of sets                joint.py
    prune(pipe, chosen.names)                                  # in place, for good                      classes.py
    pipe.save_pretrained("smaller")                            # DiffusionPipeline.from_pretrained opens it

`diffaccel.pruning` does all of this in one folder, with recovery (recovery.py, a method of the shared trainer) and measurement.

Networks that only run on other inputs than zeros need ``run``, a function that calls them once: survey_network(pipe.unet,
lambda: pipe("a cat", num_inference_steps=1)). A teacher for recovery is a copy made before `prune`; modules keep their names, so
features of both can be compared by name (``feature_modules`` of their denoisers are the same in number).
"""
