"""The emulated accelerator beside what CUDA is known to do."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import accelerator
import pytest
import torch
import torch.nn.functional as F
from accelerator.streams import hazards
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DEVICE = accelerator.NAME

if not accelerator.can_be_emulated():
    pytest.skip("torch can emulate a device from 2.13 on", allow_module_level=True)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with accelerator.in_use():
        yield


def there(*shape: int) -> Tensor:
    """0, 1, 2, … on the device."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device="cpu").reshape(shape).to(DEVICE)


def waits_of(action: Callable[[], Any]) -> list[str]:
    with accelerator.watch() as seen:
        action()
    return [wait.kind for wait in seen.waits]


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 20, bias=False))


def loss_of(network: nn.Module, device: str = DEVICE) -> Tensor:
    ids = torch.arange(12).to(device)
    return F.cross_entropy(network(ids), ids.flip(0))


# --- mixed devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, host: x + host,
        lambda x, host: host * x,
        lambda x, host: x @ host,
        lambda x, host: torch.cat([x, host]),
        lambda x, host: torch.where(x > 1, x, host),
        lambda x, host: torch.mm(x, x, out=host),
        lambda x, host: x.index_select(0, torch.tensor([1])),
        lambda x, host: F.embedding(torch.tensor([1]), x),
        lambda x, host: F.linear(x, host),
        lambda x, host: x.index_copy_(0, torch.tensor([0]), x[:1] + 1),
        lambda x, host: x.masked_fill(torch.ones(3, 3, dtype=torch.bool), 0),
    ],
)
def test_tensors_of_two_devices_are_refused_and_both_are_named(mix: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"same device.*(emulated:0.*cpu|cpu.*emulated:0)"):
        mix(there(3, 3), torch.ones(3, 3))


def test_one_number_of_the_host_and_indices_of_the_host_are_taken() -> None:
    x = there(3, 3)
    assert (x * torch.tensor(2.0)).sum().item() == 72
    assert x.masked_fill(x > 4, torch.tensor(0.0)).sum().item() == 10
    assert x[torch.tensor([2])].tolist() == [[6, 7, 8]]
    x[torch.tensor([0])] = 1.0
    assert x[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x & 3,
        lambda x: torch.bitwise_and(3, x),
        lambda x: x.clone().bitwise_or_(1),
        lambda x: (x > 2) & 1,
        lambda x: x << 1,
        lambda x: torch.remainder(7, x + 1),
        lambda x: torch.copysign(x.double() / 3, -1 / 3),
        lambda x: torch.special.xlogy(0.1, x.double()),
        lambda x: torch.special.xlogy(0.1, x),
    ],
)
def test_numbers_are_taken_where_tensors_are(action: Callable[[Tensor], Any]) -> None:
    host = torch.arange(6, dtype=torch.uint8)
    on_device, expected = action(host.to(DEVICE)), action(host)
    assert on_device.dtype == expected.dtype
    assert torch.equal(on_device.cpu(), expected)


def test_numpy_asks_for_a_copy_on_the_host() -> None:
    with pytest.raises(TypeError, match=r"emulated:0 device type tensor to numpy\. Use Tensor\.cpu\(\)"):
        there(2).numpy()


def test_a_generator_of_the_host_is_refused() -> None:
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


# --- waits ------------------------------------------------------------------------------------------------------------

