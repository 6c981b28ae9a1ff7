import sys
from pathlib import Path

import numpy as np
import pytest

from tests.campaign import __main__ as campaign
from tests.campaign import averages
from tests.campaign.part import Part, Verdict

# Of which the first cases are soon compiled, and of several kinds.
_SEED = 9


# Those that start no process.
QUICK = {"averages", "damage", "windows"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in campaign.PARTS]
)
def test_a_piece_of_the_campaign(name: str):
    part = campaign.load_part(name)
    verdicts = [campaign.run_case(part, _SEED, number) for number in range(part.num_tested)]
    assert [failure for verdict in verdicts for failure in verdict.failures] == []
    assert any(verdict.tally for verdict in verdicts)


@pytest.mark.slow
def test_a_campaign_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    drawn: list[int] = []

    def check(rng: np.random.Generator, folder: Path) -> Verdict:
        drawn.append(int(rng.integers(10**9)))
        assert not list(folder.iterdir())
        if len(drawn) == 26:
            raise KeyboardInterrupt
        if len(drawn) == 3:
            raise ValueError("never seen")
        return Verdict({"good": 1}, ("too large",) if len(drawn) == 29 else ())

    def run() -> object:
        with pytest.raises(SystemExit) as stopped:
            campaign.main()
        return stopped.value.code

    record = tmp_path / "campaign.txt"
    monkeypatch.setattr(averages, "PART", Part(45, 1, check))
    monkeypatch.setattr(campaign, "_RECORD", record)
    command = f"campaign --parts averages --seed 3 --num-processes 1 --output {tmp_path / 'progress'} --record"
    monkeypatch.setattr(sys, "argv", command.split())
    assert "the same command goes on from there" in str(run())
    assert run() == "2 failures."
    # Cases 0 to 25, and then those from 20 on, which are drawn as before.
    assert len(drawn) == 26 + 25
    assert drawn[20:26] == drawn[26:32]
    assert drawn[26] == np.random.default_rng([3, 20]).integers(10**9)
    summary = record.read_text()
    assert summary in capsys.readouterr().out
    assert "good: 44" in summary
    assert "averages, seed 3, case 2: ValueError at test_campaign.py" in summary
    assert "averages, seed 3, case 22: too large" in summary
    assert run() == "2 failures."
    assert len(drawn) == 26 + 25
    # What has been found of another version of the library is not.
    monkeypatch.setattr(campaign, "_source", lambda: "another")
    monkeypatch.setattr(sys, "argv", [*command.split(), "--first-case", "2", "--num-cases", "1"])
    campaign.main()
    assert len(drawn) == 26 + 25 + 1


def test_options_out_of_range_are_named(monkeypatch: pytest.MonkeyPatch):
    for option in ("--num-cases 0", "--num-processes 0", "--first-case -1"):
        monkeypatch.setattr(sys, "argv", f"campaign --parts averages {option}".split())
        with pytest.raises(SystemExit, match=f"error: {option} must"):
            campaign.main()
