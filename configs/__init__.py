"""Find the shipped configs: datasets/NAME.yaml, trainers/TRAINER/NAME.yaml and ablations.yaml."""

from pathlib import Path

from dfzsl.utils.errors import unknown_name

CONFIGS = Path(__file__).parent


def dataset_config(name: str) -> Path:
    """Return the config of a data set. Raises UserError, with a list of data sets, for an unknown name."""
    path = CONFIGS / "datasets" / f"{name}.yaml"
    if not path.is_file():
        raise unknown_name("data set", name, (known.stem for known in path.parent.glob("*.yaml")))
    return path