WAITING: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "item": (lambda x: x[0, 0].item(), ["item"]),
    "float": (lambda x: float(x.sum()), ["item"]),
    "truth": (lambda x: bool((x > 100).any()), ["item"]),
    "tolist": (lambda x: x.tolist(), ["to host"]),
    "to the host": (lambda x: x.cpu(), ["to host"]),
    "print": (lambda x: f"{x.sum():.2f}", ["item"]),
    "nonzero": (lambda x: x.nonzero(), ["nonzero"]),
    "a mask as an index": (lambda x: x[x > 3], ["nonzero"]),
    "values under a mask": (lambda x: x.__setitem__(x > 3, torch.zeros(5, device=DEVICE)), ["nonzero"]),
    "one value under a mask": (lambda x: x.__setitem__(x > 3, x.sum()), ["nonzero"]),
    "masked_select": (lambda x: x.masked_select(x > 3), ["masked_select"]),
    "unique": (lambda x: x.unique(), ["_unique2"]),
    "equal": (lambda x: torch.equal(x, x), ["equal"]),
    "an index on the host": (lambda x: x[torch.tensor([1])], ["to device"]),
    "from the host": (lambda x: torch.ones(2).to(DEVICE), ["to device"]),
    "made of a list": (lambda x: torch.tensor([1, 2], device=DEVICE), ["to device"]),
    "not blocking, into memory that is not pinned": (
        lambda x: torch.empty(3, 3).copy_(x, non_blocking=True),
        ["to host"],
    ),
    "synchronize": (lambda x: torch.get_device_module(DEVICE).synchronize(), ["synchronize"]),
    "a norm to clip at": (lambda x: nn.utils.clip_grad_norm_([nn.Parameter(x)], 1.0, error_if_nonfinite=False), []),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_host_waits_for_what_it_must_know(name: str) -> None:
    action, expected = WAITING[name]
    x = there(3, 3)
    assert waits_of(lambda: action(x)) == expected


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64, device=DEVICE)),
        lambda x: x[torch.zeros(2, dtype=torch.int64, device=DEVICE)],
        lambda x: torch.where(x > 1, x, 0.0),
        lambda x: x.masked_fill(x > 1, 0.0),
        lambda x: x.__setitem__(x > 1, 0.0),
        lambda x: x[1:, :2].t().reshape(-1).sum(),
        lambda x: torch.arange(5, device=DEVICE),
        lambda x: torch.zeros(5, device=DEVICE),
        lambda x: x.to(torch.bfloat16).float().to(DEVICE),
        lambda x: torch.empty(3, 3).to(DEVICE, non_blocking=True),
        lambda x: torch.empty(3, 3).pin_memory().to(DEVICE, non_blocking=True),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(3, 3, pin_memory=True).copy_(x, non_blocking=True),
        lambda x: x.repeat_interleave(2, dim=0),
        lambda x: x.sort(), lambda x: x.topk(2), lambda x: x.cumsum(0), lambda x: F.one_hot(x.long(), 9),
    ],
)  # fmt: skip
def test_the_host_does_not_wait_for_what_the_device_can_do_alone(action: Callable[[Tensor], Any]) -> None:
    x = there(3, 3)
    assert waits_of(lambda: action(x)) == []


def test_a_wait_names_its_line() -> None:
    x = there(2)
    with accelerator.watch() as seen:
        x[0].item()
    assert seen.waits[0].line.startswith("test_accelerator.py:")
    assert seen.waits[0].line.endswith("test_a_wait_names_its_line")


# --- copies under way, streams and events -----------------------------------------------------------------------------


def test_a_copy_that_does_not_block_arrives_at_the_next_wait_and_is_garbage_until_then() -> None:
    x = there(3)
    for copy_it in (
        lambda: x.to("cpu", non_blocking=True),
        lambda: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
    ):
        host = copy_it()
        assert host.isnan().all()
        torch.get_device_module(DEVICE).synchronize()
        assert host.tolist() == [0, 1, 2]
    ids = x.long().to("cpu", non_blocking=True)
    assert ids.tolist() == [-1, -1, -1]


def test_an_event_brings_what_was_copied_before_it_was_recorded() -> None:
    module = torch.get_device_module(DEVICE)
    x = there(2)
    first = x.to("cpu", non_blocking=True)
    event = module.Event()
    event.record(module.current_stream())
    second = x.to("cpu", non_blocking=True)
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert first.tolist() == [0, 1]
    assert second.isnan().all()
    module.current_stream().synchronize()
    assert second.tolist() == [0, 1]


def test_pinned_memory_that_is_written_to_during_its_copy_is_a_hazard() -> None:
    host = torch.zeros(3, pin_memory=True)
    before = len(hazards())
    device = host.to(DEVICE, non_blocking=True)
    host.fill_(1)
    torch.get_device_module(DEVICE).synchronize()
    assert "was written to while it was being copied: test_accelerator.py" in hazards()[before]
    assert device.tolist() == [0, 0, 0]
    hazards().clear()


def test_a_stream_that_did_not_wait_for_the_one_that_writes_is_a_hazard() -> None:
    module = torch.get_device_module(DEVICE)
    side = module.Stream()
    for waits in (True, False):
        with module.stream(side):
            rows = torch.ones(3, pin_memory=True).to(DEVICE, non_blocking=True)
        if waits:
            module.current_stream().wait_stream(side)
        rows.sum()
        assert bool(hazards()) is not waits
    hazards().clear()


def test_pinned_memory_says_so_and_memory_of_the_device_cannot_be_pinned() -> None:
    pinned = torch.zeros(2).pin_memory()
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned()
    assert not torch.zeros(2).is_pinned()
    with pytest.raises(RuntimeError, match="cannot pin"):
        torch.zeros(2, device=DEVICE, pin_memory=True)


