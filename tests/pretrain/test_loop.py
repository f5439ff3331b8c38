"""The training loop: the same numbers with one process and two, and after a resume; errors reach every rank."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import pycomm
from pycomm.errors import PeerLostError
from pycomm.pretrain import (
    OptimConfig,
    PretrainConfig,
    PretrainError,
    RunConfig,
    StepRecord,
    TrainState,
    build_state,
    checkpoint,
    train,
)
from pycomm.pretrain.data import Corpus, prepare
from pycomm.pretrain.loop import abort_on_error, validate
from tests.pretrain.helpers import small_config


def run_in_pool(comm: pycomm.Communicator, config: PretrainConfig, cache: str) -> list[StepRecord]:
    """One run from its first step; returns its records."""
    records: list[StepRecord] = []
    corpus = prepare(config, Path(cache))
    train(comm, config, corpus, build_state(comm, config), on_step=records.append)
    return records


def interrupted_in_pool(
    comm: pycomm.Communicator, config: PretrainConfig, cache: str, folder: str, stop_at: int, zero_afterwards: int
) -> list[StepRecord]:
    """The same run, but rank 1 (or the only one) asks to stop, and another state goes on from the checkpoint.

    Args:
        zero_afterwards: the stage of ZeRO of that other state.
    """
    records: list[StepRecord] = []
    corpus = prepare(config, Path(cache))

    def save(state: TrainState) -> None:
        if comm.rank == 0:
            checkpoint.save(Path(folder), state, config, corpus.key)
        else:
            checkpoint.contribute(state)

    def stop() -> bool:
        # Asked before the step is computed: after stop_at - 1 records, step stop_at is the last.
        return comm.rank == comm.world_size - 1 and len(records) == stop_at - 1

    assert not train(comm, config, corpus, build_state(comm, config), on_step=records.append, save=save, stop=stop)
    assert len(records) == stop_at
    comm.barrier()
    # Another seed, so that nothing but the checkpoint can bring the weights.
    state = build_state(comm, dataclasses.replace(config, seed=config.seed + 1, zero=zero_afterwards))
    checkpoint.load(Path(folder) / "latest", comm, state)
    assert train(comm, config, corpus, state, on_step=records.append)
    return records


def losses(records: list[StepRecord]) -> torch.Tensor:
    return torch.tensor([record.loss for record in records], dtype=torch.float64)


@pytest.mark.parametrize("zero", [1, 2])
def test_two_processes_and_one_see_the_same_losses(pool: Any, tmp_path: Path, zero: Literal[1, 2]) -> None:
    """Law 7. One process sums a step's gradient over four micro-batches, two over two each and then over the ranks.

    Both compute the same real numbers; fp32 rounds them differently. The bound on the losses' difference:

    * A gradient entry is a mean over N = 256 tokens' terms. Regrouping N terms moves their sum by about sqrt(N) * u
      times the sum of their magnitudes (u = 2**-24, independent roundings), and terms that cancel make the magnitudes
      about sqrt(N) times the sum: relative error N * u = 1.5e-5 of the gradient's norm, which clipping holds to <= 1.
    * The optimizer is smooth here (see SMOOTH): an update moves by lr <= 0.5 times the gradient's error. Roundings of
      different steps are independent, so 50 of them add up to sqrt(50) of one: the weights differ by at most
      sqrt(50) * 0.5 * 1.5e-5 = 5.4e-5, if training does not amplify errors. It is stable, so they grow only along
      directions of negative curvature; allow a factor of 3.
    * A loss moves by at most the gradient's norm times the weights' difference: 4e-4 for the norm of 2.7 seen here.

    Seen: 4e-7. Losses of neighbouring steps differ by 0.05, so a rank with a wrong batch, a sum instead of a mean or a
    lost micro-batch is far outside of the bound; the last assertion sees to that.
    """
    config = small_config(steps=50, zero=zero)
    one = pool.run(1, run_in_pool, config, str(tmp_path))[0]
    two = pool.run(2, run_in_pool, config, str(tmp_path))
    assert losses(two[0]).equal(losses(two[1])), "both ranks report the global loss"
    largest_norm = max(record.grad_norm for record in one)
    bound = 3 * 50**0.5 * 0.5 * 256 * 2**-24 * largest_norm
    difference = (losses(one) - losses(two[0])).abs()
    assert len(one) == len(two[0]) == 50
    assert difference.max() <= bound, f"{difference.max()} > {bound} at step {difference.argmax() + 1}"
    assert losses(one)[-1] < 0.95 * losses(one)[0], "nothing was learned, so nothing was compared"
    assert one[-1].val_loss is not None
    assert two[0][-1].val_loss == pytest.approx(one[-1].val_loss, abs=bound)
    assert losses(one).diff().abs().median() > 20 * bound, "the bound is too wide to tell one batch from another"


# Stages 0 and 1 have the same bits; with two micro-batches a rank, stage 2 has its own.
@pytest.mark.parametrize(("world_size", "zero", "zero_afterwards"), [(1, 1, 1), (2, 1, 0), (2, 0, 1), (2, 2, 2)])
def test_a_resumed_run_goes_on_to_the_bit(
    pool: Any, tmp_path: Path, world_size: int, zero: Literal[0, 1, 2], zero_afterwards: int
) -> None:
    # The usual AdamW: resuming must be exact, so it needs no smooth optimizer.
    config = small_config(steps=14, optim=OptimConfig(warmup_steps=3), zero=zero)
    straight = pool.run(world_size, run_in_pool, config, str(tmp_path / "cache"))[0]
    folders = str(tmp_path / "cache"), str(tmp_path / "save")
    parts = pool.run(world_size, interrupted_in_pool, config, *folders, 6, zero_afterwards)
    for records in parts:
        assert losses(records).equal(losses(straight))
        assert [record.grad_norm for record in records] == [record.grad_norm for record in straight]
        assert [record.step for record in records] == list(range(1, 15))


def test_the_global_batch_can_be_cut_in_any_way(tmp_path: Path) -> None:
    # One update lies between the first loss and the second: the bound above for one step, with a norm below 5, and for
    # the losses themselves (means of 256 values of magnitude 6) 256 * 6 * 2**-24.
    configs = [small_config(steps=2, micro_batch=micro_batch) for micro_batch in (8, 4, 1)]
    with pycomm.init() as comm:
        results = [losses(run_in_pool(comm, config, str(tmp_path))) for config in configs]
    for result in results[1:]:
        assert (result - results[0]).abs().max() <= (0.5 * 5 + 6) * 256 * 2**-24


def test_records_have_the_numbers_of_the_step(tmp_path: Path) -> None:
    config = small_config(steps=4, run=RunConfig(val_every=2, peak_tflops=0.001))
    with pycomm.init() as comm:
        records = run_in_pool(comm, config, str(tmp_path))
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert [record.val_loss is None for record in records] == [True, False, True, False]
    # An untrained model is close to indifferent between its 512 tokens: logits have standard deviation 0.02 * sqrt(32),
    # which moves the mean log-probability by half their variance, 0.0064, and the drawn tokens scatter it by less.
    assert abs(records[0].loss - torch.tensor(512.0).log().item()) < 0.1
    for record in records:
        flops = flops_per_token(config) * record.tokens_per_s
        assert record.mfu == pytest.approx(flops / 1e9)
        assert record.exposed_comm_ms >= 0


def flops_per_token(config: PretrainConfig) -> int:
    shape = config.model
    weights = shape.num_layers * 12 * shape.hidden**2 + shape.vocab_size * shape.hidden
    return 6 * weights + 12 * shape.num_layers * shape.max_seq * shape.hidden


def test_validation_is_the_mean_over_held_out_sequences(tmp_path: Path) -> None:
    config = small_config()
    corpus = prepare(config, tmp_path)
    with pycomm.init() as comm:
        model = build_state(comm, config).model
        whole = validate(comm, config, corpus, model)
        by_one = validate(comm, dataclasses.replace(config, micro_batch=1), corpus, model)
    # Means of 32 fp32 losses of magnitude 6.3 with at most 32 roundings of 2**-24 each.
    assert whole == pytest.approx(by_one, abs=6.3 * 32 * 2**-24)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    config = small_config(steps=3)
    with pycomm.init() as comm:
        corpus = prepare(config, tmp_path)
        state = build_state(comm, config)
        train(comm, dataclasses.replace(config, steps=1), corpus, state)
        with torch.no_grad():
            state.model.final_norm.weight[0] = torch.inf
        before = [parameter.clone() for parameter in state.model.parameters()]
        with pytest.raises(PretrainError, match=r"step 2: the loss is nan.*last checkpoint is kept"):
            train(comm, config, corpus, state)
    assert state.step == 1
    for old, new in zip(before, state.model.parameters(), strict=True):
        assert torch.equal(old, new)


def failing_in_pool(comm: pycomm.Communicator, config: PretrainConfig, cache: str) -> str:
    """Rank 1 fails after its second step; returns what each rank got to see of it."""
    corpus: Corpus = prepare(config, Path(cache))
    with comm.split(color=0) as group:  # a group of its own, since the failure makes it unusable

        def fail(record: StepRecord) -> None:
            if comm.rank == 1 and record.step == 2:
                raise ZeroDivisionError("a bug in step 2")

        try:
            train(group, config, corpus, build_state(group, config), on_step=fail)
        except (PeerLostError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_failed_step_reaches_the_other_rank_with_its_reason(pool: Any, tmp_path: Path) -> None:
    config = small_config(steps=1000)
    prepare(config, tmp_path)
    seen = pool.run(2, failing_in_pool, config, str(tmp_path))
    assert seen[0].startswith("PeerLostError")
    assert "a bug in step 2" in seen[0]
    assert seen[1] == "ZeroDivisionError: a bug in step 2"


def test_only_what_others_do_not_know_is_passed_on() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.reasons: list[str] = []

        def abort(self, reason: str) -> None:
            self.reasons.append(reason)

    recorder = Recorder()
    for error in (PeerLostError("gone"), KeyboardInterrupt(), KeyError("k")):
        with pytest.raises(type(error)), abort_on_error(recorder):  # type: ignore[arg-type]
            raise error
    assert recorder.reasons == ["KeyboardInterrupt: ", "KeyError: 'k'"]
