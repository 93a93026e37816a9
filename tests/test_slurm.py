"""What a job asks of Slurm, with programs that answer as Slurm does; tests/cluster asks a real one."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime

import pytest

from simclr import BadInput, rolling, slurm


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """program → what it says and its exit status, at first none so many times; it writes down its calls."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(slurm, "PAUSE", 0)
    calls = tmp_path / "calls"

    def answer(program: str, said: str, status: int = 0, mute: int = 0) -> None:
        stream = 2 if status else 1
        path = tmp_path / program
        path.write_text(
            f"#!/bin/sh\necho $* >> {calls}\n[ $(wc -l < {calls}) -gt {mute} ] || exit 1\n"
            f"echo '{said}' >&{stream}\nexit {status}\n"
        )
        path.chmod(0o755)

    return answer


def period(since: float, until: float) -> str:
    """Return start and end, in seconds from now, as squeue writes them."""
    times = (datetime.fromtimestamp(time.time() + seconds) for seconds in (since, until))
    return " ".join(each.isoformat(timespec="seconds") for each in times)


def test_outside_a_job_there_is_no_limit(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm.seconds_left() is None
    assert not rolling.set_alarm()


@pytest.mark.parametrize(
    ("since", "until", "left"), [(-86_400, 7_200, 7_200 - slurm.LEAD), (0, 600, 540), (-595, 5, -55)]
)
def test_the_time_to_stop_lies_before_the_end_of_the_job(answers, since, until, left):
    answers("squeue", period(since, until))
    assert slurm.seconds_left() == pytest.approx(left, abs=3)


def test_a_job_without_a_limit_has_none(answers, capsys):
    answers("squeue", f"{period(-5, 0).split()[0]} N/A")
    assert slurm.seconds_left() is None
    assert capsys.readouterr().err == ""


def test_a_limit_that_nobody_tells_is_said_to_be_unwatched(answers, capsys):
    answers("squeue", "Unable to contact slurm controller", status=1)
    assert slurm.seconds_left() is None
    assert "limit of job 17 is not watched: Unable to contact slurm controller" in capsys.readouterr().err


def test_a_slurm_that_does_not_answer_is_asked_again(answers, tmp_path, capsys):
    answers("squeue", period(0, 600), mute=4)
    assert slurm.seconds_left() == pytest.approx(540, abs=3)
    (tmp_path / "calls").unlink()
    answers("scontrol", "", mute=4)
    slurm.requeue()
    assert capsys.readouterr().err == "job 17 is queued again: its time limit is near\n"


@pytest.mark.parametrize(
    "said", ["slurm_load_jobs error: Invalid job id specified", "Requested operation is presently disabled"]
)
def test_a_slurm_that_refuses_is_asked_once(answers, tmp_path, said):
    answers("squeue", said, status=1)
    answers("scontrol", said, status=1)
    assert slurm.seconds_left() is None
    slurm.requeue()
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_a_training_stops_when_its_time_is_over_and_not_when_more_was_given(answers):
    answers("squeue", period(-60, -1))
    with rolling.stop_signals() as signals:
        answers("squeue", period(0, 3600))
        signal.raise_signal(signal.SIGALRM)
        assert signals == []
        answers("squeue", period(-60, 1))
        signal.raise_signal(signal.SIGALRM)
        assert signals == [signal.SIGALRM]


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGALRM, True), (signal.SIGTERM, False)])
def test_only_a_job_that_ran_out_of_time_is_queued_again(answers, tmp_path, capsys, number, requeued):
    answers("scontrol", "")
    with pytest.raises(SystemExit) as ended:
        rolling.stop("after step 3 of 9", [number])
    assert ended.value.code == rolling.STOPPED
    calls = tmp_path / "calls"
    assert (calls.read_text() if calls.exists() else "") == ("requeue 17\n" if requeued else "")
    assert ("job 17 is queued again" in capsys.readouterr().err) == requeued


def test_a_refusal_to_queue_again_is_said(answers, capsys):
    answers("scontrol", "Requested operation is presently disabled for job 17", status=1)
    slurm.requeue()
    assert "job 17 is not queued again: Requested operation is presently" in capsys.readouterr().err