# --- memory -----------------------------------------------------------------------------------------------------------


def allocated() -> int:
    return torch.get_device_module(DEVICE).memory_allocated()


def test_memory_is_counted_by_storage_and_given_back() -> None:
    before = allocated()
    x = torch.zeros(100, device=DEVICE)
    views = [x[10:], x.view(10, 10), x.t(), x.detach(), x.expand(7, 100), x.data]
    assert allocated() - before == 400
    x.add_(1).mul_(2)
    assert allocated() - before == 400
    y = x.to(torch.bfloat16)
    assert allocated() - before == 600
    del x, y
    assert allocated() - before == 400  # which the views hold
    del views
    assert allocated() == before


def test_the_peak_is_known_with_the_lines_that_hold_it() -> None:
    module = torch.get_device_module(DEVICE)
    module.reset_peak_memory_stats()
    before = allocated()
    with accelerator.watch() as seen:
        x = torch.zeros(100, device=DEVICE)
        x + 1
        del x
    assert seen.peak_bytes - before == 800
    lines = seen.at_peak()
    here = [num_bytes for line, num_bytes in lines.items() if line.endswith("with_the_lines_that_hold_it")]
    assert here == [400, 400]
    assert sum(lines.values()) == seen.peak_bytes
    assert module.max_memory_allocated() == before + 800


def test_an_operation_has_the_temporaries_that_cuda_has() -> None:
    x = torch.zeros(1000, 100, device=DEVICE)
    with accelerator.watch() as seen:
        x.logsumexp(-1)
    assert 400_000 <= seen.peak_bytes - seen.start_bytes < 420_000  # exponentials


def test_a_card_that_is_full_runs_out_and_goes_on_when_something_is_freed() -> None:
    accelerator.set_total_memory(allocated() + 1000)
    x = torch.zeros(200, device=DEVICE, requires_grad=True)
    with pytest.raises(torch.OutOfMemoryError, match="emulated out of memory"):
        x.detach() + 1
    total = torch.get_device_module(DEVICE).mem_get_info()
    assert total[0] == 200
    small = x[:10].sum()
    with pytest.raises(torch.OutOfMemoryError):
        small.backward()
    with torch.no_grad():
        x.zero_()
    del x, small
    torch.zeros(240, device=DEVICE)


# --- traffic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "num_bytes"),
    [
        (lambda x: x + x[:1], 36 + 12 + 36),
        (lambda x: x.add_(1), 2 * 36),
        (lambda x: x.zero_(), 36),
        (lambda x: x.view(9)[2:].t(), 0),
        (lambda x: x.sum(), 36 + 4),
        (lambda x: torch.mm(x, x, out=x.new_empty(3, 3)), 3 * 36),
        (lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64, device=DEVICE)), 8 + 8 + 12 + 12),
        (
            lambda x: x.scatter_add_(1, torch.zeros(3, 1, dtype=torch.int64, device=DEVICE), x.new_ones(3, 1)),
            12 + 24 + 24 + 12 + 2 * 12,
        ),
        (lambda x: x.to(torch.bfloat16), 36 + 18),
        (lambda x: x.cpu(), 36),
    ],
)
def test_traffic_is_what_operations_read_and_write(action: Callable[[Tensor], Any], num_bytes: int) -> None:
    x = there(3, 3)
    with accelerator.watch() as seen:
        action(x)
    assert sum(seen.traffic.values()) == num_bytes
    assert sum(seen.traffic_by_line().values()) == sum(seen.traffic_by_operation().values()) == num_bytes


# --- copies of objects ------------------------------------------------------------------------------------------------


def test_deep_copies_share_nothing_and_keep_what_is_shared() -> None:
    network = small_network().to(DEVICE)
    network[4].weight = network[0].weight
    network.register_buffer("all", there(6))
    network.register_buffer("some", network.all[2:4])
    other = copy.deepcopy(network)
    assert other[4].weight is other[0].weight
    assert other[0].weight is not network[0].weight
    assert torch.equal(other[0].weight, network[0].weight)
    other.all.zero_()
    assert other.some.tolist() == [0, 0]
    assert network.some.tolist() == [2, 3]
    with torch.no_grad():
        other[0].weight.zero_()
    assert network[0].weight.any()


