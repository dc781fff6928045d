"""Short hunts find nothing; `make fuzz` goes on for ten minutes from another seed.

And each hunt finds the mistakes it is there for, within a share of that time.
"""

import shlex

import pytest
import torch

import sabotage
from fuzz.campaign import HUNTS, hunt, run_case
from fuzz.mistakes import MISTAKES
from normkit.functional import signature

# Faults of the sabotage suite that the hunts must find, too.
PLANTED = {
    "the_last_column_is_dropped": "layers",
    "the_variance_is_a_difference_of_squares": "layers",
    "a_mask_divides_by_the_padded_length": "layers",
    "the_backward_forgets_the_weight": "layers",
    "the_backward_takes_the_mean_for_a_constant": "layers",
    "the_weight_gradient_is_not_standardized": "layers",
    "the_fused_move_takes_the_share_of_the_old": "layers",
    "batches_are_not_counted": "layers",
    "a_nan_enters_the_running_statistics": "layers",
    "the_gradient_of_the_sum_is_lost": "layers",
    "a_fold_ignores_zero_padding": "fold",
    "a_fold_overlooks_the_second_reader": "fold",
    "a_negative_scale_passes_a_relu": "fold",
    "a_second_reader_is_overlooked": "convert",
    "a_deferral_takes_the_weights_of_later": "convert",
}
SECONDS = {"layers": 45, "others": 30, "fold": 60, "convert": 60, "onnx": 90}


@pytest.fixture(autouse=True)
def one_thread_and_nothing_remembered():
    signature.calls.clear()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    signature.calls.clear()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HUNTS)
def test_a_short_hunt_finds_nothing(name: str) -> None:
    outcome = hunt(name, seconds=2)
    assert not outcome.failures, outcome.to_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HUNTS)
def test_a_hunt_finds_nothing(name: str) -> None:
    outcome = hunt(name, seconds=20, first_seed=1000)
    assert not outcome.failures, outcome.to_text()


@pytest.mark.parametrize("planted", [*MISTAKES, *PLANTED])
def test_a_mistake_finds_the_place_where_it_is_planted(planted: str) -> None:
    plant = (
        MISTAKES[planted][1] if planted in MISTAKES else sabotage.FAULTS[planted].plant
    )
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("planted", [*MISTAKES, *PLANTED])
def test_a_hunt_finds_the_mistake(
    planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted in MISTAKES:
        name, plant = MISTAKES[planted]
    else:
        name, plant = PLANTED[planted], sabotage.FAULTS[planted].plant
    plant(monkeypatch)
    seconds = SECONDS.get(name, 30)
    outcome = hunt(name, seconds=seconds, most_failures=1, shrinks=False)
    assert outcome.failures, f"not in {outcome.tried} cases of {seconds} s"


def test_a_failure_prints_the_line_that_runs_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, plant = MISTAKES["gelu_is_that_of_tanh"]
    plant(monkeypatch)
    outcome = hunt(name, seconds=60, most_failures=1)
    (failure,) = outcome.failures
    assert "seed " in failure
    *command, text = shlex.split(failure.splitlines()[-1])
    assert command == ["python", "-m", "fuzz", "layers"]
    with pytest.raises(AssertionError):
        run_case(name, text)
    monkeypatch.undo()
    signature.calls.clear()
    run_case(name, text)
