"""Each collective against the same map written down for one process; each backward is its transpose."""

import pytest
import torch
import torch.distributed as dist
from distributed import run

from bloomery.parallel import collectives as c

WORLD = 4
SIZES = [2, 0, 3, 1]  # rows of each rank where parts are unequal
SPLITS = [[1, 0, 2, 0], [0, 0, 0, 0], [3, 1, 0, 2], [0, 2, 1, 1]]  # rows rank r sends to each
RECEIVED = [list(column) for column in zip(*SPLITS, strict=True)]
COPIES = ("split", "sum_gradient")  # ranks start with the same value
COUNTED_ONCE = ("gather_whole", "sum_over")  # ranks go on with the same value, whose loss counts once

CALLS = {
    "gather": lambda x, rank, group: c.gather_tokens(x, 1, group),
    "gather_uneven": lambda x, rank, group: c.gather_tokens(x, 1, group, SIZES),
    "gather_whole": lambda x, rank, group: c.gather_whole(x, 1, group),
    "scatter": lambda x, rank, group: c.scatter_tokens(x, 1, group),
    "scatter_uneven": lambda x, rank, group: c.scatter_tokens(x, 1, group, SIZES),
    "split": lambda x, rank, group: c.split_tokens(x, 1, group),
    "all_to_all": lambda x, rank, group: c.all_to_all(x, SPLITS[rank], RECEIVED[rank], group),
    "all_to_all_equal": lambda x, rank, group: c.all_to_all(x, None, None, group),
    "shift": lambda x, rank, group: c.shift(x, group, 3),
    "sum_over": lambda x, rank, group: c.sum_over(x, group),
    "sum_gradient": lambda x, rank, group: c.sum_gradient(x, group),
}


def _random(seed, *shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _input(name, rank, dtype):
    rows = {"gather_uneven": SIZES[rank], "scatter_uneven": sum(SIZES), "all_to_all": sum(SPLITS[rank])}.get(name, 8)
    shape = (rows, 2) if name.startswith("all_to_all") else (3, rows, 2)
    return _random(0 if name in COPIES else rank, *shape, dtype=dtype)


def _weights(name, rank, y, dtype):
    """What the loss multiplies a rank's output by."""
    return _random(100 if name in COUNTED_ONCE else 100 + rank, *y.shape, dtype=dtype)


def _expected(name, inputs):
    """The outputs of all ranks from the inputs of all ranks, by autograd's own means."""
    if name.startswith("gather"):
        return [torch.cat(inputs, 1)] * WORLD
    if name.startswith("scatter"):
        whole = torch.stack(inputs).sum(0)
        return list(whole.split(SIZES if name == "scatter_uneven" else whole.shape[1] // WORLD, 1))
    if name == "split":
        return [x.chunk(WORLD, 1)[rank] for rank, x in enumerate(inputs)]
    if name.startswith("all_to_all"):
        splits = SPLITS if name == "all_to_all" else [[2] * WORLD] * WORLD
        sent = [x.split(s) for x, s in zip(inputs, splits, strict=True)]
        return [torch.cat([sent[source][to] for source in range(WORLD)]) for to in range(WORLD)]
    if name == "shift":
        return [inputs[rank - 3] for rank in range(WORLD)]
    return [torch.stack(inputs).sum(0)] * WORLD if name == "sum_over" else inputs


def _on_a_rank(dtype):
    results, rank = {}, dist.get_rank()
    for name, call in CALLS.items():
        x = _input(name, rank, dtype).requires_grad_()
        y = call(x, rank, dist.group.WORLD)
        y.backward(_weights(name, rank, y, dtype))
        assert x.grad.dtype == y.dtype == dtype
        results[name] = y.detach(), x.grad
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_one_process(dtype):
    results = run(WORLD, _on_a_rank, dtype)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    for name in CALLS:
        leaves = [_input(name, rank, dtype).double().requires_grad_() for rank in range(WORLD)]
        if name in COPIES:
            leaves = leaves[:1] * WORLD
        outputs = _expected(name, leaves)
        counted = outputs[:1] if name in COUNTED_ONCE else outputs
        torch.autograd.backward(counted, [_weights(name, r, y, dtype).double() for r, y in enumerate(counted)])
        for rank in range(WORLD):
            found = [t.double() for t in results[rank][name]]
            wanted = [outputs[rank].detach(), leaves[rank].grad]
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def _gradient_of_gradient():
    x = _input("gather", dist.get_rank(), torch.float64).requires_grad_()
    y = c.gather_tokens(x, 1, dist.group.WORLD)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return x.detach(), first.detach(), second


def test_second_derivatives_pass_through():
    for x, first, second in run(WORLD, _gradient_of_gradient):
        torch.testing.assert_close(first, WORLD * 3 * x**2)
        torch.testing.assert_close(second, WORLD * 6 * x)


def _counted():
    rank, group = dist.get_rank(), dist.group.WORLD
    float32 = torch.zeros(3, 8, 2)
    with c.traffic() as all_of_it:
        with c.traffic() as forward:
            gathered = c.gather_tokens(float32.requires_grad_(), 1, group)
        with c.traffic() as backward:
            gathered.sum().backward()
        with c.traffic() as others:
            c.all_to_all(torch.zeros(sum(SPLITS[rank]), 2), SPLITS[rank], RECEIVED[rank], group)
            c.all_reduce_(torch.zeros(10, dtype=torch.float64), group)
            c.start_shift([torch.zeros(5), torch.zeros(2, dtype=torch.bfloat16)], group)()
            c.gather_tokens(torch.zeros(3, SIZES[rank], 2), 1, group, SIZES)
    c.all_reduce_(torch.zeros(10), group)  # after the blocks: counted nowhere
    operations = [{operation: n for (_, operation), n in part.items()} for part in (forward, backward, others)]
    return *operations, dict(all_of_it), group.group_desc


def test_traffic_counts_the_bytes_of_the_formulas():
    for rank, (forward, backward, others, everything, name) in enumerate(run(WORLD, _counted)):
        part = 3 * 8 * 2 * 4
        assert forward == {"gather": 3 * part}
        assert backward == {"reduce_scatter": 3 * part}
        assert others == {
            "all_to_all": (sum(SPLITS[rank]) - SPLITS[rank][rank]) * 2 * 4,
            "all_reduce": 2 * 3 * 10 * 8 // 4,
            "shift": 5 * 4 + 2 * 2,
            "gather": 3 * SIZES[rank] * 6 * 4,
        }
        assert everything[name, "gather"] == forward["gather"] + others["gather"]
        assert everything[name, "all_reduce"] == others["all_reduce"]


def test_without_a_group_nothing_happens():
    x = torch.randn(6, 8)
    with c.traffic() as sent:
        for name, call in CALLS.items():
            if name != "all_to_all":
                assert call(x, 0, None) is x, name
        assert c.all_reduce_(x, None) is x
    assert not sent


def _uneven_split():
    with pytest.raises(AssertionError) as caught:
        c.split_tokens(torch.zeros(2, 7), 1, dist.group.WORLD)
    return str(caught.value)


def test_a_length_that_does_not_divide_is_our_own_mistake():
    assert run(WORLD, _uneven_split) == ["dim 1 of (2, 7) over 4 ranks"] * WORLD