@pytest.mark.parametrize("where", [None, "cpu", DEVICE])
def test_saving_and_loading_keeps_the_device_or_takes_another(where: str | None) -> None:
    network = small_network().to(DEVICE)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location=where)
    assert {value.device.type for value in loaded.values()} == {where or DEVICE}
    assert torch.equal(loaded["0.weight"].to(DEVICE), network[0].weight)


def test_pickled_tensors_come_back_to_the_device() -> None:
    parameter = nn.Parameter(there(3))
    loaded = pickle.loads(pickle.dumps(parameter))
    assert type(loaded) is nn.Parameter
    assert loaded.device == parameter.device
    assert torch.equal(loaded, parameter)


# --- modules, autograd, optimizers ------------------------------------------------------------------------------------


def test_parameters_stay_the_same_objects_when_a_module_moves() -> None:
    network = small_network()
    parameters = list(network.parameters())
    for device in (DEVICE, "cpu", DEVICE):
        network.to(device)
        assert all(first is second for first, second in zip(parameters, network.parameters(), strict=True))
        assert {parameter.device.type for parameter in parameters} == {device}
        assert {type(parameter) for parameter in parameters} == {nn.Parameter}


def test_autograd_crosses_devices_both_ways() -> None:
    x = torch.ones(3, requires_grad=True)
    y = torch.ones(3, requires_grad=True, device=DEVICE)
    ((x.to(DEVICE) * y * 2).cpu() * 3).sum().backward()
    assert x.grad.device.type == "cpu"
    assert y.grad.device.type == DEVICE
    assert x.grad.tolist() == y.grad.tolist() == [6, 6, 6]


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {}])
def test_training_gives_the_values_of_the_cpu(options: dict[str, bool]) -> None:
    networks = [small_network(), small_network().to(DEVICE)]
    for network, device in zip(networks, ("cpu", DEVICE), strict=True):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, **options)
        for _ in range(3):
            loss_of(network, device).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(second.cpu(), first, rtol=1e-5, atol=1e-6)


def test_optimizers_take_the_foreach_kernels_on_the_device() -> None:
    network = small_network().to(DEVICE)
    loss_of(network).backward()
    with accelerator.watch() as seen:
        torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert not seen.waits
    assert {state.device.type for state in torch.optim.AdamW(network.parameters()).state.values()} == set()


def test_checkpointing_and_dropout_draw_the_same_numbers_again() -> None:
    network = small_network().to(DEVICE)
    x = there(4, 8).requires_grad_()

    def block(hidden: Tensor) -> Tensor:
        return F.dropout(network[2](hidden), 0.5)

    before = torch.get_rng_state()
    output = checkpoint(block, x, use_reentrant=False)
    output.sum().backward()
    weight = network[2].weight
    kept = (output != 0).float() * 2
    torch.testing.assert_close(x.grad, kept @ weight)
    assert torch.equal(before, torch.get_rng_state())  # the device has numbers of its own


def test_the_seed_is_the_devices_too() -> None:
    torch.manual_seed(3)
    first = torch.rand(5, device=DEVICE)
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(5, device=DEVICE))


def test_inference_mode_makes_inference_tensors_and_views_of_others_stay_what_they_are() -> None:
    x = there(3)
    with torch.inference_mode():
        made = x + 1
        assert made.is_inference()
        assert not x[1:].is_inference()
    assert not x.is_inference()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        made * torch.ones(3, device=DEVICE, requires_grad=True)


# --- autocast, default devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_narrows_products_and_widens_sums(dtype: torch.dtype) -> None:
    network = small_network().to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        hidden = network(torch.arange(3, device=DEVICE))
        assert hidden.dtype == dtype
        assert (hidden @ hidden.t()).dtype == dtype
        assert hidden.softmax(-1).dtype == hidden.sum().dtype == torch.float32
        assert F.layer_norm(hidden, (20,)).dtype == torch.float32
        assert (hidden + 1).dtype == dtype
        assert torch.mm(hidden.double().t(), hidden.double()).dtype == torch.float64
        loss = F.cross_entropy(hidden, torch.arange(3, device=DEVICE))
    assert loss.dtype == torch.float32
    loss.backward()
    assert network[2].weight.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled(DEVICE)


def test_autocast_casts_a_parameter_once_and_lets_go_of_it() -> None:
    weight = nn.Parameter(torch.ones(100, 100, device=DEVICE))
    x = torch.ones(1, 100, device=DEVICE)
    before = allocated()
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad(), accelerator.watch() as seen:
        x @ weight
        x @ weight
    assert seen.operations["copy_"] == 3 or seen.peak_bytes - before < 2 * 20_000
    assert allocated() == before


