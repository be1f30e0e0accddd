import pickle

import pytest
import torch
from torch import nn

from diffusers_pisdm.evaluation.weights_file import fill_weights, read_weights


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, 2))])
def test_a_file_that_would_run_something_is_refused_and_not_run(tmp_path, save):
    file, victim = tmp_path / "weights.pth", tmp_path / "victim"
    save({"weight": Payload(victim)}, file)
    with pytest.raises(ValueError, match=r"weights.pth cannot be read as a state dict of tensors"):
        read_weights(file)
    assert not victim.exists()


def test_files_that_hold_no_weights(tmp_path):
    file = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"no weights file .*weights.pth"):
        read_weights(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(file)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(ValueError, match=r"holds no state dict, .* but list"):
        read_weights(file)


def test_weights_fit_all_of_a_network_or_are_refused(tmp_path):
    file = tmp_path / "weights.pth"
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(source.state_dict(), file)
    fill_weights(target, file)
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)

    wrong_ones = [
        {"weight": source.weight},
        {**source.state_dict(), "extra": torch.zeros(1)},
        {**source.state_dict(), "weight": torch.zeros(2, 4)},
    ]
    for wrong, name in zip(wrong_ones, ("bias", "extra", "weight")):
        torch.save(wrong, file)
        with pytest.raises(ValueError, match=f"not a file of Linear's weights: 1 of .* first is {name}"):
            fill_weights(target, file)
