"""The group of processes that tests of parallelism use."""

import os

import distributed
import pytest
import torch
import torch.distributed as dist


def total(value: int) -> tuple[int, int, int]:
    tensor = torch.tensor(value + dist.get_rank())
    dist.all_reduce(tensor)
    return int(tensor), dist.get_world_size(), os.getpid()


def fail_on_one(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("provoked")


def test_every_rank_answers_and_the_group_is_used_again():
    first, second = distributed.run(2, total, 10), distributed.run(2, total, 20)
    assert [answer[:2] for answer in first] == [(21, 2), (21, 2)]
    assert [answer[:2] for answer in second] == [(41, 2), (41, 2)]
    assert [answer[2] for answer in first] == [answer[2] for answer in second]
    assert len({answer[2] for answer in first}) == 2


def test_a_failure_names_its_rank_and_the_next_run_starts_afresh():
    with pytest.raises(RuntimeError, match=r"rank 1:[\s\S]*ValueError: provoked"):
        distributed.run(2, fail_on_one, 1)
    assert distributed.run(2, total, 0)[0][0] == 1
