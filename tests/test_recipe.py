"""The recipe of configs/tim-shapes, from its first stage to its last, with its networks and few small images."""

from pathlib import Path

import yaml

from tests.test_training import needs_muon
from tim_core.pipeline import Pipeline
from tim_core.training import run
from tim_core.training.yaml_file import read_values

FOLDER = Path(__file__).parent.parent / "configs" / "tim-shapes"
RECIPE = sorted(FOLDER.glob("[0-9]*.yaml"), key=lambda path: int(path.stem.split("-")[0]))
SHORT = {"steps": 2, "batch": 2, "workers": 0, "warmup": 1, "save_every": 2, "log_every": 1}


def shortened(path, folder):
    """The file in `folder` that trains as `path` does, for two steps."""
    values, _ = read_values(path)
    data = values["data"] | {"sizes": {"64x64": 1, "64x96": 2}, "native": "64x64"}
    text = yaml.safe_dump(values | {"loop": values["loop"] | SHORT, "data": data})
    short = folder / path.name
    short.write_text(text.replace("~/tim-runs", str(folder)).replace("critic_warmup_steps: 150", "critic_warmup_steps: 1"))
    return short


@needs_muon
def test_the_recipe_makes_a_model(tmp_path):
    made = run([shortened(path, tmp_path) for path in RECIPE])
    assert [file.parent.name for file in made] == [path.stem for path in RECIPE]
    assert made[-1].stat().st_size < 20e6
    pipe = Pipeline.load(made[-1])
    assert (pipe.defaults.width, pipe.defaults.height, pipe.factor) == (64, 64, 32)
    assert pipe("a red circle", steps=1).shape == (1, 64, 64, 3)
