"""What the launcher says of workers that failed: what ended them, and not what it did to them itself."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pycomm.pretrain.launch import END_S, _explain


def failures(*codes: int) -> dict[int, ProcessFailure]:
    return {rank: ProcessFailure(rank, 0, code, "") for rank, code in enumerate(codes)}


@pytest.mark.parametrize(
    ("codes", "ending_s", "said", "code"),
    [
        # Rank 0 has said that rank 1 is late; then the launcher has killed rank 1, which SIGTERM could not reach.
        ((3, -9), END_S + 1, "rank(s) 1 did not end within 30 s after another had, and were killed: stopped", 1),
        ((3, -9), 1.0, "rank 1 was ended by SIGKILL (by the kernel for want of memory?", 1),
        ((-15, -9), END_S + 1, "rank 1 was ended by SIGKILL", 1),
        ((-9, -11), END_S + 1, "rank 1 was ended by SIGSEGV", 1),
        ((2, -15), 1.0, "", 2),
        ((3, 130), 1.0, "", 130),
        ((-15, 7), 1.0, "workers ended with exit codes [-15, 7]", 1),
    ],
)
def test_the_cause_is_told(
    codes: tuple[int, ...], ending_s: float, said: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _explain(failures(*codes), ending_s) == code
    errors = capsys.readouterr().err
    assert said in errors
    assert bool(errors) is bool(said)
    if "did not end" in said:
        assert "memory" not in errors
