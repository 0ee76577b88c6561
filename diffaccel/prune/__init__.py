"""Structural pruning: whole operators leave a diffusers network, and what is left loads like any other model.

survey = survey_network(pipe.unet)                            # what can go, and what that saves
scores = score(pipe.unet, survey, get_criterion("laptop"), calibration)
chosen = select(survey, scores, ratio=0.35)
prune(pipe.unet, chosen.names)
pipe.save_pretrained("smaller")                               # opens with from_pretrained after `import diffaccel`
"""
