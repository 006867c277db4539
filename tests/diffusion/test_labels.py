"""Labels that are no numbers at all."""

import pytest
import torch

from adaptok.diffusion.calls import read_labels
from adaptok.errors import LabelError


@pytest.mark.parametrize("labels", [None, ["food"], [None, 1]], ids=str)
def test_wrong_kinds_of_labels_are_refused(labels):
    with pytest.raises(LabelError, match="find a name in the class_names"):
        read_labels(labels, 8, torch.device("cpu"))