def test_jobs_of_this_folder_are_found_among_others(answers, tmp_path):
    rows = [
        f"17|RUNNING|rule_pretrain_wildcards_simclr|{tmp_path}",
        f"18|PENDING|rule_demo|{tmp_path}",
        f"19|RUNNING|(null)|{tmp_path}",
        "20|RUNNING|rule_demo|/elsewhere",
        f"22|COMPLETING|rule_demo|{tmp_path}",
        f"21_[3-5]|PENDING|rule_features_wildcards_simclr_imagenet_val|{tmp_path}",
    ]
    answers("squeue", "\n".join(rows))
    assert slurm.jobs_from(tmp_path) == [
        ("17", "running", "pretrain", "simclr"),
        ("18", "pending", "demo", ""),
        ("21_[3-5]", "pending", "features", None),
    ]


def test_a_slurm_that_does_not_answer_is_not_one_without_jobs(answers, tmp_path):
    answers("squeue", "timed out", status=1)
    with pytest.raises(BadInput, match=r"does not say which jobs run .timed out."):
        slurm.jobs_from(tmp_path)


def test_work_with_its_own_checkpoints_is_queued_again_before_the_limit(monkeypatch):
    asked = []
    monkeypatch.setattr(slurm, "requeue", lambda: asked.append(True))
    monkeypatch.setattr(slurm, "seconds_left", lambda: 0.2)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(SystemExit) as end, rolling.queued_again_in_time():
        time.sleep(10)
    assert (end.value.code, asked) == (rolling.STOPPED, [True])
    assert signal.getsignal(signal.SIGALRM) is before
    monkeypatch.setattr(slurm, "seconds_left", lambda: None)
    with rolling.queued_again_in_time():
        assert signal.getsignal(signal.SIGALRM) is before


def test_a_limit_that_comes_after_the_last_step_is_left_to_whoever_watched_before(monkeypatch):
    asked, unwatched = [], []
    monkeypatch.setattr(slurm, "requeue", lambda: asked.append(True))
    monkeypatch.setattr(slurm, "seconds_left", lambda: 600)

    def train_and_test() -> None:
        with rolling.queued_again_in_time():
            with rolling.stop_signals():
                monkeypatch.setattr(slurm, "seconds_left", lambda: -1)
                signal.raise_signal(signal.SIGALRM)
            unwatched.append("the test")

    with pytest.raises(SystemExit) as end:
        train_and_test()
    assert (end.value.code, asked, unwatched) == (rolling.STOPPED, [True], [])


def test_where_the_programs_of_slurm_are_missing_nothing_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert slurm.jobs_from(tmp_path) == []
    assert slurm.seconds_left() is None
    slurm.requeue()
    assert capsys.readouterr().err == (
        "the time limit of job 17 is not watched: there is no squeue here\n"
        "job 17 is not queued again: there is no scontrol here\n"
    )


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            "slurmstepd-cn1: error: StepId=5.0 exceeded memory limit (17 > 12), being killed",
            "memory limit of 1200",
        ),
        (
            "error: Detected 1 oom_kill event in StepId=7.batch. Some of the step tasks",
            "memory limit of 1200",
        ),
        (
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25 DUE TO TIME LIMIT ***",
            "time limit of 10",
        ),
        ("slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-25T19:52:48 ***", "cancelled"),
        (
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T19:52:48 DUE TO JOB REQUEUE ***",
            "None",
        ),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T19:52:48 DUE TO PREEMPTION ***", "None"),
        ("slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-25 DUE TO NODE FAILURE, SEE", "None"),
        ("srun: error: n1: task 0: Exited with exit code 1", "None"),
    ],
)
def test_slurm_names_what_a_job_died_of(tmp_path, said, cause):
    log = tmp_path / "7.log"
    log.write_text(f"rule eat:\n{said}\nShutting down\n")
    assert cause in str(slurm.cause_of_death(log, "eat", 1200, 10))
    assert slurm.cause_of_death(tmp_path / "8.log", "eat", 1200, 10) is None
