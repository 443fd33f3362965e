"""The largest values that sampling takes: the same on the command line, in `Pipeline`, in the nodes and in training."""

MAX_SIDE = 4096  # pixels: the largest native size the released model was trained on
MAX_STEPS = 10_000  # of a run, and of all runs of a list
MAX_BATCH = 4096  # images, as in ComfyUI
MAX_CFG = 100.0
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MIN_FACTOR, MAX_FACTOR = 0.5, 16.0  # of an enlargement
MAX_STAGES = 8
