"""training: what a run needs around the loop in train.py: stages, run folder, state, log, figures.
"""
