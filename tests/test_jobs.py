from __future__ import annotations

from test_page import a_pretraining, a_record

from simclr import jobs, results
from simclr.jobs import Finished, Planned


def test_the_plan_sums_what_jobs_may_take_or_took_step_by_step():
    plan = jobs.plan(
        [
            Planned("pretrain", gpus=8, limit=36_000),
            Planned("knn", gpus=1, limit=36_000, earlier=3_600),
            Planned("knn", gpus=2, limit=7_200),
            Planned("svm", gpus=0, limit=60, earlier=36),
        ]
    )
    assert [line.split() for line in plan.splitlines() if "--" not in line] == [
        ["plan", "jobs", "GPUs", "each", "job-hours", "GPU-hours", "estimated", "from"],
        ["pretrain", "1", "8", "10", "80", "the", "recipe:", "at", "most"],
        ["knn", "2", "1", "to", "2", "3", "5", "earlier", "runs", "(1", "of", "2", "jobs)"],
        ["svm", "1", "0", "0.01", "0", "earlier", "runs"],
        ["total", "4", "13", "85"],
    ]


def test_the_summary_counts_gpu_hours_and_shows_the_slowest_ten():
    done = [
        Finished(f"step {i}", 2, 4, 900 * i, cpu_seconds=1_800 * i, memory_mb=1_500) for i in range(1, 12)
    ]
    done.append(Finished("short", 0, 1, 1, cpu_seconds=None, memory_mb=None))
    summary = jobs.summary(done, wall=3_661)
    first, _, _, *rows = summary.splitlines()
    assert first == "12 jobs done in 1:01:01: 16:30:01 of work, 33 GPU-hours, CPUs used to 50 %"
    assert [row.split()[:2] for row in rows] == [["step", str(i)] for i in range(11, 1, -1)]
    assert rows[0].split()[2:] == ["2:45:00", "2", "4", "50", "%", "1.5", "GB"]


def test_a_job_too_short_to_be_sampled_has_a_time_alone(tmp_path):
    (tmp_path / "short.tsv").write_text("s\th:m:s\tmax_rss\tmean_load\tcpu_time\n0.42\t0:00:00\tNA\t-\tNA\n")
    assert jobs.measured(tmp_path / "short.tsv") == {
        "s": 0.42,
        "h:m:s": None,
        "max_rss": None,
        "mean_load": None,
        "cpu_time": None,
    }
    lines = jobs.summary([Finished("short", 0, 1, 0.42, None, None)], wall=1).splitlines()
    assert lines[0].endswith("of work, 0 GPU-hours")


def test_a_benchmark_file_that_is_not_whole_measured_nothing(tmp_path):
    for name, text in {"torn": "s\n", "empty": ""}.items():
        (tmp_path / name).write_text(text)
    assert [jobs.measured(tmp_path / name) for name in ("torn", "empty", "missing")] == [None, None, None]


def test_a_job_that_ran_in_turns_took_all_of_them(tmp_path):
    """A benchmark file is of the last turn alone; records of what trains for long count all of them."""
    details = {"gpu_hours": 4.0, "processes": 8}  # half an hour of 8 GPUs
    results.write(a_record("m", "voc0712_detection", {"AP": 1.0}, details=details), tmp_path / "det.json")
    results.write(a_record("m", "voc07_svm", {"feature1": 1.0}), tmp_path / "svm.json")
    results.write(a_pretraining(seconds=3_600.0), tmp_path / "pretrain.json")
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "times").mkdir()
    for step in ("det", "svm", "pretrain", "torn", "alone"):
        (tmp_path / f"times/{step}.tsv").write_text("s\n60\n")
    took = {step: jobs.took(tmp_path / f"times/{step}.tsv") for step in ("det", "pretrain", "svm", "torn")}
    assert took == {"det": 1_800, "pretrain": 3_600, "svm": 60, "torn": 60}
    assert jobs.took(tmp_path / "times/alone.tsv") == 60
    assert jobs.took(tmp_path / "times/missing.tsv") is None
    (tmp_path / "times/det.tsv").write_text("s\n2000\n")  # with what it takes to start
    assert jobs.took(tmp_path / "times/det.tsv") == 2_000


def test_the_last_line_of_a_log_that_says_anything(tmp_path):
    log = tmp_path / "a.log"
    assert jobs.last_line(log) is None
    log.write_text(" \n\n")
    assert jobs.last_line(log) is None
    log.write_bytes(b"one\n  10 %|\xff|\r two \n \n")
    assert jobs.last_line(log).endswith("two")


def test_what_ended_a_job_stands_above_the_report_of_its_launcher(tmp_path):
    log = tmp_path / "a.log"
    sentence = "simclr: gone.json: no such file"
    reports = (
        "W1125 09:00:00 torch/distributed/elastic/multiprocessing/api.py:900] Sending\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n" + "=" * 60 + "\n",
        "srun: error: gn1: task 0: Exited with exit code 2\n",
    )
    for report in reports:
        log.write_text(f"step 1\n{sentence}\nsome warning\n{report}")
        assert jobs.last_line(log) == sentence
        log.write_text(f"Traceback\nValueError: bad\n{report}")
        assert jobs.last_line(log) == "ValueError: bad"
    log.write_text(f"{sentence}\nstep 2 of 3\n")
    assert jobs.last_line(log) == "step 2 of 3"
