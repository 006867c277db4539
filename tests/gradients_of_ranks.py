"""Gradients of one step, as one process and as several compute them."""

from pathlib import Path

import torch

from adaptok.storage import save_tensors
from adaptok.train.batches import draw_batch, open_training_set
from adaptok.train.config import TrainConfig
from adaptok.train.learner import Learner
from adaptok.train.processes import Processes
from adaptok.train.sharding import Sharding, gather_state, local_part, shard_like

STEP = 5
CPU = torch.device("cpu")


def random_weights(config):
    """Values that matter for all weights, the zeros of a new model too."""
    model = Learner.start(config, CPU).model
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and not name.startswith("router"):
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        if hasattr(model, "router"):  # samples that keep different counts
            model.router.logit_bias.fill_(-0.5)
    return model.state_dict()


def take_one_step(config, share, sharding=None, prepare=None):
    """Return gradients before and behind the clipping, the new weights and their averages."""
    learner = Learner.start(config, CPU, sharding)
    weights = random_weights(config)
    learner.model.load_state_dict(
        {name: shard_like(weights[name], own) for name, own in learner.ema.items()}
    )
    if prepare is not None:
        learner.wrap(prepare)
    batch = draw_batch(config, open_training_set(config), STEP, share)
    learner.collect_gradients(batch, STEP)
    held = sum(local_part(value).numel() for value in learner.ema.values())
    found = {"share": torch.tensor(held / sum(value.numel() for value in weights.values()))}

    def note(kind, tensors):
        state = gather_state(tensors, keep=sharding is None or share.rank == 0)
        found.update({f"{kind}.{name}": value.clone() for name, value in state.items()})

    def gradients():
        return {n: p.grad for n, p in learner.model.named_parameters() if p.requires_grad}

    note("before", gradients())
    found["norm"] = learner.clip_gradients()
    note("behind", gradients())
    learner.update_weights(STEP)
    note("weights", learner.model.state_dict())
    note("averages", learner.ema)
    return found


def save_one_step(folder):
    """Take the step of each configuration in a folder, all processes together."""
    processes = Processes.start()
    for path in sorted(Path(folder).glob("*.json")):
        config = TrainConfig.from_json_file(path)
        sharding = Sharding(reshard="kept" not in path.stem) if "sharded" in path.stem else None
        prepare = None if sharding else processes.accelerator.prepare_model
        found = take_one_step(config, processes.share, sharding, prepare)
        if processes.is_first:
            save_tensors(path.with_suffix(".safetensors"), found)
    processes.wait()
