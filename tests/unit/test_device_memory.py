"""Bytes on a device in one training step, and bytes that the loss moves, on paper: bars, some of which are not reached today."""

import accelerator
import pytest
import torch
from device_peaks import DIM, DTYPES, FULL_SIZE, MODES, NUM_KEPT, NUM_TOKENS, loss_traffic, peaks_of

from leanvocab.output.logit_operations import Elementwise
from leanvocab.output.loss import LossOptions, SoftmaxColumns, chunk_bytes, cross_entropy, tokens_at_once
from leanvocab.output.projection import KeptRows

pytestmark = [pytest.mark.filterwarnings("ignore:.*which is another objective:leanvocab.errors.LeanVocabWarning")]

if not accelerator.can_be_emulated():
    pytest.skip("torch can emulate a device from 2.13 on", allow_module_level=True)

SHRUNK = tuple(mode for mode in MODES if mode != "ordinary")


def test_on_paper_peaks_are_those_of_a_device_that_computes() -> None:
    """Where ignored labels are few: they are counted as none."""
    on_paper, computed = peaks_of("bf16", "frozen, device"), peaks_of("bf16", "frozen, device", computes=True)
    assert vars(on_paper) == pytest.approx(vars(computed), rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", SHRUNK)
def test_a_shrunk_model_trains_in_less_memory_than_an_ordinary_one(dtype: str, mode: str) -> None:
    assert peaks_of(dtype, mode).training < 0.75 * peaks_of(dtype, "ordinary").training


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_rows_on_the_host_save_the_memory_that_they_would_take(dtype: str) -> None:
    frozen_bytes = (FULL_SIZE - NUM_KEPT) * DIM * (2 if "bf16" in dtype else 4)
    saved = peaks_of(dtype, "frozen, device").training - peaks_of(dtype, "frozen, host").training
    assert saved > 0.9 * frozen_bytes


@pytest.mark.parametrize("mode", SHRUNK)
def test_bf16_takes_no_more_than_fp32(mode: str) -> None:
    assert peaks_of("bf16", mode).training <= peaks_of("fp32", mode).training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_estimate_is_the_peak_without_activations(dtype: str, mode: str) -> None:
    """In a batch whose gradients are added to those of another one: there all that is counted is there at once."""
    peaks = peaks_of(dtype, mode)
    assert peaks.estimated == pytest.approx(peaks.accumulating - peaks.activations, rel=0.02)


@pytest.mark.parametrize("mode", SHRUNK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_holds_one_chunk_of_scores_beside_what_training_holds(dtype: str, mode: str) -> None:
    """Of narrow scores also those of an eighth of the tokens in fp32; of streamed rows scores of all are more than there are."""
    peaks, is_narrow = peaks_of(dtype, mode), "bf16" in dtype
    scores = NUM_TOKENS * (NUM_KEPT if mode == "restricted" else FULL_SIZE)
    chunk_bytes = scores * 2 + scores * 4 // 8 if is_narrow else scores * 4
    gradient_bytes = NUM_KEPT * DIM * (2 if is_narrow else 4)
    activation_bytes = peaks.activations + peaks.copies
    assert peaks.training <= 1.02 * (peaks.between_steps + gradient_bytes + activation_bytes + chunk_bytes)


@pytest.mark.parametrize("mode", SHRUNK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_holds_no_full_matrix_beside_the_one_that_stays(dtype: str, mode: str) -> None:
    peaks = peaks_of(dtype, mode)
    assert peaks.merging <= 1.02 * peaks.merged


@pytest.mark.parametrize(
    ("gibibytes", "mebibytes"), [(1, 64), (4, 128), (7.8, 256), (11.7, 256), (14.7, 512), (80, 512)]
)
def test_chunks_of_scores_follow_the_memory_of_a_card(gibibytes: float, mebibytes: int) -> None:
    assert chunk_bytes("cuda", int(gibibytes * 2**30)) == mebibytes << 20


def test_chunks_of_scores_do_not_follow_what_is_free() -> None:
    """Sums over chunks are rounded by their sizes: what else is on a card is not to change the bits of a run."""
    with accelerator.in_use(computes=False):
        accelerator.set_total_memory(8 << 30)
        device = accelerator.device()
        when_empty = tokens_at_once(device, 2, FULL_SIZE)
        filling = torch.empty(7 << 30, dtype=torch.uint8, device=device)
        assert tokens_at_once(device, 2, FULL_SIZE) == when_empty == (256 << 20) // (4 * FULL_SIZE)
        del filling


def test_a_card_of_eight_gibibytes_holds_half_the_scores_of_a_large_one() -> None:
    def peak(gibibytes: int) -> int:
        with accelerator.in_use(computes=False):
            accelerator.set_total_memory(gibibytes << 30)
            columns, rows, dim = 250_000, 1_024, 8
            hidden = torch.zeros(rows, dim, device=accelerator.NAME, requires_grad=True)
            weight = torch.zeros(columns, dim, device=accelerator.NAME)
            labels = torch.zeros(rows, dtype=torch.int64, device=accelerator.NAME)
            kept = KeptRows(torch.arange(columns, device=accelerator.NAME), columns)
            with accelerator.watch() as seen:
                everything = SoftmaxColumns(lambda: kept, columns)
                cross_entropy(everything, Elementwise(columns), hidden, weight, labels, LossOptions()).backward()
            return seen.peak_bytes - seen.start_bytes

    assert peak(8) == pytest.approx(256 << 20, rel=0.1)
    assert peak(24) == pytest.approx(512 << 20, rel=0.1)


@pytest.mark.parametrize("mode", SHRUNK)
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_by_kernels_the_loss_passes_over_its_scores_five_times_at_most(dtype: str, mode: str) -> None:
    assert sum(loss_traffic(dtype, mode, by_kernels=True).values()) <= 5


_WIDENING = pytest.mark.xfail(
    strict=True,
    reason="11.2, 13.8 and 12.9 passes: none of torch's operations adds up exponentials of narrow scores in fp32, so that a wide "
    "copy of them is written (3) and made a softmax (4): more than five before the gradient is written. Triton's kernels do it "
    "(docs/decisions/frozen-rows.md)",
)


@pytest.mark.parametrize("mode", SHRUNK)
def test_by_torchs_operations_narrow_scores_are_passed_over_eleven_times(mode: str) -> None:
    """Widened (3), looked through for the highest (1), made a softmax (4), narrowed (3); what is over it is per token."""
    passes = loss_traffic("bf16", mode)
    over_scores = sum(int(passes[name]) for name in ("copy_", "max", "_softmax"))
    assert (over_scores, int(passes["_softmax"]), int(passes["max"])) == (11, 4, 1)


@pytest.mark.parametrize("mode", SHRUNK)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=_WIDENING)])
def test_by_torchs_operations_the_loss_passes_over_its_scores_five_times_at_most(dtype: str, mode: str) -> None:
    assert sum(loss_traffic(dtype, mode).values()) <= 5
