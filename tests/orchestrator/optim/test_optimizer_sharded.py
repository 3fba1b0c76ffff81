"""Fully sharded parameters (DTensor) step like whole ones, and their checkpoints fit any number of ranks."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_training import MAKERS, model_of_uneven_shards, on_ranks, train_step

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="this torch is built without torch.distributed"
)

IMPLEMENTATIONS = ("reference", "fused", "foreach")


def sharded(model) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))


def largest_differences_to_unsharded(folder):
    """By optimizer and implementation: the largest difference over the largest weight, after 8 steps."""
    differences = {}
    for name, make in MAKERS.items():
        for implementation in ("reference", "foreach") if name == "lookahead" else IMPLEMENTATIONS:
            whole = model_of_uneven_shards()
            split = sharded(copy.deepcopy(whole))
            optimizers = [make(m.parameters(), implementation=implementation) for m in (whole, split)]
            for step in range(8):
                for model, optimizer in zip((whole, split), optimizers):
                    train_step(model, optimizer, step)
            pairs = [(p.full_tensor(), q) for p, q in zip(split.parameters(), whole.parameters())]
            scale = max(q.abs().max().item() for _, q in pairs)
            differences[f"{name} {implementation}"] = (
                max((p - q).abs().max().item() for p, q in pairs) / scale
            )
            if name != "lookahead":  # which synchronizes in every sixth step alone
                assert set(optimizers[1].last_step) <= {implementation, "reference"}
    return differences


def trained_with_checkpoints(folder, *, stop, save, load, end):
    """Full weights, by optimizer, after the steps from a checkpoint at `load` (or 0) to `end`, saved at `save`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    ends = {}
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        model = sharded(model_of_uneven_shards())
        optimizer = make(model.parameters())
        path = folder.parent / f"checkpoint-{name}"
        if load:
            state = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer),
            }
            dcp.load(state, checkpoint_id=path)
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
        for step in range(stop if load else 0, end):
            train_step(model, optimizer, step)
            if save and step + 1 == stop:
                state = {
                    "model": get_model_state_dict(model),
                    "optimizer": get_optimizer_state_dict(model, optimizer),
                }
                dcp.save(state, checkpoint_id=path)
        ends[name] = [p.full_tensor().tolist() for p in model.parameters()]
    return ends


def steps_skipped(folder):
    """Counts after steps in which one element of the gradient, in the shard of one rank, was not finite."""
    model = sharded(model_of_uneven_shards())
    optimizer = MAKERS["ranger_lars"](model.parameters(), nonfinite="skip")
    counts = []
    for rank in range(dist.get_world_size()):
        for value in (float("nan"), float("inf")):
            for weight in model.parameters():
                weight.grad = torch.ones_like(weight)
            gradient: Any = model[3].weight.grad
            if dist.get_rank() == rank and gradient.to_local().numel():
                gradient.to_local()[0, 0] = value
            optimizer.step()
            counts.append(optimizer.skipped_steps)
    return counts


def on_two_ranks(folder):
    """The differences; the run that saves a checkpoint at step 7 and goes on; the one that resumes from it."""
    return [
        largest_differences_to_unsharded(folder),
        trained_with_checkpoints(folder, stop=7, save=True, load=False, end=12),
        trained_with_checkpoints(folder, stop=7, save=False, load=True, end=12),
    ]


def on_four_ranks(folder):
    """The differences; the run that resumes from the checkpoint of two ranks; counts of skipped steps."""
    return [
        largest_differences_to_unsharded(folder),
        trained_with_checkpoints(folder, stop=7, save=False, load=True, end=12),
        steps_skipped(folder),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two ranks, and then four, came to; started once, because starting ranks is what takes time."""
    base = tmp_path_factory.mktemp("sharded")
    for name in ("two", "four"):
        (base / name).mkdir()
    return {2: on_ranks(2, base / "two", on_two_ranks), 4: on_ranks(4, base / "four", on_four_ranks)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_steps_agree_with_whole_ones(runs, world_size):
    for differences in (answer[0] for answer in runs[world_size]):
        assert len(differences) == 3 * len(MAKERS) - 1
        assert max(differences.values()) <= 1e-7, differences


@pytest.mark.parametrize("name", MAKERS)
def test_a_distributed_checkpoint_of_step_7_resumes_bit_exactly(runs, name):
    for _, straight, resumed in runs[2]:
        assert resumed[name] == straight[name]


@pytest.mark.parametrize("name", MAKERS)
def test_a_distributed_checkpoint_resumes_on_another_number_of_ranks(runs, name):
    for a, b in zip(runs[4][0][1][name], runs[2][0][1][name]):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-7)


def test_a_nan_in_the_shard_of_one_rank_skips_the_step_on_all(runs):
    # 7 rows on 4 ranks are 2, 2, 2 and 1: a NaN and an infinity on each
    for answer in runs[4]:
        assert answer[2] == [1, 2, 3, 4, 5, 6, 7, 8]
