"""Scores of the small world, and images in the layouts of GenEval and DPG-Bench."""
