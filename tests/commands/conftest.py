import json

import pytest
from accelerate.state import AcceleratorState

from diffusers_pisdm.commands import train as train_command
from tests.commands.training.tiny_training import CASCADE


@pytest.fixture
def command(tmp_path, real_image_dir):
    """The arguments of a tiny run that leaves its output in `tmp_path / name`."""
    config = tmp_path / "cascade.json"
    config.write_text(json.dumps(CASCADE))

    def command(name, steps, *more, data=real_image_dir, config=config):
        return [
            *("--cascade_config", str(config), "--train_data_dir", str(data)),
            *("--output_dir", str(tmp_path / name), "--max_train_steps", str(steps), *more),
        ]

    return command


@pytest.fixture
def train(tmp_path, command):
    def run(name, steps, *more, **others):
        AcceleratorState._reset_state(reset_partial_state=True)  # each run is a process of its own, as it were
        train_command.train(command(name, steps, *more, **others))
        return tmp_path / name

    return run
