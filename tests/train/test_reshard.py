"""What one mapping saved, any other and any number of ranks loads bit for bit, and training goes on as if alone."""

import os
import resource
import shutil
import signal

import pytest
import torch
from distributed import run
from spread_training import MAPPINGS, assembled, fails, leg, new_state, train

from bloomery.errors import ArtifactError
from bloomery.train.checkpoint import Checkpoints

STEPS = 2
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def on(name, function, *arguments):
    """`function` by the ranks of a mapping, which gets the degrees as its second argument."""
    ranks, degrees = MAPPINGS[name]
    first, *rest = arguments
    return run(ranks, function, first, degrees, *rest) if ranks > 1 else [function(first, degrees, *rest)]


@pytest.fixture(scope="module")
def alone():
    """Losses of one process that was never cut."""
    return train(new_state({}), 6 * STEPS)[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def journey(tmp_path, alone, route):
    saved = None
    for number, name in enumerate(route):
        ranks = on(name, leg, tmp_path, (number + 1) * STEPS)
        found = ranks[0]
        if saved is not None:
            assert all(rank["resumed"] for rank in ranks)
            assert same(assembled([rank["loaded"] for rank in ranks]), saved), name
        saved = assembled([rank["saved"] for rank in ranks])
        assert not any(value.isnan().any() for value in saved.values())
        window = range(number * STEPS * 8, (number + 1) * STEPS * 8)
        assert sorted(row for rank in ranks for row in rank["read"]) == [*window]
        assert all(rank["losses"] == found["losses"] and rank["position"] == window.stop for rank in ranks)
        assert found["losses"] == pytest.approx(alone[number * STEPS : (number + 1) * STEPS], rel=1e-9), name


def test_a_run_moves_between_mappings_and_world_sizes(tmp_path, alone):
    names = [*MAPPINGS]
    journey(tmp_path, alone, [names[0], names[1], names[2], names[3], names[4], names[0]])


@pytest.mark.slow
@pytest.mark.parametrize("first", MAPPINGS)
def test_every_mapping_reads_every_other(tmp_path, alone, first):
    for number, second in enumerate(MAPPINGS):
        journey(tmp_path / str(number), alone, [first, second])


def two_legs(folder, degrees):
    return leg(folder, degrees, STEPS), leg(folder, degrees, 2 * STEPS)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """Checkpoints after 2 and 4 steps by eight ranks, and the weights of the first."""
    folder = tmp_path_factory.mktemp("saved")
    ranks = on("tensor, context and experts", two_legs, folder)
    return folder, assembled([rank[0]["saved"] for rank in ranks])


@pytest.fixture
def saved(two_saved, tmp_path):
    """A copy of them."""
    shutil.copytree(two_saved[0], tmp_path / "saved")
    return tmp_path / "saved", two_saved[1]


def lose(folder):
    (folder / "__3_0.distcp").unlink()


def flip(folder):
    content = bytearray((folder / "__5_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "__5_0.distcp").write_bytes(content)


@pytest.mark.parametrize(("harm", "message"), [(lose, "incomplete, __3_0"), (flip, "damaged, the content of __5_0")])
@pytest.mark.parametrize("name", ["data", "one process"])
def test_a_lost_or_damaged_file_of_one_rank_sends_all_to_the_checkpoint_before(saved, harm, message, name):
    folder, first = saved
    harm(folder / f"step-{2 * STEPS:08d}")
    ranks = on(name, leg, folder, 2 * STEPS)
    assert same(assembled([rank["loaded"] for rank in ranks]), first)
    assert message in ranks[0]["said"]


def load_into_other(folder, degrees):
    state = new_state(degrees, intermediate_size=48)
    return fails(Checkpoints(folder).load_latest, state), fails(
        Checkpoints(folder).load_latest, new_state(degrees, pattern="ME*")
    )


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(saved):
    for wider, shorter in run(2, load_into_other, saved[0], {}):
        assert "does not fit this model: model.layers.3.mixer." in wider
        assert "(32, 16), here (48, 16); remove the stage's folder" in wider
        assert "does not fit this model: it also holds model.layers.3." in shorter


def save_on_a_full_disk(folder, degrees):
    state = new_state(degrees)
    train(state, 1)
    full = state.parallel.meshes.rank == 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = Checkpoints(folder)
    checkpoints.save(state)
    checkpoints.wait()
    train(state, 2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else soft, hard))
        checkpoints.save(state)
        return fails(checkpoints.wait)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_on_one_rank_stops_all_with_the_cause(tmp_path):
    messages = on("pipeline", save_on_a_full_disk, tmp_path)
    for message in messages:
        assert message.startswith("ArtifactError: ")
        assert "rank 2: " in message
        assert "File too large" in message or "cannot write" in message
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert on("data", leg, tmp_path, 2)[0]["resumed"]


def test_more_ranks_than_the_folder_reaches_are_told(tmp_path, monkeypatch):
    """Machines without a shared folder: rank 0 sees that files are missing before the checkpoint counts as whole."""
    state = new_state({})
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ArtifactError, match="rank 0 does not see __1_0.distcp, which rank 1 wrote; give all machines"):
        checkpoints._finish(tmp_path, tmp_path / "step", [{}, {"__1_0.distcp": "x"}], {"step": state.step})
