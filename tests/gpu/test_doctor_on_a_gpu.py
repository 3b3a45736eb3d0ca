"""The doctor's own claim, on a GPU: every function by every backend that can run there, against float64."""

import json
import os

import pytest

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")  # tuning takes seconds a kernel

from tileloss import cli

pytestmark = pytest.mark.gpu


def test_all_is_well_and_the_kernels_were_among_what_was_checked(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    findings = [finding for findings in report["checks"].values() for finding in findings]
    assert [finding for finding in findings if finding["status"] == "failed"] == []
    assert status == 0
    checked = {finding["name"] for finding in report["checks"]["self-check"]}
    assert {"contrastive_loss (tiled)", "contrastive_loss (triton)", "triplet_loss, hard (triton)"} <= checked
