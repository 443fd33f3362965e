"""Scores on coloured shapes, and images in the folder layouts of GenEval and DPG-Bench."""
