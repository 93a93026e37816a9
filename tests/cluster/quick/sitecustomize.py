"""For the tests alone: with this folder on PYTHONPATH, Snakemake asks Slurm every second, trainings are slow.

The Slurm plugin waits 10 s longer, up to 180 s, after each question that found no job ended, and has no
setting for it. A pretraining waits SIMCLR_TEST_STEP_SECONDS before each step, so that a test can end it in
the middle on a fast machine, too, and saves its state every SIMCLR_TEST_SAVE_SECONDS, where they are given.
While there is a file SIMCLR_TEST_HOLD, it makes no step at all.
"""

import asyncio
import importlib.abc
import importlib.util
import os
import sys
import time


def ask_often(module):
    async def sleep(self):
        await asyncio.sleep(1)

    module.RemoteExecutor.sleep = sleep


def train_slowly(module):
    seconds = float(os.environ.get("SIMCLR_TEST_STEP_SECONDS", 0))
    hold = os.environ.get("SIMCLR_TEST_HOLD", "")

    def slow(schedule):
        def slowly(*arguments):
            time.sleep(seconds)
            while os.path.exists(hold):
                time.sleep(0.1)
            return schedule(*arguments)

        return slowly

    module.SAVE_SECONDS = float(os.environ.get("SIMCLR_TEST_SAVE_SECONDS", module.SAVE_SECONDS))
    module.SCHEDULES = {key: slow(schedule) for key, schedule in module.SCHEDULES.items()}


CHANGES = {
    "snakemake_interface_executor_plugins.executors.remote": ask_often,
    "simclr.pretrain": train_slowly,
}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        change = CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