def test_a_scaler_skips_a_step_that_is_not_finite() -> None:
    network = small_network().to(DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    before = network[0].weight.clone()
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(loss_of(network) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, network[0].weight) is (factor != 1.0)
    assert scaler.get_scale() == 2.0


def test_a_default_device_is_where_new_tensors_land() -> None:
    torch.set_default_device(DEVICE)
    try:
        assert torch.zeros(2).device.type == torch.tensor([1.0]).device.type == DEVICE
        assert nn.Linear(2, 2).weight.device.type == DEVICE
        assert loss_of(small_network()).item() > 0
    finally:
        torch.set_default_device(None)
    with torch.device(DEVICE):
        assert torch.arange(2).device.type == DEVICE
    assert torch.zeros(2).device.type == "cpu"


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
def test_attention_is_the_cpus_and_holds_no_scores(mask: torch.dtype | None) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, heads, 256, 8, generator=generator) for heads in (4, 2, 2))
    bias = None if mask is None else (torch.rand(1, 1, 256, 256, generator=generator) > 0.2).to(mask)
    found = []
    for device in ("cpu", DEVICE):
        inputs = [each.to(device).detach().clone().requires_grad_() for each in (queries, keys, values)]
        there = None if bias is None else bias.to(device)
        with accelerator.watch() as seen:
            result = F.scaled_dot_product_attention(*inputs, attn_mask=there, is_causal=bias is None, enable_gqa=True)
            result.sum().backward()
        found.append([result, *(each.grad for each in inputs)])
    assert all(torch.equal(first, second.cpu()) for first, second in zip(*found, strict=True))
    scores_bytes = 4 * 256 * 256 * 4
    assert seen.peak_bytes - seen.start_bytes < scores_bytes


# --- a card on paper --------------------------------------------------------------------------------------------------


def test_where_nothing_is_computed_bytes_and_waits_are_the_same() -> None:
    """In a second step too, whose shapes are known from the first."""
    found = []
    for computes in (True, False):
        with accelerator.in_use(computes=computes):
            network = small_network().to(DEVICE)
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
            for _ in range(2):
                with accelerator.watch() as seen:
                    loss = loss_of(network)
                    loss.backward()
                    optimizer.step()
                    loss.item()
                    optimizer.zero_grad()
                found.append((seen.peak_bytes - seen.start_bytes, len(seen.waits), sum(seen.traffic.values())))
            parts = accelerator.parts(network, optimizer)
            assert parts["states"] == 2 * parts["weights"]
            del network, optimizer, loss
    assert found[:2] == found[2:]


def test_where_nothing_is_computed_shapes_that_are_known_are_still_those_that_are_asked_for() -> None:
    with accelerator.in_use(computes=False):
        x = torch.zeros(3, dtype=torch.uint8, device=DEVICE)
        for _ in range(2):
            assert [(x + number).dtype for number in (1, 1.0, True)] == [torch.uint8, torch.float32, torch.uint8]
            out = torch.empty(0, dtype=torch.uint8, device=DEVICE)
            assert torch.bitwise_and(x, x, out=out).shape == out.shape == (3,)
            assert [part.shape for part in torch.aminmax(x.view(1, 3), dim=1)] == [(1,), (1,)]


def test_where_nothing_is_computed_a_large_model_takes_no_memory() -> None:
    with accelerator.in_use(computes=False):
        weight = torch.empty(1 << 20, 1 << 14, device=DEVICE)
        hidden = torch.ones(8, 1 << 14, device=DEVICE) @ weight.t()
        assert hidden.shape == (8, 1 << 20)
        assert allocated() >= 1 << 36
        labels = torch.zeros(8, dtype=torch.int64, device=DEVICE)
        assert (labels != -100).nonzero().shape == (8, 1)  # ignored labels are counted as none
        assert hidden.sum().item() == 0.0


def test_the_device_is_gone_after_its_use() -> None:
    with accelerator.in_use():
        assert torch.get_device_module(DEVICE).is_available()
        inner = torch.zeros(2, pin_memory=True)
        assert inner.is_pinned()
    switches = accelerator.memory.switches
    switches.in_use = False
    try:
        assert not torch.get_device_module(DEVICE).is_available()
        assert torch.accelerator.current_accelerator(check_available=True) is None
        with pytest.raises(RuntimeError, match="pin"):
            torch.zeros(2).pin_memory()
    finally:
        switches.in_use = True
